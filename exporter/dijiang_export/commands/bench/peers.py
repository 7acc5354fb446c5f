"""`dijiang-export bench peers` and `bench report`: others, and everything side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from dijiang_export.commands.arguments import COUNT, FILE, PATH, Dtype, Save, one_of, takes
from dijiang_export.commands.common import Output, finish, save_json

if TYPE_CHECKING:
    from dijiang_export.bench.peers.measure import PeerResult
    from dijiang_export.bench.peers.settings import PeerSettings
    from dijiang_export.bench.random_checkpoint import Shape

DEFAULT_SHAPE = "pythia-160m"


@dataclass(frozen=True)
class ShapeArguments:
    """A model's shape by its name, and what is different."""

    name: Annotated[
        str | None,
        click.option(
            "--shape", "name", help="pythia-70m .. pythia-6.9b.  [default: pythia-160m, or --checkpoint]"
        ),
    ]
    layers: Annotated[int | None, click.option("--layers", type=COUNT, help="Instead of the shape's.")]
    hidden: Annotated[int | None, click.option("--hidden", type=COUNT, help="Instead of the shape's.")]
    heads: Annotated[int | None, click.option("--heads", type=COUNT, help="Instead of the shape's.")]
    intermediate: Annotated[
        int | None, click.option("--intermediate", type=COUNT, help="Instead of the shape's.")
    ]
    vocab: Annotated[int | None, click.option("--vocab", type=COUNT, help="Instead of the shape's.")]

    def shape(self) -> tuple[Shape, str]:
        """The shape, and what to call it.

        Raises:
            UsageError: there is none of that name.
        """
        from dijiang_engines.errors import UsageError
        from dijiang_export.bench.random_checkpoint import SHAPES

        name = self.name or DEFAULT_SHAPE
        if name not in SHAPES:
            raise UsageError(f"there is no shape {name!r}", expected=", ".join(SHAPES))
        changes = self.changes()
        words = [f"{key} {value}" for key, value in changes.items()]
        return replace(SHAPES[name], **changes), " ".join(
            [name, *([f"with {', '.join(words)}"] if words else [])]
        )

    def changes(self) -> dict[str, int]:
        """Sizes that were given, by their names."""
        sizes = {
            "layers": self.layers, "hidden": self.hidden, "heads": self.heads,
            "intermediate": self.intermediate, "vocab": self.vocab,
        }  # fmt: skip
        return {key: value for key, value in sizes.items() if value is not None}


@dataclass(frozen=True)
class BenchPeersArguments:
    """What `bench peers` is given."""

    shape: ShapeArguments
    checkpoint: Annotated[
        Path | None,
        click.option(
            "--checkpoint", type=PATH,
            help="Instead of a shape: the folder of a softmax model, GPT-NeoX, LLaMA or OPT, as `convert` "
            "takes it.",
        ),
    ]  # fmt: skip
    bundle: Annotated[
        Path | None,
        click.option("--bundle", type=PATH, help="Measure this bundle beside --checkpoint, on the CPU."),
    ]
    dtype: Annotated[
        Dtype | None,
        click.option(
            "--dtype", type=one_of(Dtype), help="[default: float16, or float32 with --checkpoint on a CPU]"
        ),
    ]
    device: Annotated[
        str | None,
        click.option("--device", help="Of PyTorch: cpu, cuda, cuda:1; default: cuda if there is one."),
    ]
    threads: Annotated[
        int | None, click.option("--threads", type=COUNT, help="On a CPU; default: all cores.")
    ]
    peers: Annotated[
        tuple[str, ...],
        click.option(
            "--peer", "peers", multiple=True, metavar="NAME", help="Only this one; may be repeated."
        ),
    ]
    batches: Annotated[
        tuple[int, ...],
        click.option(
            "--batch", "batches", type=COUNT, multiple=True, help="Rows; may be repeated. [default: 1]"
        ),
    ]
    contexts: Annotated[
        tuple[int, ...],
        click.option(
            "--context", "contexts", type=COUNT, multiple=True,
            help="Tokens before the steps; may be repeated. [default: 128, 512, 2048, 8192]",
        ),
    ]  # fmt: skip
    lengths: Annotated[
        tuple[int, ...],
        click.option(
            "--length", "lengths", type=COUNT, multiple=True,
            help="Prefill lengths; may be repeated. [default: 512, 2048, 8192]",
        ),
    ]  # fmt: skip
    no_prefill: Annotated[bool, click.option("--no-prefill", is_flag=True, help="Measure decoding only.")]
    no_decode: Annotated[bool, click.option("--no-decode", is_flag=True, help="Measure prefills only.")]
    seconds: Annotated[
        float,
        click.option(
            "--seconds", type=click.FloatRange(min=0.001), default=2.0, show_default=True,
            help="Measure each figure for about this long.",
        ),
    ]  # fmt: skip
    limit: Annotated[
        float,
        click.option(
            "--limit", type=click.FloatRange(min=1), default=300.0, show_default=True,
            help="Most seconds for each peer, compilation included; what it has by then counts.",
        ),
    ]  # fmt: skip
    rounds: Annotated[
        int,
        click.option(
            "--rounds", type=COUNT, default=1, show_default=True,
            help="Turns of every peer, whose calls are pooled: what else the machine does hits all alike.",
        ),
    ]  # fmt: skip
    backend: Annotated[
        str, click.option("--backend", default="inductor", show_default=True, help="Of torch.compile.")
    ]
    save: Save

    def settings(self) -> tuple[PeerSettings, str]:
        """What is asked of each peer, and what to call the model.

        Raises:
            UsageError: options that exclude each other, or there is no shape of that name.
            CheckpointError: the checkpoint is not of a family that `convert` takes.
        """
        from dijiang_engines.machine import find_gpus, usable_cpus
        from dijiang_export.bench.peers.settings import BATCHES, CONTEXTS, LENGTHS, PeerSettings

        shape, label = self.shape.shape() if self.checkpoint is None else self._sizes(self.checkpoint)
        device = self.device or ("cuda" if find_gpus() else "cpu")
        usual = "float32" if self.checkpoint is not None and device == "cpu" else "float16"
        settings = PeerSettings(
            shape, self.dtype or usual, device, self.threads or usable_cpus(),
            self.batches or BATCHES,
            () if self.no_decode else self.contexts or CONTEXTS,
            () if self.no_prefill else self.lengths or LENGTHS,
            self.seconds, self.backend,
            None if self.checkpoint is None else str(self.checkpoint),
            None if self.bundle is None else str(self.bundle),
        )  # fmt: skip
        return settings, label

    def _sizes(self, checkpoint: Path) -> tuple[Shape, str]:
        from dijiang_engines.errors import UsageError
        from dijiang_export.bench.peers.settings import read_spec, shape_of

        given = [*([] if self.shape.name is None else ["shape"]), *self.shape.changes()]
        if given:
            raise UsageError(f"--checkpoint has sizes of its own: leave out --{given[0]}")
        return shape_of(read_spec(checkpoint)), checkpoint.resolve().name


@click.command(
    "peers",
    short_help="Measure transformers and the PyTorch reference at a model's shape (needs PyTorch).",
    epilog="Example: dijiang-export bench peers --shape pythia-410m --dtype float16 --save peers.json",
)
@takes(BenchPeersArguments)
def peers(output: Output, given: BenchPeersArguments) -> None:
    """Measure how fast others run a model of the same shape, with random weights or those of a checkpoint.

    hf-eager, hf-compiled and hf-graph are transformers' GPT-NeoX with softmax attention and a KV cache: as
    it comes, through torch.compile with a static cache, and that in one CUDA graph. dijiang-eager,
    dijiang-compiled and dijiang-graph are the PyTorch reference model. Each runs in a process of its own;
    one that fails is reported and stops nobody.

    With --checkpoint it is the softmax model of that folder that is measured: transformers' four ways
    (hf-static: a static cache, nothing compiled), ort-genai (onnxruntime-genai, if it is installed, on the
    graph of its own builder) and, with --bundle, dijiang-bundle. Memory of each process comes with it.
    """
    from dijiang_export.bench.report.report import make_report
    from dijiang_export.bench.report.tables import draw_report

    result = _measure(given, output)
    finish(output, result, given.save, lambda: draw_report(make_report([result])))


def _measure(given: BenchPeersArguments, output: Output) -> dict[str, Any]:
    """The document of all peers' results; what there is of it so far is saved after each."""
    from dijiang_engines.errors import UsageError
    from dijiang_export.bench.about import about_run
    from dijiang_export.bench.peers.measure import measure_peers, peers_document

    if given.no_prefill and given.no_decode:
        raise UsageError("--no-prefill and --no-decode leave nothing to measure")
    if given.bundle is not None and given.checkpoint is None:
        raise UsageError(
            "--bundle is measured beside a checkpoint", hint="give --checkpoint, or use `bench run`"
        )
    settings, label = given.settings()
    about = about_run()

    def document(results: Sequence[PeerResult]) -> dict[str, Any]:
        return about | peers_document(settings, label, results)

    def report(results: Sequence[PeerResult]) -> None:
        last = results[-1]
        count = len(last.decode) + len(last.prefill)
        complaint = "" if last.error is None else f" ({last.error})"
        output.log(f"{last.name}: {count} figures in {last.seconds:.0f} s{complaint}")
        if given.save is not None:  # whoever stops it keeps what was measured
            save_json(document(results), given.save)

    return document(
        measure_peers(
            settings,
            given.peers or None,
            limit=given.limit,
            rounds=given.rounds,
            progress=output.progress,
            report=report,
        )
    )


@dataclass(frozen=True)
class BenchReportArguments:
    """What `bench report` is given."""

    records: Annotated[tuple[Path, ...], click.argument("records", nargs=-1, required=True, type=FILE)]
    plot: Annotated[
        Path | None,
        click.option("--plot", type=FILE, help="Draw the time per token over the context: a name in .svg."),
    ]
    plot_batch: Annotated[
        int | None,
        click.option("--plot-batch", type=COUNT, help="Rows of the picture; default: the fewest measured."),
    ]
    save: Save


@click.command(
    "report",
    short_help="Put saved records of `bench run` and `bench peers` side by side.",
    epilog="Example: dijiang-export bench report engine.json peers.json --plot speed.svg",
)
@takes(BenchReportArguments)
def report(output: Output, given: BenchReportArguments) -> None:
    """Compare RECORDS, which `bench run` and `bench peers` saved, with each other and with their floors.

    The first runner's loop is what others are compared with. Needs neither PyTorch nor any runtime. A
    result saved here can be given as a record again.
    """
    from dijiang_export.bench.report.plot import check_plot, plot_report
    from dijiang_export.bench.report.report import make_report, read_records
    from dijiang_export.bench.report.tables import draw_report

    if given.plot is not None:
        check_plot(given.plot)
    made = make_report(read_records(given.records))
    if given.plot is not None:
        plot_report(made, given.plot, batch=given.plot_batch)
        output.log(f"drew {given.plot}")
    finish(output, made.to_json(), given.save, lambda: draw_report(made))
