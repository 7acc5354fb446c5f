"""What rounding to a bundle's type costs its model: the scale that its tolerances are set by.

The recorded cases are computed once more with every activation rounded to the bundle's type where the graph
has one: after each operator outside DijiangAttention, and at its output. (Inside the op everything is
float32, as is the state.) What lies between that and the record is what rounding alone costs. An engine may
round less often, where operators are fused; and its sums are narrower than float64, which is not counted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dijiang_engines.formats.rounding_cost import Cost, RoundingCost
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.validation.compare import Comparison, compare_logits, compare_state
from dijiang_engines.validation.tolerances import tolerance
from dijiang_engines.weight_formats import BLOCK, Activations
from dijiang_export.export.case_recorder import CaseRecorder
from dijiang_export.export.cases import CaseInputs, first_tokens
from dijiang_export.export.dequantised import ModelWeights, is_exact
from dijiang_export.reference.model import DTYPES, MLP, AttentionOp, Block, ReferenceModel, RMSNorm

MEASURED_TOKENS = 1000
"""Of each sequence, when a bundle's rounding cost is measured: errors do not grow with the position
(docs/validation.md), and 10,000 tokens would make `--cases full` half as long again."""


def measure_rounding(
    checkpoint: ModelWeights,
    dtype: torch.dtype,
    cases: list[CaseInputs],
    exact: Mapping[str, Any],
    progress: ProgressFactory = silent,
    activations: Activations = "float",
) -> RoundingCost | None:
    """What computing in the bundle's type costs this model, over the first tokens of the recorded cases.

    Computed as a runtime would: in float32, with every activation rounded to the bundle's type where the
    graph has one.

    Args:
        checkpoint: where weights come from.
        dtype: the bundle's.
        cases: which; of long ones `MEASURED_TOKENS` are used.
        exact: what was recorded of them, as `CaseRecorder.run` returns it.
        progress: for the layers.
        activations: int8: rounded to it before each product of a quantised matrix.

    Returns:
        None if the type cannot hold the activations.
    """
    name = next(key for key, value in DTYPES.items() if value == dtype)
    layers = checkpoint.spec.num_layers
    short = [first_tokens(case, MEASURED_TOKENS) for case in cases]
    with torch.inference_mode():
        recorder = RoundingRecorder(checkpoint, dtype, short, torch.float32, activations)
        rounded = recorder.run(progress, "Measuring rounding")
    if not all(np.isfinite(value).all() for value in rounded.values()):
        return None
    logits = [_cost(one) for case in short for _, one in logits_of(case, exact, rounded, name)]
    states = [
        [_cost(one) for case in short for _, one in states_of(case, exact, rounded, name, layer)]
        for layer in range(layers)
    ]
    return RoundingCost(
        name,
        functools.reduce(Cost.at_least, logits),
        tuple(functools.reduce(Cost.at_least, costs) for costs in states),
    )


def _cost(compared: Comparison) -> Cost:
    distance = 0.0 if compared.cosine is None else max(1 - compared.cosine, 0.0)
    return Cost(compared.relative_error or 0.0, distance, compared.kl)


def logits_of(
    case: CaseInputs, exact: Mapping[str, Any], rounded: Mapping[str, Any], dtype: str
) -> list[tuple[int, Comparison]]:
    """Of each mark of a case: tokens consumed, and how far the rounded logits are from the exact ones."""
    key = f"{case.name}.logits"
    scale = float(exact[key].astype("float64").std())
    limit = tolerance(dtype, "logits")
    return [
        (int(tokens), compare_logits(rounded[key][row, m], exact[key][row, m], limit, scale=scale))
        for row, marks in enumerate(case.marks)
        for m, tokens in enumerate(marks)
    ]


def states_of(
    case: CaseInputs, exact: Mapping[str, Any], rounded: Mapping[str, Any], dtype: str, layer: int
) -> list[tuple[int, Comparison]]:
    """Of each kept state of a layer: tokens consumed, and how far the rounded one is from the exact one."""
    limit = tolerance(dtype, "state")
    key = f"{case.name}.state.{layer}"
    return [
        (int(case.marks[row, mark]), compare_state(rounded[key][row, s], exact[key][row, s], limit))
        for row in range(len(case.input_ids))
        for s, mark in enumerate(case.state_marks)
    ]


class RoundingRecorder(CaseRecorder):
    """A `CaseRecorder` that rounds activations to its dtype at the borders of the graph's operators."""

    def __init__(
        self,
        checkpoint: ModelWeights,
        dtype: torch.dtype,
        cases: list[CaseInputs],
        work: torch.dtype = torch.float64,
        activations: Activations = "float",
    ) -> None:
        super().__init__(checkpoint, dtype, cases, work)
        self._mode = _Rounding(dtype, work)
        self._activations = activations

    def blocks(self, name: str) -> Iterator[Tensor]:
        """As the `CaseRecorder`'s: weights are rounded already."""
        found = super().blocks(name)
        while True:
            with self._mode.paused():
                block = next(found, None)
            if block is None:
                return
            yield block

    def product_input(self, name: str, x: Tensor) -> Tensor:
        """Rounded to int8 in blocks, as by MatMulNBits' accuracy_level 4, where the matrix is quantised."""
        if self._activations == "float" or not is_exact(self.checkpoint, name):
            return x
        with self._mode.paused():
            return rounded_to_int8(x)

    def embed(self, ids: npt.NDArray[np.int64], position: int) -> Tensor:
        """As the `CaseRecorder`'s, rounded."""
        with self._mode:
            return super().embed(ids, position)

    def load(self, module: nn.Module, prefix: str) -> None:
        """As the `CaseRecorder`'s, with the graph's operators."""
        super().load(module, prefix)
        as_in_the_graph(module, self.spec.activation, self._mode)

    def run_layer(self, block: Block, hidden: Tensor, op: AttentionOp) -> Tensor:
        """As the `CaseRecorder`'s, rounded."""
        with self._mode:
            return super().run_layer(block, hidden, functools.partial(self._whole, op))

    def head(self, model: ReferenceModel, hidden: Tensor) -> Tensor:
        """As the `CaseRecorder`'s, rounded."""
        with self._mode:
            return super().head(model, hidden)

    def _whole(self, op: AttentionOp, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with self._mode.paused():
            output, state = op(*tensors, **options)
        return self._mode.round(output), state


def rounded_to_int8(x: Tensor) -> Tensor:
    """x [..., K] in blocks of 32: to the nearest of 127 steps of its largest magnitude on either side."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.where(step == 0, blocks, blocks / step).round() * step).reshape(x.shape)


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operator's results in `work` go through `dtype`, except where it is paused."""

    def __init__(self, dtype: torch.dtype, work: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.work = dtype, work
        self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views and in-place results are what was rounded before.
        if self._paused or any(r.alias_info is not None for r in func._schema.returns):
            return result
        return self.round(result) if isinstance(result, Tensor) else result

    def round(self, x: Tensor) -> Tensor:
        """Values that `dtype` has, in `work`; tensors of other types as they are."""
        return x.to(self.dtype).to(x.dtype) if x.dtype == self.work else x

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A part that is one operator of the graph, or none of its activations."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * (torch.erf(x / math.sqrt(2)) + 1) * 0.5,
    "gelu_tanh": lambda x: (x * 0.5) * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3)))),
    "silu": lambda x: x * torch.sigmoid(x),
}
"""Opset 17 has no operators for these: their formulas stand in the graph."""


def as_in_the_graph(module: nn.Module, activation: str, mode: _Rounding) -> None:
    """Give modules the operators that the ONNX graph has: activations in parts, norms whole."""
    for one in module.modules():
        if isinstance(one, nn.LayerNorm):
            one.forward = functools.partial(_layer_norm, one.forward, mode)  # type: ignore[method-assign]
        elif isinstance(one, RMSNorm):
            one.forward = functools.partial(_rms_norm, one, mode)  # type: ignore[method-assign]
        elif isinstance(one, MLP):
            one.activation = _PARTS.get(activation, one.activation)


def _layer_norm(forward: Callable[[Tensor], Tensor], mode: _Rounding, x: Tensor) -> Tensor:
    with mode.paused():
        result = forward(x)
    return mode.round(result)


def _rms_norm(norm: RMSNorm, mode: _Rounding, x: Tensor) -> Tensor:
    """In float32 up to the weight, with which it is multiplied in T."""
    with mode.paused():
        wide = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon)
    return mode.round(norm.weight * mode.round(wide))
