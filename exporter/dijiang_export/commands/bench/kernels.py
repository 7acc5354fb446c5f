"""`dijiang-export bench kernels`: the CUDA kernels beside other implementations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import click

from dijiang_export.commands.arguments import (
    COUNT,
    FILE,
    Dtype,
    KernelLibrary,
    KernelSeconds,
    Save,
    one_of,
    takes,
)
from dijiang_export.commands.common import Output, finish, save_json

Phase = Literal["decode", "prefill"]
PhaseOrBoth = Literal["decode", "prefill", "both"]
Peer = Literal["fla", "fla-phi", "torch-compile", "copy"]
Buffers = Literal["single", "rotated"]


@dataclass(frozen=True)
class BenchKernelsArguments:
    """What `bench kernels` is given."""

    shapes: Annotated[
        tuple[str, ...],
        click.option("--shape", "shapes", multiple=True, metavar="HxD", help="Heads, repeatable."),
    ]
    phase: Annotated[
        PhaseOrBoth, click.option("--phase", type=one_of(PhaseOrBoth), default="both", show_default=True)
    ]
    batches: Annotated[
        tuple[int, ...],
        click.option(
            "--batch", "batches", type=COUNT, multiple=True, help="Rows of decode steps, repeatable."
        ),
    ]
    prompts: Annotated[
        tuple[str, ...],
        click.option(
            "--prompt", "prompts", multiple=True, metavar="[Bx]L",
            help="Rows and length of prefills, such as 8x2048; repeatable.",
        ),
    ]  # fmt: skip
    dtype: Annotated[
        Dtype,
        click.option(
            "--dtype", type=one_of(Dtype), default="float16", show_default=True,
            help="Of queries, keys, values, gate and output; the state is always float32.",
        ),
    ]  # fmt: skip
    peers: Annotated[
        tuple[Peer, ...],
        click.option(
            "--peer", "peers", type=one_of(Peer), multiple=True,
            help="Measure only this one beside ours; repeatable.",
        ),
    ]  # fmt: skip
    no_ours: Annotated[bool, click.option("--no-ours", is_flag=True, help="Measure the peers alone.")]
    library: KernelLibrary
    seconds: KernelSeconds
    jobs: Annotated[
        int,
        click.option(
            "--jobs", type=COUNT, default=1, show_default=True,
            help="Compile the peers in this many processes first.",
        ),
    ]  # fmt: skip
    limit: Annotated[
        float | None,
        click.option(
            "--limit", type=click.FloatRange(min=1), help="Start no size later than after so many seconds."
        ),
    ]
    quoted: Annotated[
        Buffers | None,
        click.option(
            "--buffers", "quoted", type=one_of(Buffers),
            help="Which of the two figures to show and compare; both are measured. [default: single]",
        ),
    ]  # fmt: skip
    record: Annotated[
        Path | None,
        click.option(
            "--from", "record", type=FILE, help="Measure nothing: draw this saved result. Needs no GPU."
        ),
    ]
    plot: Annotated[Path | None, click.option("--plot", type=FILE, help="Draw the result: .svg or .png.")]
    save: Save

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One, or both."""
        return ("decode", "prefill") if self.phase == "both" else (self.phase,)


@click.command(
    "kernels",
    short_help="Measure the CUDA kernels beside other implementations (needs an NVIDIA GPU).",
    epilog="Example: dijiang-export bench kernels --shape 32x128 --save kernels.json --plot kernels.svg",
)
@takes(BenchKernelsArguments)
def kernels(output: Output, given: BenchKernelsArguments) -> None:
    """Measure the CUDA kernels beside flash-linear-attention, torch.compile and a copy of as many bytes.

    Everybody gets the same tensors and the same treatment: a check against float64 first, then medians of
    CUDA graph replays. What computes something else is not timed. Without options: the heads of four Pythia
    models, 1 to 256 rows, prompts of 512 to 8192 tokens. Peers that are not installed are left out.
    """
    from dijiang_engines.errors import ValidationMismatch
    from dijiang_export.bench.kernels.plot import check_plot, plot_kernels
    from dijiang_export.bench.kernels.record import wrong
    from dijiang_export.bench.kernels.tables import draw_kernels

    if given.plot is not None:
        check_plot(given.plot)  # before minutes of measuring
    result = _measure(given, output) if given.record is None else _read(given, given.record)
    if given.plot is not None:
        plot_kernels(result, given.plot)
        output.log(f"drew {given.plot}")
    finish(output, result, given.save, lambda: draw_kernels(result))
    if differences := wrong(result):
        raise ValidationMismatch(
            "our kernels compute something else than the reference", got="; ".join(differences[:3])
        )


def _read(given: BenchKernelsArguments, record: Path) -> dict[str, Any]:
    from dijiang_export.bench.kernels.record import read_record, requote

    result = read_record(record)
    return result if given.quoted is None else requote(result, given.quoted)


def _measure(given: BenchKernelsArguments, output: Output) -> dict[str, Any]:
    from dijiang_export.bench.kernels import cells, measure
    from dijiang_export.bench.kernels.tables import describe_cell

    wanted = cells.make_cells(
        [cells.parse_shape(s) for s in given.shapes] or cells.SHAPES,
        given.batches or cells.BATCHES,
        [cells.parse_prompt(p) for p in given.prompts] or cells.PROMPTS,
        given.phases,
    )
    lab = measure.open_lab(
        given.peers or measure.PEER_NAMES, given.dtype, library=given.library, ours=not given.no_ours
    )

    def report(so_far: dict[str, Any]) -> None:
        output.log(f"{so_far['seconds']:6.1f} s  {describe_cell(so_far['cells'][-1])}")
        if given.save is not None:  # whoever stops it keeps what was measured
            save_json(so_far, given.save)

    return measure.measure_kernels(
        lab, wanted, dtype=given.dtype, seconds=given.seconds, jobs=given.jobs,
        quoted=given.quoted or "single", limit=given.limit, progress=output.progress, report=report,
    )  # fmt: skip
