"""A checkpoint folder as a reader: the reference of a DiJiang one, transformers' model of a vanilla one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dijiang_engines.errors import UsageError
from dijiang_engines.scoring.readers import Reader
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.source import Source
from dijiang_export.reference.model import DTYPES, ReferenceModel
from dijiang_export.scoring.reference import ReferenceReader
from dijiang_export.scoring.vanilla import VanillaReader, load_vanilla

TYPES = DTYPES | {"float64": torch.float64}

_DEVICES = "cpu, cuda, cuda:1, ..."


@dataclass(frozen=True)
class CheckpointReader:
    """A loaded checkpoint."""

    reader: Reader
    kind: str
    """Of checkpoint: "DiJiang" or "vanilla"."""
    spec: ModelSpec
    tokenizer: Path | None
    """Its tokenizer.json."""
    notes: tuple[str, ...]
    """What was done to read it that its owner may not expect."""


def read_checkpoint(
    path: str | Path, *, dtype: str = "float32", device: str = "cpu", threads: int | None = None
) -> CheckpointReader:
    """Load a DiJiang or vanilla checkpoint, whole, in PyTorch.

    Args:
        path: its folder.
        dtype: a key of TYPES: of weights and activations. What is stored is converted.
        device: "cpu", "cuda", or as PyTorch names one.
        threads: of PyTorch's operators in this process; None leaves them.

    Raises:
        CheckpointError: it cannot be read, or transformers makes another model of it.
        UsageError: an unknown type, or a device that is not here.
    """
    if dtype not in TYPES:
        raise UsageError("unknown dtype", got=dtype, expected=", ".join(TYPES))
    place = _device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    source = Source(Path(path))
    try:
        spec, vanilla, notes = source.spec, not source.has_dijiang, tuple(source.notes)
        tokenizer = next((p for p in source.tokenizer_files if p.name == "tokenizer.json"), None)
        if vanilla:
            model = load_vanilla(source, TYPES[dtype]).to(place)
            limit = spec.position_embeddings or None
            reader: Reader = VanillaReader(model, spec.max_position_embeddings, limit)
            return CheckpointReader(reader, "vanilla", spec, tokenizer, notes)
    finally:
        source.close()
    with open_checkpoint(path) as checkpoint:
        reference = ReferenceModel(checkpoint.spec, dtype=TYPES[dtype])
        reference.load_state_dict(checkpoint.load_state_dict(TYPES[dtype]))
        spec = checkpoint.spec
    return CheckpointReader(ReferenceReader(reference.to(place)), "DiJiang", spec, tokenizer, notes)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("there is no such device", got=name, expected=_DEVICES) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError("this device is not supported", got=name, expected=_DEVICES)
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise UsageError(
            "PyTorch finds no such GPU here", got=name, expected=f"{torch.cuda.device_count()} GPUs"
        )
    return device
