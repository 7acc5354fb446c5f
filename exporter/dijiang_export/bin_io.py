"""PyTorch `.bin` files as bytes at offsets, without running what is in them.

A `.bin` is a zip archive: data.pkl describes the tensors, data/<key> holds each storage, uncompressed. The
description is unpickled by PyTorch's weights-only unpickler, which calls nothing but tensor constructors;
under FakeTensorMode these tensors have no memory, and their storages tell their place in the file.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from contextlib import nullcontext
from typing import Any

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_export.weights_io import StoredTensor, WeightFile

LARGEST_PICKLE = 256 << 20
"""Bytes of a description; real ones have less than one megabyte."""
LARGEST_LEGACY = 1 << 30
"""Bytes; files of PyTorch before 1.6 have no offsets and are read whole."""

_RESAVE = (
    "save it again: torch.save(torch.load('{name}', weights_only=True, map_location='cpu'), 'new.bin'), "
    "or as safetensors"
)


def read_bin_table(file: WeightFile) -> dict[str, StoredTensor]:
    """Every tensor of a `.bin` file.

    Raises:
        CheckpointError: the file is corrupt or truncated, asks for code to be run, is compressed, big-endian,
            too large for its old format, or holds something other than named tensors.
    """
    is_zip = file.size >= 4 and file.read(0, 4) == b"PK\x03\x04"
    records: dict[int, int] = {}
    if is_zip:
        records = _check_archive(file)
    elif file.size > LARGEST_LEGACY:
        raise CheckpointError(
            f"{file.path} is in PyTorch's format of before version 1.6, and too large to read that way",
            got=f"{file.size} bytes",
            expected=f"at most {LARGEST_LEGACY}",
            hint=_RESAVE.format(name=file.path.name),
        )
    state = _load(file, fake=is_zip)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file.path} does not hold named tensors", got=type(state).__name__)
    table: dict[str, StoredTensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{file.path} does not hold just named tensors",
                got=f"{type(value).__name__} under {name!r}",
                hint="save the model's state_dict() by itself",
            )
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{name} in {file.path} is sparse or quantised", hint="save it dense")
        table[name] = _describe(file, name, value, records) if is_zip else _in_memory(file, name, value)
    return table


def _load(file: WeightFile, *, fake: bool) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with warnings.catch_warnings(), FakeTensorMode() if fake else nullcontext():
            warnings.simplefilter("ignore")
            return torch.load(file.path, weights_only=True, map_location="cpu")
    except Exception as error:
        text = str(error)
        wanted = re.search(
            r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand)[^\n.]*?([\w.]+\.[\w.]+)", text
        )
        if wanted or "Weights only load failed" in text:
            name = next((group for group in wanted.groups() if group), None) if wanted else None
            # torch's text itself is not shown: it advises to allow everything
            raise CheckpointError(
                f"{file.path} holds something other than weights, which was not run",
                got=f"a call of {name}" if name else "a pickle of something else",
                expected="tensors by name",
                hint="do not use a checkpoint that you do not trust; ask its author for safetensors",
            ) from error
        raise CheckpointError(
            f"{file.path} is corrupt or truncated",
            got=(text.splitlines() or [type(error).__name__])[0][:200],
            hint="download or copy the file again",
        ) from error


def _check_archive(file: WeightFile) -> dict[int, int]:
    """Where each record's data start, and how many bytes they are."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = archive.infolist()
            order = [e for e in entries if e.filename.rpartition("/")[2] == "byteorder" and e.file_size < 16]
            byteorder = archive.read(order[0]) if order else b"little"
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file.path} is corrupt or truncated", got=str(error), hint="download or copy the file again"
        ) from error
    if byteorder != b"little":
        raise CheckpointError(
            f"{file.path} is not little-endian",
            got=byteorder.decode(errors="replace"),
            hint="save it on an ordinary machine",
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{file.path} is compressed", got=entry.filename, hint=_RESAVE.format(name=file.path.name)
            )
        if entry.filename.endswith("data.pkl") and entry.file_size > LARGEST_PICKLE:
            raise CheckpointError(f"{file.path} has an absurd description", got=f"{entry.file_size} bytes")
    records = {}
    for entry in entries:
        # local file header: 30 bytes, of which the last four are the lengths of what follows before the data
        name_length, extra_length = struct.unpack("<HH", file.read(entry.header_offset + 26, 4))
        records[entry.header_offset + 30 + name_length + extra_length] = entry.file_size
    return records


def _describe(file: WeightFile, name: str, value: torch.Tensor, records: dict[int, int]) -> StoredTensor:
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_complex() or value.is_conj() or value.is_neg() or not isinstance(offset, int):
        raise CheckpointError(f"{name} in {file.path} is not a plain tensor", got=dtype)
    shape, strides = tuple(value.shape), tuple(value.stride())
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    begin = offset + int(value.storage_offset()) * value.element_size()
    end = begin + reach * value.element_size()
    limit = min(offset + records.get(offset, 0), file.size)
    if offset < 0 or begin < offset or end > limit:
        raise CheckpointError(
            f"{file.path} is corrupt or truncated",
            got=f"{name} would end at byte {end}, its record at {limit}",
            hint="download or copy the file again",
        )
    return StoredTensor(name, file, dtype, shape, begin, None if value.is_contiguous() else strides)


def _in_memory(file: WeightFile, name: str, value: torch.Tensor) -> StoredTensor:
    dtype = str(value.dtype).removeprefix("torch.")
    return StoredTensor(name, file, dtype, tuple(value.shape), 0, None, value.detach())
