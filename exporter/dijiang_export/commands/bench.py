"""`dijiang-export bench`: how fast a bundle or an engine runs here, and what exporting takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dijiang_export.commands.bench_kernels import kernels
from dijiang_export.commands.bench_peers import peers, report
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, output_options, runner_options
from dijiang_export.commands.saving import finish, save_option

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


_SHOWN = ("spinning", "prepack", "lowering")
"""Of a runner's settings, beside the figures; the record has all."""
BUSY = 0.7
"""A load average above which figures are not worth quoting: half a core is at work on something else."""


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
bench.add_command(report)

_SECONDS = click.option(
    "--seconds",
    type=click.FloatRange(min=0.01),
    default=2.0,
    show_default=True,
    help="Measure each figure for about this long.",
)


@bench.command(
    "run",
    short_help="Measure a bundle's speed: what `bench` does without a command.",
    epilog="Example: dijiang-export bench run ./pythia.bundle --threads 4 --json",
)
@click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
@runner_options
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Also measure PyTorch's reference model of this checkpoint, at the same number of threads.",
)
@_SECONDS
@click.option(
    "--length", "lengths", type=click.IntRange(min=1), multiple=True, help="Prefill lengths; may be repeated."
)
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Batch sizes; may be repeated."
)
@click.option(
    "--position", "positions", type=click.IntRange(min=0), multiple=True,
    help="Tokens before the steps; may be repeated. [default: 100, 100000]",
)  # fmt: skip
@save_option
@output_options
def run(
    output: Output,
    bundle: Path,
    runner: str,
    threads: int | None,
    spinning: str | None,
    prepack: str | None,
    checkpoint: Path | None,
    seconds: float,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    positions: tuple[int, ...],
    save: Path | None,
) -> None:
    """Measure the speed of BUNDLE on this machine (what `bench` does if no command is named)."""
    from dijiang_export.bench.bundle import measure_bundle

    result = measure_bundle(
        bundle,
        runner=runner,
        threads=threads,
        spinning=spinning,
        prepack=prepack,
        checkpoint=checkpoint,
        seconds=seconds,
        lengths=lengths or None,
        batches=batches or None,
        positions=positions or None,
        progress=output.progress,
    )
    finish(output, result, save, lambda: draw_run(result))


@bench.command(
    "export",
    short_help="Measure exporting a random checkpoint of a real shape.",
    epilog="Example: dijiang-export bench export --shape pythia-2.8b --save export.json",
)
@click.option("--shape", default="pythia-160m", show_default=True, help="pythia-70m .. pythia-6.9b.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float16",
    show_default=True,
    help="Of the bundle; the random checkpoint is float16.",
)
@click.option(
    "--cases", type=click.Choice(["none", "short", "full"]), default="short", show_default=True,
    help="Reference cases to record.",
)  # fmt: skip
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to make checkpoint and bundle, and leave them; default: a temporary folder.",
)
@click.option("--run", "and_run", is_flag=True, help="Then measure the bundle's speed, and PyTorch's.")
@_SECONDS
@click.option("--threads", type=click.IntRange(min=1), help="For --run; default: all cores.")
@save_option
@output_options
def export(
    output: Output,
    shape: str,
    dtype: str,
    cases: str,
    folder: Path | None,
    and_run: bool,
    seconds: float,
    threads: int | None,
    save: Path | None,
) -> None:
    """Measure the time and memory of exporting a random checkpoint of a real model's shape.

    Writes the checkpoint, copies it for comparison, exports it in a process of its own, and watches that
    process's memory. Needs PyTorch, and disk space for about four copies of the checkpoint.
    """
    import tempfile

    from dijiang_export.bench.bundle import about_run, measure_bundle
    from dijiang_export.bench.export import measure_export

    with tempfile.TemporaryDirectory(prefix="dijiang-bench-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        about = about_run()
        measured = measure_export(shape, place, dtype=dtype, cases=cases, progress=output.progress)
        result: dict[str, Any] = about | {"export": measured.to_json()}
        if and_run:
            result["run"] = measure_bundle(
                place / f"{shape}.bundle",
                threads=threads,
                checkpoint=place / "checkpoint",
                seconds=seconds,
                progress=output.progress,
            )
    finish(output, result, save, lambda: draw_export(result))


# -- for people ----------------------------------------------------------------------------------------


def draw_run(result: dict[str, Any]) -> Group:
    """The tables of one measured bundle."""
    from rich.console import Group
    from rich.text import Text

    model, found = result["model"], result["bench"]
    where = f"{result['threads']} threads, {result['machine']['cpu']}"
    if result["device"] != "cpu":
        where = ", ".join(gpu["name"] for gpu in result["machine"]["gpus"][:1]) or "a GPU"
    told = ", ".join(
        f"{name} {value}" for name, value in result.get("settings", {}).items() if name in _SHOWN
    )
    head = (
        f"{model['name']}: {model['parameters'] / 1e6:.1f} M parameters, {found['dtype']}\n"
        f"{found['runner']}, {where}{told and f'; {told}'}\n{result['validated']}"
    )
    parts: list[RenderableType] = [Text(head), _speed_table(result), _summary_table(result)]
    parts += [Text(f"note: {note}") for note in (*found["notes"], *_busy(result))]
    return Group(*parts)


def _busy(result: dict[str, Any]) -> list[str]:
    load = result["load_average"]
    if load <= BUSY:
        return []
    note = f"other processes kept this machine busy (load {load:.1f} before the start): measure again"
    if result.get("settings", {}).get("spinning") in ("auto", "on"):
        note += "; where that is how it is used, --spinning off may be much faster"
    return [note]


def draw_export(result: dict[str, Any]) -> Group:
    """The table of one measured export, and of its run if there was one."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    e = result["export"]
    table = Table(title=f"Export of {e['shape']} to {e['dtype']}, cases {e['cases']}", title_justify="left")
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("checkpoint, float16", f"{e['checkpoint_bytes'] / 1e9:.2f} GB"),
        ("bundle", f"{e['bundle_bytes'] / 1e9:.2f} GB"),
        ("copying the checkpoint", f"{e['copy_seconds']:.1f} s"),
        ("export, all", f"{e['export_seconds']:.1f} s"),
        ("export, without recording cases", f"{e['seconds_without_cases']:.1f} s ({e['copies']:.1f} copies)"),
        *((f"  of it {name}", f"{seconds:.1f} s") for name, seconds in e["parts"].items()),
        ("peak resident memory above torch", f"{e['rss_above'] / 1e6:.0f} MB"),
        ("peak proportional set above torch", f"{e['pss_above'] / 1e6:.0f} MB"),
        ("highest anonymous memory", f"{e['peak_anonymous'] / 1e6:.0f} MB"),
    ):
        table.add_row(name, value)
    parts: list[RenderableType] = [table, *(Text(f"note: {note}") for note in _busy(result))]
    return Group(*parts, *([draw_run(result["run"])] if "run" in result else []))


def _speed_table(result: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(title="Median time of one call", title_justify="left")
    for index, column in enumerate(("what", "time", "10% to 90%", "tokens/s", "PyTorch", "times faster")):
        table.add_column(column, justify="left" if index == 0 else "right")
    found, peers = result["bench"], result["reference"]
    for row in found["prefill"]:
        peer = None
        if peers is not None:
            same = [p for p in peers["prefill"] if p["length"] == row["length"] and p["form"] == "parallel"]
            peer = same[0]["timing"]["median"] if same and row["batch"] == 1 else None
        rows = "" if row["batch"] == 1 else f", {row['batch']} sequences"
        table.add_row(f"prefill of {row['length']} tokens{rows}", *_cells(row, peer))
    first = True
    for row in found["steps"]:
        peer = peers["step"]["median"] if peers is not None and row["batch"] == 1 and first else None
        first = False
        rows = "" if row["batch"] == 1 else f", {row['batch']} sequences"
        table.add_row(f"step at position {row['position']:,}{rows}", *_cells(row, peer))
        if row["gpu"] is not None:
            gpu = {"timing": row["gpu"], "tokens_per_second": row["batch"] / row["gpu"]["median"]}
            table.add_row(f"  of it on the GPU{rows}", *_cells(gpu, None))
    for row in found["loops"]:
        rows = "" if row["batch"] == 1 else f", {row['batch']} sequences"
        table.add_row(f"`generate`, a token from {row['position']:,} on{rows}", *_cells(row, None))
    return table


def _cells(row: dict[str, Any], peer: float | None) -> list[str]:
    timing = row["timing"]
    cells = [
        _time(timing["median"]),
        f"{_time(timing['low'])} to {_time(timing['high'])}",
        f"{row['tokens_per_second']:,.0f}"
        if row["tokens_per_second"] >= 100
        else f"{row['tokens_per_second']:.1f}",
    ]
    return [
        *cells,
        "-" if peer is None else _time(peer),
        "" if peer is None else f"{peer / timing['median']:.1f}",
    ]


def _summary_table(result: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    found = result["bench"]
    derived, bandwidth = found["derived"], found["bandwidth"]
    table = Table(title="What follows", title_justify="left")
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("step far from the beginning over near it", _ratio(derived["far_over_near"])),
        ("longest prefill, times faster than steps", _ratio(derived["prefill_over_steps"])),
        ("weights read by a step", f"{found['step_bytes'] / 1e6:.1f} MB"),
    ]
    for loop in found["loops"]:
        if loop["overhead"] is not None:
            name = f"`generate` beside the GPU's step, {loop['batch']} at {loop['position']:,}"
            rows.append((name, f"+{_time(loop['overhead'])}"))
    for kind, size in (found["memory"] or {}).items():
        rows.append((f"device memory, {kind}", f"{size / 1e6:,.1f} MB"))
    if bandwidth is not None:
        rows.append(("reading speed of this machine", f"{bandwidth['read'] / 1e9:.1f} GB/s"))
        if derived["bandwidth_share"] is not None:  # that of steps of one sequence, which may not be wanted
            rows.append(("of that, reached by steps", f"{100 * derived['bandwidth_share']:.0f}%"))
    startup = result["startup"]
    if startup is not None:
        rows.append(("`generate`, start to first text", f"{startup['first_output_seconds']:.2f} s"))
        rows.append(("`generate`, peak memory", f"{startup['peak_rss'] / 1e6:.0f} MB"))
    for row in rows:
        table.add_row(*row)
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
