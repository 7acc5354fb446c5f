"""The current CUDA device with those who multiply: what `bench products` measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dijiang_engines.kernels.linear import LinearKernels
from dijiang_export.bench.cells.device import Contestant, KernelsGpu, timed
from dijiang_export.bench.products.cells import Cell
from dijiang_export.bench.products.layers import Layers
from dijiang_export.bench.step.bare import cublas, tinygemm
from dijiang_export.reference.model import DTYPES

ALLOWED = {"float16": 2e-3, "bfloat16": 1.6e-2}
"""Of a difference's 2-norm over that of the result: some roundings of T, of operands and results."""


class ProductsGpu(KernelsGpu[Cell]):
    """The current CUDA device.

    Args:
        dtype: T, of activations and of weights that are not quantised.
        library: of our kernels; None for the built ones.

    Raises:
        RunnerError, PluginError, KernelError: as of `KernelsGpu`.
    """

    def __init__(self, dtype: str, library: Path | None = None) -> None:
        super().__init__("bench products", {"dtype": dtype}, library)
        self._dtype, self._kernels = dtype, LinearKernels(self.path)

    def contestants(self, cell: Cell, seconds: float) -> Mapping[str, Contestant]:
        """Ours; cuBLAS in T; of int4 and few rows, tinygemm."""
        kind, sizes, rows = DTYPES[self._dtype], cell.sizes, cell.rows
        found: dict[str, Contestant] = {
            "ours": lambda: self._ours(cell, seconds),
            "cublas": lambda: {"timing": timed(cublas(sizes, rows, kind, self.device), seconds)},
        }
        if cell.weights == "int4" and cell.few:
            found["tinygemm"] = lambda: {"timing": timed(tinygemm(sizes, rows, self.device), seconds)}
        return found

    def _ours(self, cell: Cell, seconds: float) -> dict[str, Any]:
        layers = Layers(
            self._kernels, cell.spec, cell.weights, cell.rows, cell.layers, self._dtype, self.device
        )
        error = layers.error()
        found: dict[str, Any] = {"error": error, "right": error <= ALLOWED[self._dtype]}
        if found["right"]:
            found["timing"] = timed(lambda: layers.run(*layers.parts), seconds)
            for part in layers.parts:
                found[part] = timed(lambda part=part: layers.run(part), seconds)  # type: ignore[misc]
        return found
