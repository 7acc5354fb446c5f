"""The safetensors format, read and written as bytes at offsets.

Layout (the format's own README): 8 bytes little-endian N; N bytes of JSON header {name: {dtype, shape,
data_offsets: [begin, end]}, "__metadata__": {str: str}}; then the data, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_engines.formats.safe_files import parse_json
from dijiang_export.checkpoint.stored import (
    FLOAT_DTYPES,
    MOST_DIMENSIONS,
    MOST_NAME,
    StoredTensor,
    WeightFile,
)

LARGEST_HEADER = 8 << 20
"""Bytes: 70,000 tensors. The library's own limit, 100 MB, takes gigabytes and minutes as Python objects."""

# Stored name -> (torch's name, bits an element): every type of safetensors 0.8 (its README and its Dtype).
# Types that torch lacks have no second name. Weights are of the types in FLOAT_DTYPES only.
_DTYPES = {
    "F64": ("float64", 64), "F32": ("float32", 32), "F16": ("float16", 16), "BF16": ("bfloat16", 16),
    "I64": ("int64", 64), "I32": ("int32", 32), "I16": ("int16", 16), "I8": ("int8", 8),
    "U64": ("uint64", 64), "U32": ("uint32", 32), "U16": ("uint16", 16), "U8": ("uint8", 8),
    "BOOL": ("bool", 8), "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8), "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F4": ("float4_e2m1fn", 4), "F6_E2M3": ("", 6), "F6_E3M2": ("", 6),
}  # fmt: skip
_STORED_NAMES = {name: stored for stored, (name, _) in _DTYPES.items() if name in FLOAT_DTYPES}


def read_safetensors_table(file: WeightFile) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, its header checked against the format and the file's size.

    Raises:
        CheckpointError: the file is truncated or its header breaks the format's rules.
    """
    header, start = _read_header(file)
    table: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if len(name) > MOST_NAME:
            _corrupt(file, f"a name of {len(name)} characters")
        dtype, shape, begin, end = _check_entry(file, name, entry)
        table[name] = StoredTensor(name, file, dtype, shape, start + begin)
        ranges.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            _corrupt(file, f"the data of {name} starts at byte {begin} where {at} is next")
        at = end
    if start + at > file.size:
        raise CheckpointError(
            f"{file.path} is truncated",
            got=f"{file.size} bytes",
            expected=f"{start + at}",
            hint="download or copy the file again",
        )
    if start + at < file.size:
        _corrupt(file, f"{file.size - start - at} bytes follow the last tensor")
    return table


def _read_header(file: WeightFile) -> tuple[dict[str, Any], int]:
    if file.size < 8:
        raise CheckpointError(
            f"{file.path} is truncated", got=f"{file.size} bytes", hint="download or copy the file again"
        )
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > LARGEST_HEADER:
        _corrupt(file, f"a header of {length} bytes, where at most {LARGEST_HEADER} are expected")
    if 8 + length > file.size:
        raise CheckpointError(
            f"{file.path} is truncated",
            got=f"{file.size} bytes",
            expected=f"more than the {8 + length} of its header",
            hint="download or copy the file again",
        )
    try:
        header = parse_json(file.read(8, length), "its header", error=CheckpointError)
    except CheckpointError as error:
        _corrupt(file, ": ".join(part for part in (error.what, error.got) if part))
    if not isinstance(header, dict):
        _corrupt(file, "its header is not a JSON object")
    return header, 8 + length


def _check_entry(file: WeightFile, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _corrupt(file, f"the entry of {name} lacks dtype, shape or data_offsets")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(stored, str) and stored in _DTYPES):
        _corrupt(file, f"{name} has the unknown dtype {str(stored)[:50]!r}")
    good = _are_sizes(shape, MOST_DIMENSIONS) and _are_sizes(offsets, 2) and len(offsets) == 2
    if not (good and offsets[0] <= offsets[1]):
        _corrupt(file, f"{name} has a bad shape or bad offsets")
    torch_name, bits = _DTYPES[stored]
    held = offsets[1] - offsets[0]
    if math.prod(shape) * bits != 8 * held:
        _corrupt(file, f"{name} has {held} bytes for {str(shape)[:200]} of {stored}")
    dtype = torch_name if torch_name in FLOAT_DTYPES else " = ".join(filter(None, (stored, torch_name)))
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: Any, most: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _corrupt(file: WeightFile, got: str) -> NoReturn:
    raise CheckpointError(
        f"{file.path} is not a valid safetensors file", got=got[:500], hint="download or copy the file again"
    )


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file whose data follow in the order given, without padding.

    Give wider types first, so that every tensor is aligned to its element.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        stored = _STORED_NAMES[str(dtype).removeprefix("torch.")]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
