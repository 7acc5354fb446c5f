"""What `bench step`, `bench products` and `bench sampling` do alike: measure, save, show, fail if wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from dijiang_export.commands.arguments import one_of
from dijiang_export.commands.common import Output, finish, save_json

if TYPE_CHECKING:
    from rich.console import Group

    from dijiang_export.bench.cells.measure import C, Gpu

Weights = Literal["float", "int8", "int4"]
Half = Literal["float16", "bfloat16"]
EveryWeights = Annotated[
    tuple[Weights, ...],
    click.option("--weights", type=one_of(Weights), multiple=True, help="Repeatable. [default: all three]"),
]
HalfType = Annotated[
    Half,
    click.option(
        "--dtype", type=one_of(Half), default="float16", show_default=True,
        help="Of activations, and of weights that are not quantised.",
    ),
]  # fmt: skip


def measure_and_show(
    output: Output, gpu: Gpu[C], cells: Sequence[C], title: str, *,
    seconds: float, save: Path | None, draw: Callable[[dict[str, Any]], Group],
) -> None:  # fmt: skip
    """Measure all cells on a GPU.

    Raises:
        ValidationMismatch: our kernels computed something else than the reference, which was not timed.
    """
    from dijiang_engines.errors import ValidationMismatch
    from dijiang_export.bench.cells.measure import measure_cells, wrong

    def report(so_far: dict[str, Any]) -> None:
        output.log(f"measured {so_far['cells'][-1]['name']}")
        if save is not None:  # whoever stops it keeps what was measured
            save_json(so_far, save)

    result = measure_cells(gpu, cells, title=title, seconds=seconds, progress=output.progress, report=report)
    finish(output, result, save, lambda: draw(result))
    if differences := wrong(result):
        raise ValidationMismatch(
            "our kernels compute something else than the reference", got="; ".join(differences[:3])
        )
