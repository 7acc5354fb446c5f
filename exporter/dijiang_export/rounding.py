"""What rounding costs a model: the scale that its tolerances are set by.

`measure_rounding` measures it for a bundle's record. By itself, with exact sums, it is shown by

    python -m dijiang_export.rounding CHECKPOINT [--cases full]

The recorded cases are computed twice in float64 from the same weights, once as `to-onnx` records them and
once with every activation rounded to the bundle's type where the graph has one: after each operator outside
DijiangAttention, and at its output. (Inside the op everything is float32, as is the state.) What lies
between the two is what rounding alone costs. An engine may round less often, where operators are fused, and
its sums are narrower than float64, which is not counted here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dijiang_engines.formats.rounding_cost import Cost, RoundingCost
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.shipped_sample import sample_checkpoint
from dijiang_engines.validation.compare import Comparison, compare_logits, compare_state
from dijiang_engines.validation.tolerances import tolerance
from dijiang_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dijiang_export.export.cases import CasePlan, Cases, first_tokens, plan_cases
from dijiang_export.export.recorder import Recorder
from dijiang_export.reference.model import MLP, AttentionOp, Block, ReferenceModel, RMSNorm

MEASURED_TOKENS = 1000
"""Of each sequence, when a bundle's rounding cost is measured: errors do not grow with the position
(docs/validation.md), and 10,000 tokens would make `--cases full` half as long again."""
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RoundingError:
    """The largest errors of one case, over its rows and marks."""

    dtype: str
    case: str
    quantity: str
    """logits or state."""
    error: float
    """In the units of the tolerance table."""
    cosine_distance: float
    """1 - cosine."""
    kl: float | None
    """In nats; logits only."""
    share: float
    """error / the tolerance's max_error."""
    by_tokens: dict[int, float]
    """error, by tokens consumed."""


def rounding_errors(checkpoint: Checkpoint, dtype: str, cases: Cases = "full") -> list[RoundingError]:
    """Compute the cases with and without rounding and compare them as `validate` does.

    Args:
        checkpoint: any DiJiang checkpoint.
        dtype: float32, float16 or bfloat16: of weights and activations.
        cases: which, as for `to-onnx`.

    Returns:
        For each case its logits' and its states' error.
    """
    plans = plan_cases(checkpoint.spec, cases)
    with torch.inference_mode():
        exact = Recorder(checkpoint, TYPES[dtype], plans).run()
        rounded = RoundingRecorder(checkpoint, TYPES[dtype], plans).run()
    found = []
    for plan in plans:
        layers = range(checkpoint.spec.num_layers)
        states = [one for layer in layers for one in _states(plan, exact, rounded, dtype, layer)]
        for quantity, compared in (
            ("logits", _logits(plan, exact, rounded, dtype)),
            ("state", states),
        ):
            by_tokens: dict[int, float] = {}
            for tokens, one in compared:
                assert one.relative_error is not None
                by_tokens[tokens] = max(by_tokens.get(tokens, 0.0), one.relative_error)
            error = max(by_tokens.values())
            kls = [one.kl for _, one in compared if one.kl is not None]
            bound = tolerance(dtype, "logits" if quantity == "logits" else "state").max_error
            found.append(
                RoundingError(
                    dtype, plan.name, quantity, error,
                    max(max(1 - one.cosine, 0.0) for _, one in compared if one.cosine is not None),
                    max(kls, default=None), error / bound, dict(sorted(by_tokens.items())),
                )
            )  # fmt: skip
    return found


def measure_rounding(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    plans: list[CasePlan],
    exact: Mapping[str, Any],
    progress: ProgressFactory = silent,
) -> RoundingCost | None:
    """What computing in the bundle's type costs this model, over the first tokens of the recorded cases.

    Computed as a runtime would: in float32, with every activation rounded to the bundle's type where the
    graph has one.

    Args:
        checkpoint: where weights come from.
        dtype: the bundle's.
        plans: the cases; of long ones `MEASURED_TOKENS` are used.
        exact: what was recorded of them, as `Recorder.run` returns it.
        progress: for the layers.

    Returns:
        None if the type cannot hold the activations.
    """
    name = next(key for key, value in TYPES.items() if value == dtype)
    layers = checkpoint.spec.num_layers
    short = [first_tokens(plan, MEASURED_TOKENS) for plan in plans]
    with torch.inference_mode():
        rounded = RoundingRecorder(checkpoint, dtype, short, torch.float32).run(
            progress, "Measuring rounding"
        )
    if not all(np.isfinite(value).all() for value in rounded.values()):
        return None
    logits = [_cost(one) for plan in short for _, one in _logits(plan, exact, rounded, name)]
    states = [
        [_cost(one) for plan in short for _, one in _states(plan, exact, rounded, name, layer)]
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


def _logits(
    plan: CasePlan, exact: Mapping[str, Any], rounded: Mapping[str, Any], dtype: str
) -> list[tuple[int, Comparison]]:
    key = f"{plan.name}.logits"
    scale = float(exact[key].astype("float64").std())
    limit = tolerance(dtype, "logits")
    return [
        (int(tokens), compare_logits(rounded[key][row, m], exact[key][row, m], limit, scale=scale))
        for row, marks in enumerate(plan.marks)
        for m, tokens in enumerate(marks)
    ]


def _states(
    plan: CasePlan, exact: Mapping[str, Any], rounded: Mapping[str, Any], dtype: str, layer: int
) -> list[tuple[int, Comparison]]:
    limit = tolerance(dtype, "state")
    key = f"{plan.name}.state.{layer}"
    return [
        (int(plan.marks[row, mark]), compare_state(rounded[key][row, s], exact[key][row, s], limit))
        for row in range(len(plan.input_ids))
        for s, mark in enumerate(plan.state_marks)
    ]


class RoundingRecorder(Recorder):
    """A `Recorder` that rounds activations to its dtype at the borders of the graph's operators."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        plans: list[CasePlan],
        work: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(checkpoint, dtype, plans, work)
        self._mode = _Rounding(dtype, work)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """As the `Recorder`'s: weights are rounded already."""
        found = super().blocks(name)
        while True:
            with self._mode.paused():
                block = next(found, None)
            if block is None:
                return
            yield block

    def embed(self, ids: npt.NDArray[np.int64], position: int) -> Tensor:
        """As the `Recorder`'s, rounded."""
        with self._mode:
            return super().embed(ids, position)

    def load(self, module: nn.Module, prefix: str) -> None:
        """As the `Recorder`'s, with the graph's operators."""
        super().load(module, prefix)
        as_in_the_graph(module, self.spec.activation, self._mode)

    def run_layer(self, block: Block, hidden: Tensor, op: AttentionOp) -> Tensor:
        """As the `Recorder`'s, rounded."""
        with self._mode:
            return super().run_layer(block, hidden, functools.partial(self._whole, op))

    def head(self, model: ReferenceModel, hidden: Tensor) -> Tensor:
        """As the `Recorder`'s, rounded."""
        with self._mode:
            return super().head(model, hidden)

    def _whole(self, op: AttentionOp, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with self._mode.paused():
            output, state = op(*tensors, **options)
        return self._mode.round(output), state


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


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--cases", type=click.Choice(["short", "full"]), default="full", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(TYPES)), help="Default: all.")
def main(checkpoint: Path | None, cases: str, dtypes: tuple[str, ...]) -> None:
    """What rounding CHECKPOINT's activations costs by itself, in units of `validate`'s tolerances.

    CHECKPOINT is by default the trained sample model.
    """
    click.echo("| dtype | case | quantity | error | of the tolerance | 1 - cosine | KL |")
    click.echo("|---|---|---|---|---|---|---|")
    with open_checkpoint(checkpoint or sample_checkpoint()) as opened:
        for dtype in dtypes or tuple(TYPES):
            for e in rounding_errors(opened, dtype, cases):  # type: ignore[arg-type]  # click.Choice
                kl = "-" if e.kl is None else f"{e.kl:.1e}"
                click.echo(
                    f"| {e.dtype} | {e.case} | {e.quantity} | {e.error:.1e} | {100 * e.share:.2g}% "
                    f"| {e.cosine_distance:.1e} | {kl} |"
                )


if __name__ == "__main__":
    main()
