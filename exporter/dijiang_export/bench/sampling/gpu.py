"""The current CUDA device with those who choose tokens: what `bench sampling` measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.kernels.sampling import SamplingKernels
from dijiang_export.bench.cells.device import Contestant, KernelsGpu, timed
from dijiang_export.bench.kernels.peers import compiled
from dijiang_export.bench.sampling.cells import Cell
from dijiang_export.bench.sampling.choosers import Ours, make_logits, torch_chooser

ALLOWED = 0.02
"""Share of tokens that may differ from the host's, which sums in float64: where a random number is within
rounding of the boundary between two tokens. A wrong filter or random number changes most of them."""
CALLS = 32
"""In a graph: one takes a few microseconds."""


class SamplingGpu(KernelsGpu[Cell]):
    """The current CUDA device.

    Args:
        library: of our kernels; None for the built ones.

    Raises:
        RunnerError, PluginError, KernelError: as of `KernelsGpu`.
    """

    def __init__(self, library: Path | None = None) -> None:
        super().__init__("bench sampling", {}, library)
        self._kernels = SamplingKernels(self.path)

    def contestants(self, cell: Cell, seconds: float) -> Mapping[str, Contestant]:
        """Ours; PyTorch's operators, as they are and compiled."""
        logits = make_logits(cell.rows, cell.vocabulary, self.device)
        tokens = torch.empty(cell.rows, dtype=torch.int64, device=self.device)
        choose = torch_chooser(cell.options)

        def ours() -> dict[str, Any]:
            chooser = Ours(self._kernels, cell.options, logits)
            error = chooser.different()
            found: dict[str, Any] = {"error": error, "right": error <= ALLOWED}
            if found["right"]:
                found["timing"] = timed(chooser.run, seconds, CALLS)
                found["plan"] = self._kernels.sample_plan(cell.rows, cell.vocabulary)
            return found

        def by_torch(chooser: Any) -> Contestant:
            return lambda: {"timing": timed(lambda: chooser(logits, tokens), seconds, CALLS)}

        return {"ours": ours, "torch": by_torch(choose), "torch-compile": by_torch(compiled(choose))}
