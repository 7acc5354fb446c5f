"""`dijiang-export bench kernels`: the CUDA kernels beside other implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dijiang_export.commands.common import Output, output_options
from dijiang_export.commands.saving import finish, save_json, save_option


@click.command(
    "kernels",
    short_help="Measure the CUDA kernels beside other implementations (needs an NVIDIA GPU).",
    epilog="Example: dijiang-export bench kernels --shape 32x128 --save kernels.json --plot kernels.svg",
)
@click.option("--shape", "shapes", multiple=True, metavar="HxD", help="Heads, repeatable.")
@click.option("--phase", type=click.Choice(["decode", "prefill", "both"]), default="both", show_default=True)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="Rows of decode steps, repeatable.",
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="[Bx]L",
    help="Rows and length of prefills, such as 8x2048; repeatable.",
)  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="Of queries, keys, values, gate and output; the state is always float32.",
)
@click.option(
    "--peer", "peers", type=click.Choice(["fla", "fla-phi", "torch-compile", "copy"]), multiple=True,
    help="Measure only this one beside ours; repeatable.",
)  # fmt: skip
@click.option("--no-ours", is_flag=True, help="Measure the peers alone.")
@click.option(
    "--library", type=click.Path(dir_okay=False, path_type=Path), help="Our kernels; default: the built ones."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.001),
    default=0.2,
    show_default=True,
    help="Measure each figure for about this long.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True,
    help="Compile the peers in this many processes first.",
)  # fmt: skip
@click.option("--limit", type=click.FloatRange(min=1), help="Start no size later than after so many seconds.")
@click.option(
    "--buffers", "quoted", type=click.Choice(["single", "rotated"]),
    help="Which of the two figures to show and compare; both are measured. [default: single]",
)  # fmt: skip
@click.option(
    "--from",
    "record",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Measure nothing: draw this saved result. Needs no GPU.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the result: .svg or .png.",
)
@save_option
@output_options
def kernels(
    output: Output,
    phase: str,
    peers: tuple[str, ...],
    record: Path | None,
    quoted: Any,
    plot: Path | None,
    save: Path | None,
    **wanted: Any,
) -> None:
    """Measure the CUDA kernels beside flash-linear-attention, torch.compile and a copy of as many bytes.

    Everybody gets the same tensors and the same treatment: a check against float64 first, then medians of
    CUDA graph replays. What computes something else is not timed. Without options: the heads of four Pythia
    models, 1 to 256 rows, prompts of 512 to 8192 tokens. Peers that are not installed are left out.
    """
    from dijiang_engines.errors import ValidationMismatch
    from dijiang_export.bench.kernels import measure as bench_kernels
    from dijiang_export.bench.kernels.plot import check_plot, plot_kernels
    from dijiang_export.bench.kernels.tables import draw_kernels

    if plot is not None:
        check_plot(plot)  # before minutes of measuring
    if record is not None:
        result = bench_kernels.read_record(record)
        result = bench_kernels.requote(result, quoted) if quoted else result
    else:
        result = _measure_kernels(output, phase, peers, save, quoted=quoted or "single", **wanted)
    if plot is not None:
        plot_kernels(result, plot)
        output.log(f"drew {plot}")
    finish(output, result, save, lambda: draw_kernels(result))
    if wrong := bench_kernels.wrong(result):
        raise ValidationMismatch(
            "our kernels compute something else than the reference", got="; ".join(wrong[:3])
        )


def _measure_kernels(
    output: Output,
    phase: str,
    peers: tuple[str, ...],
    save: Path | None,
    *,
    shapes: tuple[str, ...],
    batches: tuple[int, ...],
    prompts: tuple[str, ...],
    dtype: Any,
    no_ours: bool,
    library: Path | None,
    seconds: float,
    jobs: int,
    limit: float | None,
    quoted: Any,
) -> dict[str, Any]:
    from dijiang_export.bench.kernels import cells as plan
    from dijiang_export.bench.kernels import measure as bench_kernels
    from dijiang_export.bench.kernels.tables import describe_cell

    cells = plan.plan_cells(
        [plan.parse_shape(s) for s in shapes] or plan.SHAPES,
        batches or plan.BATCHES,
        [plan.parse_prompt(p) for p in prompts] or plan.PROMPTS,
        ("decode", "prefill") if phase == "both" else (phase,),  # type: ignore[arg-type]
    )
    lab = bench_kernels.open_lab(peers or bench_kernels.PEER_NAMES, dtype, library=library, ours=not no_ours)

    def report(so_far: dict[str, Any]) -> None:
        output.log(f"{so_far['seconds']:6.1f} s  {describe_cell(so_far['cells'][-1])}")
        if save is not None:  # whoever stops it keeps what was measured
            save_json(so_far, save)

    return bench_kernels.measure_kernels(
        lab, cells, dtype=dtype, seconds=seconds, jobs=jobs, quoted=quoted, limit=limit,
        progress=output.progress, report=report,
    )  # fmt: skip
