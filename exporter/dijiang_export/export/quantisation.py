"""What an export with quantised weights does besides: options, calibration, what the manifest says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dijiang_engines.errors import UsageError
from dijiang_engines.progress import ProgressFactory
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Activations, MatrixFormat
from dijiang_export.checkpoint.checkpoint import Checkpoint
from dijiang_export.export.background import Clock
from dijiang_export.export.dequantised import DequantisedCheckpoint
from dijiang_export.export.quantisation_cost import measure_cost
from dijiang_export.graph import write
from dijiang_export.quantise.recipe import choose_recipe

if TYPE_CHECKING:
    from dijiang_export.export.calibration import CalibrationText


def quantisation_of(
    spec: ModelSpec, weight_format: MatrixFormat, keep_int8: Sequence[str], activations: Activations | None
) -> write.Quantisation:
    """What `export_bundle`'s options say about quantised weights."""
    recipe = choose_recipe(spec, weight_format, keep_int8)
    return write.Quantisation(recipe, {"prefill": activations or "float", "step": activations or "int8"})


def describe(made: write.Quantisation) -> dict[str, Any]:
    """The manifest's object, of weights that were neither calibrated nor measured."""
    return made.recipe.to_json() | {"activations": dict(made.activations), "calibration": None, "cost": None}


def calibration_text(path: Path, checkpoint: Checkpoint) -> CalibrationText:
    """See `calibration.read_calibration_text`, which needs the tokenizer."""
    from dijiang_export.export.calibration import read_calibration_text

    return read_calibration_text(path, checkpoint)


def finish_weights(
    checkpoint: Checkpoint,
    stored: DequantisedCheckpoint,
    dtype: torch.dtype,
    text: CalibrationText | None,
    measure: bool,
    clock: Clock,
    progress: ProgressFactory,
) -> dict[str, Any]:
    """Calibrate if there is a text, and measure the cost; what the manifest says of both.

    Args:
        checkpoint: with the float weights.
        stored: the same model with those of a complete weights.data.
        dtype: of the bundle.
        text: what calibrates.
        measure: measure the cost, also without a text.
        clock: of the export.
        progress: of layers and tokens.
    """
    said: dict[str, Any] = {}
    if text is not None:
        from dijiang_export.export.calibration import calibrate

        with clock("calibration"):
            calibrate(checkpoint, stored, dtype, text, progress)
        said["calibration"] = text.to_json()
    if text is not None or measure:
        with clock("cost of quantisation"):
            measured = None if text is None else text.measured
            said["cost"] = asdict(measure_cost(checkpoint, stored, dtype, measured, progress))
    return said


def check_float(
    keep_int8: Sequence[str],
    activations: Activations | None,
    variants: Sequence[str],
    calibrate: str | Path | None,
) -> None:
    """Nothing was asked for that only quantised weights have.

    Raises:
        UsageError: something was.
    """
    asked = {
        "--keep-int8": keep_int8,
        "--activations": activations,
        "--variant portable": "portable" in variants,
        "--calibrate": calibrate,
    }
    for option, value in asked.items():
        if value:
            raise UsageError(
                f"{option} is for quantised weights",
                got="--weight-format float",
                expected="--weight-format int8 or int4",
            )
