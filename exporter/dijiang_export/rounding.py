"""What rounding costs a model by itself, with exact sums, in units of `validate`'s tolerances.

    python -m dijiang_export.rounding CHECKPOINT [--cases full]

The recorded cases are computed twice in float64 from the same weights, once as `to-onnx` records them and
once with activations rounded as `export.rounding_recorder` says, and compared as `validate` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch

from dijiang_engines.shipped_sample import sample_checkpoint
from dijiang_engines.validation.tolerances import tolerance
from dijiang_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dijiang_export.export.case_recorder import CaseRecorder
from dijiang_export.export.cases import Cases, choose_cases
from dijiang_export.export.rounding_recorder import RoundingRecorder, logits_of, states_of
from dijiang_export.reference.model import DTYPES


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
    chosen = choose_cases(checkpoint.spec, cases)
    with torch.inference_mode():
        exact = CaseRecorder(checkpoint, DTYPES[dtype], chosen).run()
        rounded = RoundingRecorder(checkpoint, DTYPES[dtype], chosen).run()
    found = []
    for case in chosen:
        layers = range(checkpoint.spec.num_layers)
        states = [one for layer in layers for one in states_of(case, exact, rounded, dtype, layer)]
        for quantity, compared in (
            ("logits", logits_of(case, exact, rounded, dtype)),
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
                    dtype, case.name, quantity, error,
                    max(max(1 - one.cosine, 0.0) for _, one in compared if one.cosine is not None),
                    max(kls, default=None), error / bound, dict(sorted(by_tokens.items())),
                )
            )  # fmt: skip
    return found


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--cases", type=click.Choice(["short", "full"]), default="full", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), help="Default: all.")
def main(checkpoint: Path | None, cases: str, dtypes: tuple[str, ...]) -> None:
    """What rounding CHECKPOINT's activations costs by itself, in units of `validate`'s tolerances.

    CHECKPOINT is by default the trained sample model.
    """
    click.echo("| dtype | case | quantity | error | of the tolerance | 1 - cosine | KL |")
    click.echo("|---|---|---|---|---|---|---|")
    with open_checkpoint(checkpoint or sample_checkpoint()) as opened:
        for dtype in dtypes or tuple(DTYPES):
            for e in rounding_errors(opened, dtype, cases):  # type: ignore[arg-type]  # click.Choice
                kl = "-" if e.kl is None else f"{e.kl:.1e}"
                click.echo(
                    f"| {e.dtype} | {e.case} | {e.quantity} | {e.error:.1e} | {100 * e.share:.2g}% "
                    f"| {e.cosine_distance:.1e} | {kl} |"
                )


if __name__ == "__main__":
    main()
