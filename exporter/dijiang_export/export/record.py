"""Record reference cases: what PyTorch computes in float64, for validation anywhere without PyTorch.

The file is described in `dijiang_engines.formats.reference_cases` and docs/bundle-format.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.numpy import save_file

from dijiang_engines.formats import reference_cases, rounding_cost
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.export.case_recorder import CaseRecorder
from dijiang_export.export.cases import Cases, choose_cases
from dijiang_export.export.dequantised import DequantisedCheckpoint, ModelWeights
from dijiang_export.export.embedding_recorder import record_embedding
from dijiang_export.export.rounding_recorder import measure_rounding


def record_cases(
    checkpoint: ModelWeights,
    dtype: torch.dtype,
    path: Path,
    cases: Cases,
    progress: ProgressFactory = silent,
) -> list[str]:
    """Compute and write the cases; returns their names (none, and no file, for "none").

    Args:
        checkpoint: where weights come from.
        dtype: the bundle's type, to which weights are rounded.
        path: the safetensors file to write.
        cases: how much.
        progress: for the layers.
    """
    chosen = choose_cases(checkpoint.spec, cases)
    if not chosen:
        return []
    with torch.inference_mode():
        tensors = CaseRecorder(checkpoint, dtype, chosen).run(progress)
    costs = {rounding_cost.KEY: measure_rounding(checkpoint, dtype, chosen, tensors, progress)}
    if isinstance(checkpoint, DequantisedCheckpoint):
        costs[rounding_cost.INT8_KEY] = measure_rounding(checkpoint, dtype, chosen, tensors, progress, "int8")
    metadata = {
        "format": reference_cases.FORMAT,
        "version": reference_cases.VERSION,
        "cases": json.dumps([case.name for case in chosen]),
        "compute_dtype": "float64",
    }
    if cases == "full":
        more, note = record_embedding(checkpoint, dtype, progress)
        tensors |= more
        metadata |= note
    metadata |= {key: json.dumps(cost.to_json()) for key, cost in costs.items() if cost is not None}
    save_file(tensors, path, metadata=metadata)
    return [case.name for case in chosen]
