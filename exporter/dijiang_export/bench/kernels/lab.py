"""The GPU with everybody who is measured on it: what `measure_kernels` drives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dijiang_engines.progress import ProgressFactory
from dijiang_export.bench.kernels.cells import Cell, Dtype
from dijiang_export.bench.kernels.gpu import Gpu, Measured, full_precision
from dijiang_export.bench.kernels.peers import Contestant, make_roster
from dijiang_export.bench.kernels.warm import warm


class CudaLab:
    """The current CUDA device, our library and the peers.

    Args:
        peers: names in `measure.PEER_NAMES`.
        dtype: of qkv, gate and output.
        library: of our kernels; None for the default one.
        ours: False measures the peers alone, and needs no library.

    Raises:
        RunnerError: there is no GPU.
        KernelError: our library is missing or cannot be loaded.
    """

    def __init__(
        self, peers: Sequence[str], dtype: Dtype, *, library: Path | None = None, ours: bool = True
    ) -> None:
        self._gpu = Gpu(dtype)
        self._dtype = dtype
        self._contestants: list[Contestant] = []
        self._library: dict[str, Any] | None = None
        if ours:
            from dijiang_export.bench.kernels.ours import Ours

            own = Ours(library)
            self._contestants.append(own)
            self._library = own.describe()
        roster = make_roster(peers)
        self._contestants += roster.contestants
        self.absent = roster.absent

    def describe(self) -> dict[str, Any]:
        """The GPU."""
        return self._gpu.describe()

    def library(self) -> dict[str, Any] | None:
        """Our library, None if it is not measured."""
        return self._library

    def ceilings(self) -> dict[str, Any]:
        """See `Gpu.ceilings`."""
        return self._gpu.ceilings()

    def warm(self, cells: Sequence[Cell], jobs: int, progress: ProgressFactory) -> list[str]:
        """Compile what the peers need."""
        return warm(cells, [c.name for c in self._contestants], self._dtype, jobs, progress)

    def measure(self, cell: Cell, seconds: float) -> dict[str, Measured | str]:
        """See `Gpu.measure`."""
        with full_precision():
            return self._gpu.measure(cell, self._contestants, seconds)
