"""`dijiang-export to-onnx`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, one_output, output_options


@click.command(
    "to-onnx",
    epilog="Example: dijiang-export to-onnx ./pythia-410m-dijiang ./pythia.bundle --dtype float16",
)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("-o", "--output", "named_output", type=click.Path(path_type=Path), help="BUNDLE, as an option.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of weights and activations. State, attention arithmetic and logits are float32 in all.",
)
@click.option(
    "--logits",
    type=click.Choice(["last", "all"]),
    default="last",
    show_default=True,
    help="Logits of each row's last token, or of all tokens (for perplexity).",
)
@click.option(
    "--cases",
    type=click.Choice(["none", "short", "full"]),
    default="short",
    show_default=True,
    help="Reference cases to record for `validate`: short ones; full adds several chunks and 10,000 tokens.",
)
@click.option(
    "--max-positions",
    type=click.IntRange(min=1),
    help="Keep only so many rows of trained decay tables.",
)
@click.option(
    "--extend-decay",
    is_flag=True,
    help="Let trained decay tables go on past their last row instead of stopping there.",
)
@click.option(
    "--variant",
    "variants",
    type=click.Choice(["ort", "capture"]),
    multiple=True,
    help="Add graphs for ONNX Runtime on CUDA: with its own operator, or a step that CUDA graphs can hold.",
)
@click.option("--force", is_flag=True, help="Replace BUNDLE if it exists.")
@output_options
def to_onnx(
    output: Output,
    checkpoint: Path | None,
    bundle: Path | None,
    named_output: Path | None,
    dtype: str,
    logits: str,
    cases: str,
    max_positions: int | None,
    extend_decay: bool,
    variants: tuple[str, ...],
    force: bool,
) -> None:
    """Export a DiJiang CHECKPOINT folder to a BUNDLE of ONNX graphs.

    The bundle holds a prefill and a step graph in standard ONNX operators, the same two for TensorRT's
    plugin, one file of weights, recorded reference cases and the tokenizer. Without CHECKPOINT, exports
    the trained sample model to ./tiny-stdlib.bundle.
    """
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.export.to_onnx import export_bundle

    bundle = one_output(bundle, named_output, "BUNDLE")
    source = checkpoint or sample_checkpoint()
    target = bundle or Path(DEFAULT_BUNDLE if checkpoint is None else f"{source.resolve().name}.bundle")
    report = export_bundle(
        source,
        target,
        dtype=dtype,
        logits=logits,  # type: ignore[arg-type]  # click.Choice
        cases=cases,  # type: ignore[arg-type]
        max_positions=max_positions,
        extend_decay=extend_decay,
        variants=variants,
        force=force,
        progress=output.progress,
    )
    for note in report.notes:
        output.log(note)

    def describe() -> str:
        spec = report.spec
        seconds = sum(report.seconds.values())
        lines = [
            f"{report.path}: {spec.family}, {spec.num_layers} layers of {spec.num_heads}×{spec.head_dim}, "
            f"{report.dtype}, {report.weights_bytes / 1e6:.1f} MB of weights, {seconds:.1f} s",
            f"state: {spec.state_bytes / 1e6:.2f} MB per sequence, whatever its length",
            f"next: dijiang-export validate {target}",
        ]
        return "\n".join(lines)

    output.print_result(
        {
            "bundle": report.path,
            "spec": report.spec.to_json(),
            "dtype": report.dtype,
            "logits": report.logits,
            "weights_bytes": report.weights_bytes,
            "cases": report.cases,
            "notes": report.notes,
            "seconds": report.seconds,
        },
        describe,
    )
