"""`dijiang-export to-onnx`: a checkpoint becomes a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from dijiang_export.commands.arguments import COUNT, PATH, Cases, Dtype, one_of, takes
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, one_output

if TYPE_CHECKING:
    from dijiang_export.export.to_onnx import ExportReport

Logits = Literal["last", "all"]
Variant = Literal["ort", "capture"]


@dataclass(frozen=True)
class ToOnnxArguments:
    """What `to-onnx` is given."""

    checkpoint: Annotated[Path | None, click.argument("checkpoint", type=PATH, required=False)]
    bundle: Annotated[Path | None, click.argument("bundle", type=PATH, required=False)]
    named_output: Annotated[
        Path | None, click.option("-o", "--output", "named_output", type=PATH, help="BUNDLE, as an option.")
    ]
    dtype: Annotated[
        Dtype,
        click.option(
            "--dtype", type=one_of(Dtype), default="float32", show_default=True,
            help="Type of weights and activations. State, attention arithmetic and logits are float32 in "
            "all.",
        ),
    ]  # fmt: skip
    logits: Annotated[
        Logits,
        click.option(
            "--logits", type=one_of(Logits), default="last", show_default=True,
            help="Logits of each row's last token, or of all tokens (for perplexity).",
        ),
    ]  # fmt: skip
    cases: Annotated[
        Cases,
        click.option(
            "--cases", type=one_of(Cases), default="short", show_default=True,
            help="Reference cases to record for `validate`: short ones; full adds several chunks and 10,000 "
            "tokens.",
        ),
    ]  # fmt: skip
    max_positions: Annotated[
        int | None,
        click.option("--max-positions", type=COUNT, help="Keep only so many rows of trained decay tables."),
    ]
    extend_decay: Annotated[
        bool,
        click.option(
            "--extend-decay", is_flag=True,
            help="Let trained decay tables go on past their last row instead of stopping there.",
        ),
    ]  # fmt: skip
    variants: Annotated[
        tuple[Variant, ...],
        click.option(
            "--variant", "variants", type=one_of(Variant), multiple=True,
            help="Add graphs for ONNX Runtime on CUDA: with its own operator, or a step that CUDA graphs can "
            "hold.",
        ),
    ]  # fmt: skip
    force: Annotated[bool, click.option("--force", is_flag=True, help="Replace BUNDLE if it exists.")]

    def paths(self) -> tuple[Path, Path]:
        """The checkpoint and the bundle to write, or their defaults.

        Raises:
            UsageError: the bundle was given twice.
        """
        from dijiang_engines.shipped_sample import sample_checkpoint

        bundle = one_output(self.bundle, self.named_output, "BUNDLE")
        if self.checkpoint is None:
            return sample_checkpoint(), bundle or Path(DEFAULT_BUNDLE)
        return self.checkpoint, bundle or Path(f"{self.checkpoint.resolve().name}.bundle")


@click.command(
    "to-onnx",
    epilog="Example: dijiang-export to-onnx ./pythia-410m-dijiang ./pythia.bundle --dtype float16",
)
@takes(ToOnnxArguments)
def to_onnx(output: Output, given: ToOnnxArguments) -> None:
    """Export a DiJiang CHECKPOINT folder to a BUNDLE of ONNX graphs.

    The bundle holds a prefill and a step graph in standard ONNX operators, the same two for TensorRT's
    plugin, one file of weights, recorded reference cases and the tokenizer. Without CHECKPOINT, exports
    the trained sample model to ./tiny-stdlib.bundle.
    """
    from dijiang_export.export.to_onnx import export_bundle

    source, target = given.paths()
    report = export_bundle(
        source,
        target,
        dtype=given.dtype,
        logits=given.logits,
        cases=given.cases,
        max_positions=given.max_positions,
        extend_decay=given.extend_decay,
        variants=given.variants,
        force=given.force,
        progress=output.progress,
    )
    for note in report.notes:
        output.log(note)
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
        lambda: _describe(report),
    )


def _describe(report: ExportReport) -> str:
    spec = report.spec
    seconds = sum(report.seconds.values())
    lines = [
        f"{report.path}: {spec.family}, {spec.num_layers} layers of {spec.num_heads}×{spec.head_dim}, "
        f"{report.dtype}, {report.weights_bytes / 1e6:.1f} MB of weights, {seconds:.1f} s",
        f"state: {spec.state_bytes / 1e6:.2f} MB per sequence, whatever its length",
        f"next: dijiang-export validate {report.path}",
    ]
    return "\n".join(lines)
