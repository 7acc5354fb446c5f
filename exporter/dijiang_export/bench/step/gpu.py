"""The current CUDA device with a step's contestants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.kernels.linear import LinearKernels
from dijiang_engines.kernels.step import StepKernels
from dijiang_export.bench.cells.device import Contestant, KernelsGpu, relative_error, timed
from dijiang_export.bench.step.bare import cublas, tinygemm
from dijiang_export.bench.step.launches import Launches
from dijiang_export.bench.step.one_launch import OneLaunch
from dijiang_export.bench.step.shapes import SHAPES, Cell, formats, product_sizes
from dijiang_export.bench.step.step import Step
from dijiang_export.bench.step.weights import QuantisedWeights, quantise_model, random_model, widened
from dijiang_export.reference.model import DTYPES, ReferenceModel

POSITIONS = (100, 100_000)
"""Tokens before the step. A step must take as long at both."""
STEPS = 2
"""That are compared with the reference, each from where the last one ended."""
ALLOWED = {"float16": 5e-3, "bfloat16": 4e-2}
"""Of a difference's 2-norm over that of the logits or of a state: both types round what is multiplied."""


class StepGpu(KernelsGpu[Cell]):
    """The current CUDA device.

    Args:
        dtype: T, of activations and of weights that are not quantised.
        library: of our kernels; None for the built ones.

    Raises:
        RunnerError, PluginError, KernelError: as of `KernelsGpu`.
    """

    OURS = frozenset({"one launch", "launches"})

    def __init__(self, dtype: str, library: Path | None = None) -> None:
        super().__init__("bench step", {"dtype": dtype}, library)
        self._dtype = dtype
        self._step, self._products = StepKernels(self.path), LinearKernels(self.path)
        self._models: dict[tuple[str, str], tuple[ReferenceModel, QuantisedWeights | None]] = {}

    def contestants(self, cell: Cell, seconds: float) -> Mapping[str, Contestant]:
        """Ours, compared with the reference, and the bare products of others."""
        spec, kind = SHAPES[cell.shape], DTYPES[self._dtype]
        model, quantised = self._model(cell)
        sizes = product_sizes(spec)
        found: dict[str, Contestant] = {
            "one launch": lambda: self._checked(
                OneLaunch(self._step, spec, model, self._dtype, cell.rows, "cuda", quantised), model, seconds
            )
        }
        if cell.weights == "float":
            found["launches"] = lambda: self._checked(
                Launches(self.attention, self._products, spec, model, self._dtype, cell.rows), model, seconds
            )
            found["cublas"] = lambda: {"timing": timed(cublas(sizes, cell.rows, kind, self.device), seconds)}
        elif cell.weights == "int4":
            found["tinygemm"] = lambda: {"timing": timed(tinygemm(sizes, cell.rows, self.device), seconds)}
        return found

    def _model(self, cell: Cell) -> tuple[ReferenceModel, QuantisedWeights | None]:
        """Of T; its quantised matrices hold q · scale, rounded to T. One is kept: shapes come in turn."""
        key = cell.shape, cell.weights
        if key not in self._models:
            self._models.clear()
            torch.cuda.empty_cache()
            model = random_model(SHAPES[cell.shape], DTYPES[self._dtype], self.device)
            parts = formats(SHAPES[cell.shape], cell.weights)
            self._models[key] = model, None if parts is None else quantise_model(model, parts)
        return self._models[key]

    def _checked(self, step: Step, model: ReferenceModel, seconds: float) -> dict[str, Any]:
        """Its errors, and if they are small its times."""
        reference = widened(model, self.device)
        error = max(step_error(step, reference, position) for position in POSITIONS)
        del reference
        torch.cuda.empty_cache()
        found: dict[str, Any] = {"error": error, "right": error <= ALLOWED[self._dtype]}
        if found["right"]:
            step.start(torch.ones(step.rows), torch.zeros(step.rows), torch.ones(step.rows), step.states)
            for name, position in zip(("timing", "far"), POSITIONS, strict=True):
                step.positions.fill_(position)
                found[name] = timed(step.run, seconds)
        return found


def step_error(step: Step, reference: ReferenceModel, position: int) -> float:
    """The largest relative error of `STEPS` steps' logits and states; infinite where something is not finite.

    Args:
        step: what is compared.
        reference: the same weights in float64.
        position: of the first step.
    """
    device = next(reference.parameters()).device
    draw = torch.Generator(device).manual_seed(position)
    spec, worst = reference.spec, 0.0
    states = [torch.randn(state.shape, generator=draw, device=device) for state in step.states]
    for count in range(STEPS):
        ids = torch.randint(spec.vocab_size, (step.rows,), generator=draw, device=device)
        positions, lens = torch.full((step.rows,), position + count, device=device), torch.ones_like(ids)
        step.start(ids, positions, lens, states)
        step.run()
        wide = [state.double() for state in states]
        logits, new = reference(ids.reshape(-1, 1), positions, lens, wide, form="recurrent")
        pairs = [(step.logits, logits[:, 0]), *zip(step.states, new, strict=True)]
        worst = max(worst, *(relative_error(got, expected) for got, expected in pairs))
        states = [state.clone() for state in step.states]
    return worst
