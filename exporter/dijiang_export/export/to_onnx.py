"""Assemble a bundle: graphs, weights, recorded cases, tokenizer, manifest; whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.formats.file_table import CONFIG, MANIFEST, REFERENCE, file_entries
from dijiang_engines.formats.graph_check import check_graph
from dijiang_engines.formats.manifest import FORMAT, FORMAT_VERSION, GENAI, GENAI_FILES, QUANTISED_VERSION
from dijiang_engines.formats.quantised.manifest import KEY
from dijiang_engines.op_contract import DOMAIN, OP_NAME, OP_VERSION
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.spec import ModelSpec
from dijiang_engines.version import __version__
from dijiang_engines.weight_formats import Activations, WeightFormat
from dijiang_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dijiang_export.checkpoint.files import copy_file
from dijiang_export.export.background import Background, Clock
from dijiang_export.export.cases import Cases
from dijiang_export.export.dequantised import DequantisedCheckpoint, ModelWeights
from dijiang_export.export.genai import write_genai
from dijiang_export.export.quantisation import (
    calibration_text,
    check_float,
    describe,
    finish_weights,
    quantisation_of,
)
from dijiang_export.export.record import record_cases
from dijiang_export.graph import opset, weights, write
from dijiang_export.reference.model import DTYPES
from dijiang_export.reference.rope import inverse_frequencies

Logits = Literal["last", "all"]


@dataclass(frozen=True)
class ExportReport:
    """What `export_bundle` made, and how long each part took, in seconds."""

    path: Path
    spec: ModelSpec
    dtype: str
    logits: Logits
    weights_bytes: int
    cases: list[str]
    notes: list[str]
    seconds: dict[str, float]
    quantisation: dict[str, Any] | None
    """As the manifest has it; None for float weights."""


def export_bundle(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "float32",
    logits: Logits = "last",
    cases: Cases = "short",
    max_positions: int | None = None,
    extend_decay: bool = False,
    variants: Sequence[str] = (),
    weight_format: WeightFormat = "float",
    keep_int8: Sequence[str] = (),
    activations: Activations | None = None,
    calibrate: str | Path | None = None,
    force: bool = False,
    progress: ProgressFactory = silent,
) -> ExportReport:
    """Export a DiJiang checkpoint folder to a bundle folder.

    Args:
        source: Hugging Face folder of a DiJiang checkpoint.
        output: the bundle to make.
        dtype: float32, float16 or bfloat16: the type of activations and of weights that are not quantised;
            the op's arithmetic, state and logits are float32 in all three.
        logits: of each row's last valid token, or of all tokens.
        cases: how many reference cases to record.
        max_positions: keep so many rows of trained tables.
        extend_decay: let trained tables go on past their last row instead of stopping.
        variants: names in `write.VARIANTS`: graphs for one runtime, beside those that every bundle has.
        weight_format: how matrices are stored (docs/quantisation.md).
        keep_int8: patterns of matrices that "int4" stores in int8, beside those of its recipe.
        activations: what products of quantised matrices multiply with, in both graphs; None: float in a
            prefill, int8 in a step.
        calibrate: a text file, with which the layers' matrices are rounded with error compensation.
        force: replace an existing bundle.
        progress: opens progress bars.

    Raises:
        UsageError: an unknown dtype, logits, cases, variant or weight format, or options that do not go
            together.
        TextError: `calibrate` is no text to calibrate with.
        CheckpointError: the checkpoint cannot be read or does not fit the type.
        OutputError: the bundle cannot be written.
    """
    _check_choice("dtype", dtype, tuple(DTYPES))
    _check_choice("logits", logits, ("last", "all"))
    _check_choice("cases", cases, ("none", "short", "full"))
    for variant in variants:
        _check_choice("variant", variant, tuple(write.VARIANTS))
    _check_choice("weight format", weight_format, ("float", "int8", "int4"))
    if weight_format == "float":
        check_float(keep_int8, activations, variants, calibrate)
    variants = tuple(dict.fromkeys(variants))
    tensorrt = write.has_tensorrt(DTYPES[dtype], quantised=weight_format != "float")
    graph_files = write.graph_files(variants, tensorrt=tensorrt)
    clock = Clock()
    with (
        open_checkpoint(source, extend_decay=extend_decay, max_positions=max_positions) as checkpoint,
        output_folder(output, force=force) as folder,
        Background() as background,
    ):
        spec = checkpoint.spec
        given = None if calibrate is None else calibration_text(Path(calibrate), checkpoint)
        made = (
            None if weight_format == "float" else quantisation_of(spec, weight_format, keep_int8, activations)
        )
        recipe = None if made is None else made.recipe
        layout = weights.layout_of(spec, DTYPES[dtype], recipe, zero_points="portable" in variants)
        total = sum(weight.nbytes for weight in layout.values())
        # Tracing is Python's work, the other two are the disk's: all three at once.
        source_files = background.submit(checkpoint.hash_files)
        with progress("Tracing graphs, writing weights", total, "bytes") as bar:
            extra = {"inv_freq": inverse_frequencies(spec)}
            data = folder / weights.FILE_NAME
            writing = background.submit(
                weights.write, data, layout, checkpoint, extra, recipe, on_bytes=bar.advance
            )
            with clock("graphs"):
                models = write.make_graphs(
                    spec, DTYPES[dtype], layout,
                    all_logits=logits == "all", variants=variants, quantisation=made,
                )  # fmt: skip
                graphs = {g.key: write.save(*models[g.key], folder, g) for g in graph_files}
            with clock("weights, after graphs"):
                writing.result()
        with clock("check"):
            for graph_file in graph_files:
                write.check(folder / graph_file.file, graph_file.target)
                check_graph(
                    (folder / graph_file.file).read_bytes(), graph_file.file, spec,
                    step=graph_file.kind == "step", all_logits=logits == "all",
                    quantised=None if recipe is None else recipe.parts,
                )  # fmt: skip
        seen: ModelWeights = checkpoint
        about = None
        if made is not None:
            stored = DequantisedCheckpoint(checkpoint, made.recipe, layout, data)
            seen, about = stored, describe(made)
            about |= finish_weights(
                checkpoint, stored, DTYPES[dtype], given, cases != "none", clock, progress
            )
        with clock("cases"):
            recorded = record_cases(seen, DTYPES[dtype], folder / REFERENCE, cases, progress)
        for path in (checkpoint.path / CONFIG, *checkpoint.tokenizer_files):
            copy_file(path, folder)
        write_genai(spec, folder)
        with clock("hashes"):
            files = file_entries(folder)
            entries = _manifest(checkpoint, dtype, logits, graphs, recorded, source_files.result(), files)
            if about is not None:
                entries |= {"format_version": QUANTISED_VERSION, KEY: about}
            text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
            (folder / MANIFEST).write_text(text, encoding="utf-8")
        notes = [*checkpoint.notes, *checkpoint.decay_notes]
        if given is not None and given.note is not None:
            notes.append(given.note)
        report = ExportReport(Path(output), spec, dtype, logits, total, recorded, notes, clock.seconds, about)
    return report


def _manifest(
    checkpoint: Checkpoint,
    dtype: str,
    logits: Logits,
    graphs: dict[str, Any],
    cases: list[str],
    source_files: dict[str, Any],
    files: dict[str, Any],
) -> dict[str, Any]:
    libraries = ("torch", "onnx", "onnx-ir", "onnxscript")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_by": {"dijiang-export": __version__, **versions},
        "source": {
            "name": checkpoint.path.resolve().name,
            "files": source_files,
            "notes": checkpoint.notes,
        },
        "spec": checkpoint.spec.to_json(),
        "dtype": dtype,
        "logits": logits,
        "op": {"domain": DOMAIN, "name": OP_NAME, "version": OP_VERSION},
        "opset": opset.OPSET,
        "ir_version": opset.IR_VERSION,
        "graphs": graphs,
        "weights": {"file": weights.FILE_NAME},
        "reference": {"file": REFERENCE, "cases": cases} if cases else None,
        "decay_notes": checkpoint.decay_notes,
        "files": {name: entry for name, entry in files.items() if name not in GENAI_FILES},
        GENAI: {name: files[name] for name in GENAI_FILES},
    }


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"unknown {name} {value!r}", expected=" or ".join(allowed))
