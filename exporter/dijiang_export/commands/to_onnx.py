"""`dijiang-export to-onnx`: a checkpoint becomes a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from dijiang_engines.weight_formats import Activations, WeightFormat
from dijiang_export.commands.arguments import COUNT, FILE, PATH, Cases, Dtype, one_of, takes
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, one_output

if TYPE_CHECKING:
    from dijiang_export.export.to_onnx import ExportReport

Logits = Literal["last", "all"]
Variant = Literal["ort", "capture", "portable"]


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
            help="Type of activations, and of weights that are not quantised. State, attention arithmetic "
            "and logits are float32 in all.",
        ),
    ]  # fmt: skip
    weight_format: Annotated[
        WeightFormat,
        click.option(
            "--weight-format", type=one_of(WeightFormat), default="float", show_default=True,
            help="How matrices are stored: as floats of that type, or quantised in blocks of 32. int4 keeps "
            "the head, the embedding, v and dense in int8.",
        ),
    ]  # fmt: skip
    keep_int8: Annotated[
        tuple[str, ...],
        click.option(
            "--keep-int8", metavar="PATTERN", multiple=True,
            help="With int4: store these matrices in int8 too, such as 'layers.*.mlp.down'.",
        ),
    ]  # fmt: skip
    calibrate: Annotated[
        Path | None,
        click.option(
            "--calibrate", type=FILE, metavar="FILE",
            help="A text of the kind that the model is for: quantised matrices are rounded so that their "
            "products on it change least.",
        ),
    ]  # fmt: skip
    activations: Annotated[
        Activations | None,
        click.option(
            "--activations", type=one_of(Activations),
            help="What ONNX Runtime multiplies quantised matrices with. [default: float in a prefill, int8, "
            "which is faster, in a step]",
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
            "hold; or of quantised weights, portable: without any operator of Microsoft's.",
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
        weight_format=given.weight_format,
        keep_int8=given.keep_int8,
        activations=given.activations,
        calibrate=given.calibrate,
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
            "quantisation": report.quantisation,
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
        f"{report.dtype}, {report.weights_bytes / 1e6:.1f} MB of {_format(report)}weights, {seconds:.1f} s",
        f"state: {spec.state_bytes / 1e6:.2f} MB per sequence, whatever its length",
        *_cost(report),
        f"next: dijiang-export validate {report.path}",
    ]
    return "\n".join(lines)


def _cost(report: ExportReport) -> list[str]:
    from dijiang_engines.formats.quantised.manifest import QuantisationCost

    cost = None if report.quantisation is None else report.quantisation["cost"]
    return [] if cost is None else [f"quantisation: {QuantisationCost(**cost).sentence}"]


def _format(report: ExportReport) -> str:
    return "" if report.quantisation is None else f"{report.quantisation['weight_format']} "
