"""`dijiang-export convert`: a vanilla checkpoint becomes a DiJiang one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from dijiang_export.commands.arguments import PATH, Dtype, one_of, takes
from dijiang_export.commands.common import Output, one_output

if TYPE_CHECKING:
    from dijiang_export.convert import ConvertReport

Sampling = Literal["sobol", "monte-carlo"]


@dataclass(frozen=True)
class ConvertArguments:
    """What `convert` is given."""

    source: Annotated[Path, click.argument("source", type=PATH)]
    output_folder: Annotated[
        Path | None, click.argument("output_folder", metavar="OUTPUT", type=PATH, required=False)
    ]
    named_output: Annotated[
        Path | None, click.option("-o", "--output", "named_output", type=PATH, help="OUTPUT, as an option.")
    ]
    sampling: Annotated[
        Sampling,
        click.option(
            "--sampling", type=one_of(Sampling), default="sobol", show_default=True,
            help="How the projections' weights are drawn: scrambled Sobol points (the paper's quasi-Monte "
            "Carlo), or independent ones (the official code).",
        ),
    ]  # fmt: skip
    seed: Annotated[
        int,
        click.option(
            "--seed", type=click.IntRange(min=0), default=0, show_default=True,
            help="Of everything that is drawn.",
        ),
    ]  # fmt: skip
    dtype: Annotated[
        Dtype | None,
        click.option(
            "--dtype", type=one_of(Dtype),
            help="Store weights in this type.  [default: as in SOURCE]  Decay tables are always float32.",
        ),
    ]  # fmt: skip
    max_shard_gigabytes: Annotated[
        float,
        click.option(
            "--max-shard-size", "max_shard_gigabytes", type=click.FloatRange(min=0, min_open=True),
            default=5.0, show_default=True, metavar="GB",
            help="Split weights into files of at most so many gigabytes.",
        ),
    ]  # fmt: skip
    force: Annotated[bool, click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")]

    def target(self) -> Path:
        """The folder to write.

        Raises:
            UsageError: it was given twice, or not at all.
        """
        from dijiang_engines.errors import UsageError

        target = one_output(self.output_folder, self.named_output, "OUTPUT")
        if target is None:
            raise UsageError("no OUTPUT is given", hint="dijiang-export convert SOURCE OUTPUT")
        return target


@click.command(epilog="Example: dijiang-export convert ./pythia-160m ./pythia-160m-dijiang --dtype float16")
@takes(ConvertArguments)
def convert(output: Output, given: ConvertArguments) -> None:
    """Turn SOURCE, a vanilla GPT-NeoX, LLaMA or OPT checkpoint, into a DiJiang checkpoint OUTPUT.

    Both are Hugging Face folders. All weights are kept; every attention layer gets the parameters that
    DiJiang adds, as the official code initialises them. The result generates text only after fine-tuning.
    """
    from dijiang_export.convert import convert_checkpoint

    report = convert_checkpoint(
        given.source,
        given.target(),
        sampling=given.sampling,
        seed=given.seed,
        dtype=given.dtype,
        max_shard_bytes=max(1, int(given.max_shard_gigabytes * 1e9)),
        force=given.force,
        progress=output.progress,
    )
    for note in report.notes:
        output.log(note)
    output.print_result(report, lambda: _describe(report))


def _describe(report: ConvertReport) -> str:
    return "\n".join(
        [
            f"{report.output}: {report.family}, {report.num_layers} layers of "
            f"{report.num_heads}×{report.head_dim}, {report.dtype}, {report.bytes / 1e6:.1f} MB, "
            f"{report.seconds:.1f} s",
            f"{report.parameters:,} parameters, of which DiJiang added {report.added_parameters:,} "
            f"({report.sampling}, seed {report.seed})",
            f"next: fine-tune it, then dijiang-export to-onnx {report.output}",
        ]
    )
