"""What a checkpoint is: geometry, decay, files; as `dijiang_engines.inspection` says it of bundles."""

from __future__ import annotations

from pathlib import Path

from dijiang_engines.inspection import Inspection, layer_decay
from dijiang_export.checkpoint.checkpoint import open_checkpoint


def inspect_checkpoint(path: Path) -> Inspection:
    """Describe a DiJiang checkpoint folder; reads its decay tables, nothing else of the weights.

    Raises:
        CheckpointError: it cannot be read.
    """
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
        layers = []
        for layer in range(spec.num_layers):
            prefix = f"layers.{layer}.attention."
            names = ["log_decay", "gain", "read_scale"] if spec.decay == "tables" else ["log_decay"]
            layers.append(layer_decay(layer, *(checkpoint.tensor(prefix + n).numpy() for n in names)))
        return Inspection(
            kind="checkpoint",
            path=str(path),
            name=path.resolve().name,
            dtype=checkpoint.storage_dtype,
            spec=spec,
            decay=tuple(layers),
            details={
                "files": {file.name: file.stat().st_size for file in checkpoint.files},
                "total_bytes": sum(file.stat().st_size for file in checkpoint.files),
                "tokenizer": any(file.name == "tokenizer.json" for file in checkpoint.tokenizer_files),
                "notes": checkpoint.notes,
                "decay_notes": checkpoint.decay_notes,
            },
        )
