"""The current CUDA device with a step's contestants: what `measure_steps` drives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_engines.kernels.attention import load_kernels
from dijiang_engines.kernels.linear import LinearKernels
from dijiang_engines.kernels.step import StepKernels
from dijiang_engines.plugin.cache import library_hash
from dijiang_export.bench.kernels.gpu import time_graph
from dijiang_export.bench.kernels.peers import Prepared
from dijiang_export.bench.memory_rate import memory_rate
from dijiang_export.bench.step.bare import cublas, tinygemm
from dijiang_export.bench.step.launches import Launches
from dijiang_export.bench.step.one_launch import OneLaunch
from dijiang_export.bench.step.shapes import SHAPES, Cell, formats
from dijiang_export.bench.step.step import Step
from dijiang_export.bench.step.weights import QuantisedWeights, quantise_model, random_model, widened
from dijiang_export.reference.model import DTYPES, ReferenceModel

POSITIONS = (100, 100_000)
"""Tokens before the step. A step must take as long at both."""
STEPS = 2
"""That are compared with the reference, each from where the last one ended."""
ALLOWED = {"float16": 5e-3, "bfloat16": 4e-2}
"""Of a difference's 2-norm over that of the logits or of a state: both types round what is multiplied."""


class StepGpu:
    """The current CUDA device.

    Args:
        dtype: T, of activations and of weights that are not quantised.
        library: of our kernels; None for the built ones.

    Raises:
        RunnerError: there is no GPU.
        PluginError: no library was built.
        KernelError: it cannot be loaded.
    """

    def __init__(self, dtype: str, library: Path | None = None) -> None:
        if not torch.cuda.is_available():
            raise RunnerError(
                "bench step needs an NVIDIA GPU",
                got=f"PyTorch {torch.__version__} that sees none",
                hint="`dijiang-export doctor` shows what is there",
            )
        self.dtype, self.device = dtype, torch.device("cuda", torch.cuda.current_device())
        self._attention = load_kernels(library)
        self._path = self._attention.path
        self._step, self._products = StepKernels(self._path), LinearKernels(self._path)
        self._models: dict[tuple[str, str], tuple[ReferenceModel, QuantisedWeights | None]] = {}

    def describe(self) -> dict[str, Any]:
        """The GPU, and our library."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": {
                "name": found.name,
                "multiprocessors": found.multi_processor_count,
                "cuda": torch.version.cuda,
            },
            "library": {"sha256": library_hash(self._path), "version": self._step.version},
        }

    def rate(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        return memory_rate(self.device, 0).copy

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """All contestants at one cell; by name what was measured, or why it was not.

        Args:
            cell: which step.
            seconds: about how long to replay for each figure.
        """
        spec, kind = SHAPES[cell.shape], DTYPES[self.dtype]
        model, quantised = self._model(cell)
        contestants: dict[str, Callable[[], dict[str, Any]]] = {
            "one launch": lambda: self._checked(
                OneLaunch(self._step, spec, model, self.dtype, cell.rows, "cuda", quantised), model, seconds
            )
        }
        if cell.weights == "float":
            contestants["launches"] = lambda: self._checked(
                Launches(self._attention, self._products, spec, model, self.dtype, cell.rows), model, seconds
            )
            contestants["cublas"] = lambda: _timed(cublas(spec, cell.rows, kind, self.device), seconds)
        elif cell.weights == "int4":
            contestants["tinygemm"] = lambda: _timed(tinygemm(spec, cell.rows, self.device), seconds)
        found = {}
        with torch.no_grad():
            for name, contestant in contestants.items():
                try:
                    found[name] = contestant()
                except DijiangError as error:
                    found[name] = {"skipped": error.sentence()}
                except torch.OutOfMemoryError:
                    found[name] = {"skipped": "the GPU's memory is too small for it"}
                torch.cuda.empty_cache()
        return found

    def _model(self, cell: Cell) -> tuple[ReferenceModel, QuantisedWeights | None]:
        """Of T; its quantised matrices hold q · scale, rounded to T. One is kept: shapes come in turn."""
        key = cell.shape, cell.weights
        if key not in self._models:
            self._models.clear()
            torch.cuda.empty_cache()
            model = random_model(SHAPES[cell.shape], DTYPES[self.dtype], self.device)
            parts = formats(SHAPES[cell.shape], cell.weights)
            self._models[key] = model, None if parts is None else quantise_model(model, parts)
        return self._models[key]

    def _checked(self, step: Step, model: ReferenceModel, seconds: float) -> dict[str, Any]:
        """Its errors, and if they are small its times."""
        reference = widened(model, self.device)
        error = max(step_error(step, reference, position) for position in POSITIONS)
        del reference
        torch.cuda.empty_cache()
        found: dict[str, Any] = {"error": error, "right": error <= ALLOWED[self.dtype]}
        if found["right"]:
            step.start(torch.ones(step.rows), torch.zeros(step.rows), torch.ones(step.rows), step.states)
            for name, position in zip(("timing", "far"), POSITIONS, strict=True):
                step.positions.fill_(position)
                found[name] = _timed(step.run, seconds)["timing"]
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


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The difference's norm over the expected one's; infinite where something is not finite."""
    got = got.double().to(expected.device)
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).norm() / expected.norm())


def _timed(run: Callable[[], None], seconds: float) -> dict[str, Timing]:
    """Replays of a CUDA graph of one step."""
    prepared = Prepared(lambda _: run(), dict)
    return {"timing": time_graph(prepared, [0], seconds, keep=1)}
