"""The safetensors format, read and written as bytes at offsets.

Layout (the format's own README): 8 bytes little-endian N; N bytes of JSON header {name: {dtype, shape,
data_offsets: [begin, end]}, "__metadata__": {str: str}}; then the data, without holes or overlaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_export.weights_io import StoredTensor, WeightFile

LARGEST_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""

# Stored name -> (torch's name, bytes an element). Types that torch lacks are not needed: no weight has them.
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "C64": ("complex64", 8),
}  # fmt: skip
_STORED_NAMES = {torch_name: stored for stored, (torch_name, _) in _DTYPES.items()}


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
        _corrupt(file, f"a header of {length} bytes")
    if 8 + length > file.size:
        raise CheckpointError(
            f"{file.path} is truncated",
            got=f"{file.size} bytes",
            expected=f"more than the {8 + length} of its header",
            hint="download or copy the file again",
        )
    try:
        header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        _corrupt(file, f"header: {error}")
    if not isinstance(header, dict):
        _corrupt(file, "its header is not a JSON object")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _check_entry(file: WeightFile, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _corrupt(file, f"the entry of {name} lacks dtype, shape or data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(entry["dtype"], str) and entry["dtype"] in _DTYPES):
        _corrupt(file, f"{name} has the unknown dtype {entry['dtype']!r}")
    dtype, itemsize = _DTYPES[entry["dtype"]]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        _corrupt(file, f"{name} has a bad shape or bad offsets: {shape!r}, {offsets!r}")
    count = itemsize
    for size in shape:
        count *= size
    if count != offsets[1] - offsets[0]:
        _corrupt(file, f"{name} has {offsets[1] - offsets[0]} bytes for {shape} of {entry['dtype']}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _corrupt(file: WeightFile, got: str) -> NoReturn:
    raise CheckpointError(
        f"{file.path} is not a valid safetensors file", got=got, hint="download or copy the file again"
    )


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file whose data follow in the order given, without padding.

    Give wider types first, so that every tensor is aligned to its element.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        stored = _STORED_NAMES[str(dtype).removeprefix("torch.")]
        size = _DTYPES[stored][1]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
