"""Weights in the files in which checkpoints come, written and read with the formats' own libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

Format = Literal["safetensors", "bin", "sharded-safetensors", "sharded-bin"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHARDS = 3


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], format: Format = "safetensors") -> None:
    """Write `tensors` as one file, or as three shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if format.endswith("safetensors") else ("pytorch_model", "bin")
    if not format.startswith("sharded"):
        _save(tensors, folder / f"{stem}.{suffix}")
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        mine = names[shard::SHARDS]
        file = f"{stem}-{shard + 1:05d}-of-{SHARDS:05d}.{suffix}"
        _save({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, str(file), metadata={"format": "pt"})


def stored_as(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """`value` in one of DTYPES, if it is a float at all."""
    return value.to(DTYPES[dtype]).contiguous() if value.is_floating_point() else value


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        out |= load_file(str(file))
    for file in sorted(folder.glob("pytorch_model*.bin")):
        out |= torch.load(file, weights_only=True)
    return out
