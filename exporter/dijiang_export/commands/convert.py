"""`dijiang-export convert`: a vanilla checkpoint becomes a DiJiang one."""

from __future__ import annotations

from pathlib import Path

import click

from dijiang_export.commands.common import Output, one_output, output_options


@click.command(epilog="Example: dijiang-export convert ./pythia-160m ./pythia-160m-dijiang --dtype float16")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output_folder", metavar="OUTPUT", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", "named_output", type=click.Path(path_type=Path), help="OUTPUT, as an option.")
@click.option(
    "--sampling",
    type=click.Choice(["sobol", "monte-carlo"]),
    default="sobol",
    show_default=True,
    help="How the projections' weights are drawn: scrambled Sobol points (the paper's quasi-Monte Carlo), "
    "or independent ones (the official code).",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is drawn."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Store weights in this type.  [default: as in SOURCE]  Decay tables are always float32.",
)
@click.option(
    "--max-shard-size",
    "max_shard_gigabytes",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    metavar="GB",
    help="Split weights into files of at most so many gigabytes.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
@output_options
def convert(
    output: Output,
    source: Path,
    output_folder: Path | None,
    named_output: Path | None,
    sampling: str,
    seed: int,
    dtype: str | None,
    max_shard_gigabytes: float,
    force: bool,
) -> None:
    """Turn SOURCE, a vanilla GPT-NeoX, LLaMA or OPT checkpoint, into a DiJiang checkpoint OUTPUT.

    Both are Hugging Face folders. All weights are kept; every attention layer gets the parameters that
    DiJiang adds, as the official code initialises them. The result generates text only after fine-tuning.
    """
    from dijiang_engines.errors import UsageError
    from dijiang_export.convert import convert_checkpoint

    target = one_output(output_folder, named_output, "OUTPUT")
    if target is None:
        raise UsageError("no OUTPUT is given", hint="dijiang-export convert SOURCE OUTPUT")
    report = convert_checkpoint(
        source,
        target,
        sampling=sampling,  # type: ignore[arg-type]  # click.Choice
        seed=seed,
        dtype=dtype,
        max_shard_bytes=max(1, int(max_shard_gigabytes * 1e9)),
        force=force,
        progress=output.progress,
    )
    for note in report.notes:
        output.log(note)

    def describe() -> str:
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

    output.print_result(report, describe)
