"""`dijiang-export bench`: how fast a bundle or an engine runs here, and what exporting takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from dijiang_export.commands.arguments import (
    COUNT,
    PATH,
    BundleOrDefault,
    Cases,
    Dtype,
    RunnerArguments,
    Save,
    one_of,
    takes,
)
from dijiang_export.commands.bench.kernels import kernels
from dijiang_export.commands.bench.peers import peers, report
from dijiang_export.commands.bench.products import products
from dijiang_export.commands.bench.sampling import sampling
from dijiang_export.commands.bench.serve import serve
from dijiang_export.commands.bench.step import step
from dijiang_export.commands.common import Output, finish

Seconds = Annotated[
    float,
    click.option(
        "--seconds", type=click.FloatRange(min=0.01), default=2.0, show_default=True,
        help="Measure each figure for about this long.",
    ),
]  # fmt: skip


class DefaultGroup(click.Group):
    """A group whose first command is meant where none is named: `bench BUNDLE` is `bench run BUNDLE`."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command unless a command or `--help` comes first."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's options, then the commands."""
        click.Command.format_options(self.commands[self.default], ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    "bench",
    cls=DefaultGroup,
    subcommand_metavar="[BUNDLE] | COMMAND",
    epilog="Example: dijiang-export bench ./pythia.bundle --checkpoint ./pythia-dijiang --save bench.json",
)
def bench() -> None:
    """Measure the speed of BUNDLE on this machine; the commands below measure something else.

    BUNDLE is a bundle, or an engine that `build-engine` made; default: ./tiny-stdlib.bundle. It is first
    validated, so that no figure is of wrong results. Then: prefills of 128, 512 and 2048 tokens, steps and
    the loop of `generate` at positions 100 and 100,000, batches, the share of this machine's memory
    bandwidth, and the time to the first text of `generate`. With --checkpoint also the PyTorch reference
    model at the same number of threads.
    """


bench.add_command(kernels)
bench.add_command(peers)
bench.add_command(products)
bench.add_command(report)
bench.add_command(sampling)
bench.add_command(serve)
bench.add_command(step)


@dataclass(frozen=True)
class BenchRunArguments:
    """What `bench run` is given."""

    bundle: BundleOrDefault
    runner: RunnerArguments
    checkpoint: Annotated[
        Path | None,
        click.option(
            "--checkpoint", type=PATH,
            help="Also measure PyTorch's reference model of this checkpoint, at the same number of threads.",
        ),
    ]  # fmt: skip
    seconds: Seconds
    lengths: Annotated[
        tuple[int, ...],
        click.option(
            "--length", "lengths", type=COUNT, multiple=True, help="Prefill lengths; may be repeated."
        ),
    ]
    batches: Annotated[
        tuple[int, ...],
        click.option("--batch", "batches", type=COUNT, multiple=True, help="Batch sizes; may be repeated."),
    ]
    positions: Annotated[
        tuple[int, ...],
        click.option(
            "--position", "positions", type=click.IntRange(min=0), multiple=True,
            help="Tokens before the steps; may be repeated. [default: 100, 100000]",
        ),
    ]  # fmt: skip
    save: Save


@bench.command(
    "run",
    short_help="Measure a bundle's speed: what `bench` does without a command.",
    epilog="Example: dijiang-export bench run ./pythia.bundle --threads 4 --json",
)
@takes(BenchRunArguments)
def run(output: Output, given: BenchRunArguments) -> None:
    """Measure the speed of BUNDLE on this machine (what `bench` does if no command is named)."""
    from dijiang_export.bench.bundle import measure_bundle
    from dijiang_export.bench.tables import draw_run

    result = measure_bundle(
        given.bundle,
        runner=given.runner.runner,
        threads=given.runner.threads,
        spinning=given.runner.spinning,
        prepack=given.runner.prepack,
        checkpoint=given.checkpoint,
        seconds=given.seconds,
        lengths=given.lengths or None,
        batches=given.batches or None,
        positions=given.positions or None,
        progress=output.progress,
    )
    finish(output, result, given.save, lambda: draw_run(result))


@dataclass(frozen=True)
class BenchExportArguments:
    """What `bench export` is given."""

    shape: Annotated[
        str,
        click.option("--shape", default="pythia-160m", show_default=True, help="pythia-70m .. pythia-6.9b."),
    ]
    dtype: Annotated[
        Dtype,
        click.option(
            "--dtype", type=one_of(Dtype), default="float16", show_default=True,
            help="Of the bundle; the random checkpoint is float16.",
        ),
    ]  # fmt: skip
    cases: Annotated[
        Cases,
        click.option(
            "--cases", type=one_of(Cases), default="short", show_default=True,
            help="Reference cases to record.",
        ),
    ]  # fmt: skip
    folder: Annotated[
        Path | None,
        click.option(
            "--folder", type=click.Path(file_okay=False, path_type=Path),
            help="Where to make checkpoint and bundle, and leave them; default: a temporary folder.",
        ),
    ]  # fmt: skip
    and_run: Annotated[
        bool,
        click.option(
            "--run", "and_run", is_flag=True, help="Then measure the bundle's speed, and PyTorch's."
        ),
    ]
    seconds: Seconds
    threads: Annotated[
        int | None, click.option("--threads", type=COUNT, help="For --run; default: all cores.")
    ]
    save: Save


@bench.command(
    "export",
    short_help="Measure exporting a random checkpoint of a real shape.",
    epilog="Example: dijiang-export bench export --shape pythia-2.8b --save export.json",
)
@takes(BenchExportArguments)
def export(output: Output, given: BenchExportArguments) -> None:
    """Measure the time and memory of exporting a random checkpoint of a real model's shape.

    Writes the checkpoint, copies it for comparison, exports it in a process of its own, and watches that
    process's memory. Needs PyTorch, and disk space for about four copies of the checkpoint.
    """
    from dijiang_export.bench.tables import draw_export

    result = _export(given, output)
    finish(output, result, given.save, lambda: draw_export(result))


def _export(given: BenchExportArguments, output: Output) -> dict[str, Any]:
    """The document of an export, with that of the bundle's run if it was asked for."""
    import tempfile

    from dijiang_export.bench.about import about_run
    from dijiang_export.bench.bundle import measure_bundle
    from dijiang_export.bench.export import measure_export

    with tempfile.TemporaryDirectory(prefix="dijiang-bench-") as temporary:
        place = given.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        about = about_run()
        measured = measure_export(
            given.shape, place, dtype=given.dtype, cases=given.cases, progress=output.progress
        )
        result: dict[str, Any] = about | {"export": measured.to_json()}
        if given.and_run:
            result["run"] = measure_bundle(
                place / f"{given.shape}.bundle",
                threads=given.threads,
                checkpoint=place / "checkpoint",
                seconds=given.seconds,
                progress=output.progress,
            )
    return result
