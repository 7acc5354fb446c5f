"""`dijiang-export bench peers` and `bench report`: others, and everything side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dijiang_export.commands.common import Output, output_options
from dijiang_export.commands.saving import finish, save_json, save_option

_SIZE = click.IntRange(min=1)


@click.command(
    "peers",
    short_help="Measure transformers and the PyTorch reference at a model's shape (needs PyTorch).",
    epilog="Example: dijiang-export bench peers --shape pythia-410m --dtype float16 --save peers.json",
)
@click.option("--shape", default="pythia-160m", show_default=True, help="pythia-70m .. pythia-6.9b.")
@click.option("--layers", type=_SIZE, help="Instead of the shape's.")
@click.option("--hidden", type=_SIZE, help="Instead of the shape's.")
@click.option("--heads", type=_SIZE, help="Instead of the shape's.")
@click.option("--intermediate", type=_SIZE, help="Instead of the shape's.")
@click.option("--vocab", type=_SIZE, help="Instead of the shape's.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float16", show_default=True
)
@click.option("--device", help="Of PyTorch: cpu, cuda, cuda:1; default: cuda if there is one.")
@click.option("--threads", type=_SIZE, help="On a CPU; default: all cores.")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--batch", "batches", type=_SIZE, multiple=True, help="Rows; may be repeated. [default: 1]")
@click.option(
    "--context", "contexts", type=_SIZE, multiple=True,
    help="Tokens before the steps; may be repeated. [default: 128, 512, 2048, 8192]",
)  # fmt: skip
@click.option(
    "--length", "lengths", type=_SIZE, multiple=True,
    help="Prefill lengths; may be repeated. [default: 512, 2048, 8192]",
)  # fmt: skip
@click.option("--no-prefill", is_flag=True, help="Measure decoding only.")
@click.option("--no-decode", is_flag=True, help="Measure prefills only.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.001), default=2.0, show_default=True,
    help="Measure each figure for about this long.",
)  # fmt: skip
@click.option(
    "--limit", type=click.FloatRange(min=1), default=300.0, show_default=True,
    help="Most seconds for each peer, compilation included; what it has by then counts.",
)  # fmt: skip
@click.option("--backend", default="inductor", show_default=True, help="Of torch.compile.")
@save_option
@output_options
def peers(
    output: Output, shape: str, dtype: str, device: str | None, threads: int | None, peers: tuple[str, ...],
    batches: tuple[int, ...], contexts: tuple[int, ...], lengths: tuple[int, ...], no_prefill: bool,
    no_decode: bool, seconds: float, limit: float, backend: str, save: Path | None, **sizes: int | None,
) -> None:  # fmt: skip
    """Measure how fast others run a model of the same shape, with random weights.

    hf-eager, hf-compiled and hf-graph are transformers' GPT-NeoX with softmax attention and a KV cache: as
    it comes, through torch.compile with a static cache, and that in one CUDA graph. dijiang-eager,
    dijiang-compiled and dijiang-graph are the PyTorch reference model. Each runs in a process of its own;
    one that fails is reported and stops nobody.
    """
    from dijiang_engines.errors import UsageError
    from dijiang_engines.machine import find_gpus, usable_cpus
    from dijiang_export.bench.bundle import about_run
    from dijiang_export.bench.peers import settings as bench_peers
    from dijiang_export.bench.report.report import make_report
    from dijiang_export.bench.report.tables import draw_report

    if no_prefill and no_decode:
        raise UsageError("--no-prefill and --no-decode leave nothing to measure")
    chosen, label = _shape(shape, sizes)
    plan = bench_peers.Plan(
        chosen, dtype, device or ("cuda" if find_gpus() else "cpu"), threads or usable_cpus(),
        batches or bench_peers.BATCHES,
        () if no_decode else contexts or bench_peers.CONTEXTS,
        () if no_prefill else lengths or bench_peers.LENGTHS,
        seconds, backend,
    )  # fmt: skip
    about = about_run()

    def document(results: Sequence[bench_peers.PeerResult]) -> dict[str, Any]:
        return about | bench_peers.peers_document(plan, label, results)

    def report(results: Sequence[bench_peers.PeerResult]) -> None:
        last = results[-1]
        count = len(last.decode) + len(last.prefill)
        output.log(f"{last.name}: {count} figures in {last.seconds:.0f} s" + _complaint(last.error))
        if save is not None:  # whoever stops it keeps what was measured
            save_json(document(results), save)

    found = bench_peers.measure_peers(
        plan, peers or bench_peers.PEERS, limit=limit, progress=output.progress, report=report
    )
    result = document(found)
    finish(output, result, save, lambda: draw_report(make_report([result])))


def _complaint(error: str | None) -> str:
    return "" if error is None else f" ({error})"


def _shape(name: str, sizes: dict[str, int | None]) -> tuple[Any, str]:
    """The shape of that name with some sizes replaced, and what to call it."""
    from dataclasses import replace

    from dijiang_engines.errors import UsageError
    from dijiang_export.bench.random_checkpoint import SHAPES

    if name not in SHAPES:
        raise UsageError(f"there is no shape {name!r}", expected=", ".join(SHAPES))
    changes: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    words = [f"{key} {value}" for key, value in changes.items()]
    return replace(SHAPES[name], **changes), " ".join(
        [name, *([f"with {', '.join(words)}"] if words else [])]
    )


@click.command(
    "report",
    short_help="Put saved records of `bench run` and `bench peers` side by side.",
    epilog="Example: dijiang-export bench report engine.json peers.json --plot speed.svg",
)
@click.argument("records", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the time per token over the context: a name in .svg.",
)
@click.option("--plot-batch", type=_SIZE, help="Rows of the picture; default: the fewest measured.")
@save_option
@output_options
def report(
    output: Output, records: tuple[Path, ...], plot: Path | None, plot_batch: int | None, save: Path | None
) -> None:
    """Compare RECORDS, which `bench run` and `bench peers` saved, with each other and with their floors.

    The first runner's loop is what others are compared with. Needs neither PyTorch nor any runtime. A
    result saved here can be given as a record again.
    """
    from dijiang_export.bench.report.plot import check_plot, plot_report
    from dijiang_export.bench.report.report import make_report, read_records
    from dijiang_export.bench.report.tables import draw_report

    if plot is not None:
        check_plot(plot)
    made = make_report(read_records(records))
    if plot is not None:
        plot_report(made, plot, batch=plot_batch)
        output.log(f"drew {plot}")
    finish(output, made.to_json(), save, lambda: draw_report(made))
