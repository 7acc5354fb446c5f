"""PyTorch `.bin` files as bytes at offsets, without running what is in them.

A `.bin` is a zip archive: X/data.pkl describes the tensors, X/data/<key> holds each storage. Before version
1.6 it was five pickles (a magic number, a version, the writer's sizes, the description, the storages' keys),
then each storage behind its number of elements. `pickled_weights` reads the descriptions.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.pickled_weights import (
    BrokenPickle,
    Described,
    ForeignPickle,
    Storage,
    read_pickle,
)
from dijiang_export.checkpoint.stored import StoredTensor, WeightFile, corrupt
from dijiang_export.checkpoint.zip_records import Record, read_records

LARGEST_PICKLE = 16 << 20
"""Bytes of a description; real ones have less than one megabyte."""
MOST_SHARING = 8
"""What all tensors of a file claim, over what the file holds. Tied ones claim the same bytes twice."""

_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
_VERSION = 1001  # the same, PROTOCOL_VERSION
_INNER = ("state_dict", "model_state_dict", "model_state", "model", "module")
"""Where training loops keep the weights, beside an optimiser's state and the like."""
_DEEPEST = 3
"""Dictionaries around that of the tensors."""


def read_bin_table(file: WeightFile) -> dict[str, StoredTensor]:
    """Every tensor of a `.bin` file.

    Raises:
        CheckpointError: the file is corrupt or truncated, asks for code to be run, is compressed, big-endian,
            claims more than it holds, or holds something other than named tensors.
    """
    is_zip = file.size >= 4 and file.read(0, 4) == b"PK\x03\x04"
    state, records = _read_archive(file) if is_zip else _read_legacy(file)
    tensors = _named_tensors(file, state)
    table = {name: _stored(file, name, value, records) for name, value in tensors.items()}
    claimed = sum(_claim(value) for value in tensors.values())
    if claimed > MOST_SHARING * file.size:
        raise CheckpointError(
            f"{file.path} describes more than it holds",
            got=f"tensors of {claimed} bytes in a file of {file.size}",
            hint="save the model with tensors of their own: {k: v.clone() for k, v in state_dict.items()}",
        )
    return table


def _read_archive(file: WeightFile) -> tuple[Any, dict[str, Record]]:
    records = read_records(file)
    descriptions = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(descriptions) != 1:
        corrupt(file, f"{len(descriptions)} descriptions (data.pkl)")
    prefix = descriptions[0].removesuffix("data.pkl")
    order = records.get(f"{prefix}byteorder", Record(0, 0))
    if order.size and file.read(order.offset, min(order.size, 16)) != b"little":
        _big_endian(file)
    description = records[descriptions[0]]
    if description.size > LARGEST_PICKLE:
        corrupt(file, f"a description of {description.size} bytes")
    state, _ = _read_pickle(file, file.read(description.offset, description.size), 0)
    start = f"{prefix}data/"
    return state, {name.removeprefix(start): r for name, r in records.items() if name.startswith(start)}


def _read_legacy(file: WeightFile) -> tuple[Any, dict[str, Record]]:
    """The format of before PyTorch 1.6 (torch/serialization.py, _legacy_save)."""
    data = file.read(0, min(file.size, LARGEST_PICKLE))
    magic, at = _read_pickle(file, data, 0)
    if magic != _MAGIC:
        corrupt(file, "neither an archive nor PyTorch's older format")
    version, at = _read_pickle(file, data, at)
    system, at = _read_pickle(file, data, at)
    if version != _VERSION or type(system) is not dict:
        corrupt(file, "an unknown version of PyTorch's older format")
    if system.get("little_endian") is not True:
        _big_endian(file)
    state, at = _read_pickle(file, data, at)
    keys, at = _read_pickle(file, data, at)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        corrupt(file, "a list of storages that is none")
    types = {storage.key: storage for storage in _storages(state)}
    records: dict[str, Record] = {}
    for key in keys:
        if key not in types or key in records or at + 8 > file.size:
            corrupt(file, "storages that do not belong to the tensors")
        (count,) = struct.unpack("<q", file.read(at, 8))
        if count != types[key].count:
            corrupt(file, "a storage that has not the size that its tensors say")
        records[key] = Record(at + 8, count * _itemsize(types[key].dtype))
        at = records[key].offset + records[key].size
    return state, records


def _read_pickle(file: WeightFile, data: bytes, at: int) -> tuple[Any, int]:
    try:
        return read_pickle(data, at)
    except ForeignPickle as error:
        _foreign(file, f"a call of {error.args[0][:200]}")
    except BrokenPickle as error:
        corrupt(file, error.args[0])


def _storages(value: Any) -> Iterator[Storage]:
    """Those of all tensors in nested dictionaries and lists, each container looked at once."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Described):
            yield item.storage
        elif type(item) in (dict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if type(item) is dict else item)


def _named_tensors(file: WeightFile, state: Any) -> dict[str, Described]:
    """The dictionary of tensors, from inside the dictionaries that training loops save."""
    path: list[str] = []
    while type(state) is dict and not _holds_tensors(state) and len(path) < _DEEPEST:
        inner = _inner(file, state)
        if inner is None:
            break
        path.append(inner)
        state = state[inner]
    if type(state) is not dict:
        raise CheckpointError(f"{file.path} does not hold named tensors", got=type(state).__name__)
    for name, value in state.items():
        if type(name) is not str or not isinstance(value, Described):
            raise CheckpointError(
                f"{file.path} does not hold just named tensors",
                got=f"{type(value).__name__} under {name!r}"[:300],
                hint="save the model's state_dict() by itself",
            )
    if path:
        where = " / ".join(path)
        file.notes.append(f"{file.path.name}: the weights are those under {where!r}; nothing else was read")
    return state


def _holds_tensors(state: dict[Any, Any]) -> bool:
    return any(isinstance(value, Described) for value in state.values())


def _inner(file: WeightFile, state: dict[Any, Any]) -> str | None:
    """The entry that the weights are in: the only one of its kind, or the only one with a usual name."""
    usual = [name for name in _INNER if type(state.get(name)) is dict and any(_storages(state[name]))]
    if not usual:
        # Each dictionary is looked at once: a million entries may be the same.
        others = {id(v): name for name, v in state.items() if type(v) is dict and type(name) is str}
        usual = [name for name in others.values() if _holds_tensors(state[name])]
    if len(usual) > 1:
        raise CheckpointError(
            f"{file.path} holds several sets of tensors",
            got=", ".join(repr(name) for name in usual[:5])[:300],
            hint="save the state_dict() of the model to export by itself",
        )
    return usual[0] if usual else None


def _stored(file: WeightFile, name: str, value: Described, records: dict[str, Record]) -> StoredTensor:
    held = value.storage.count * _itemsize(value.storage.dtype)
    record = records.get(value.storage.key)
    if record is None:
        corrupt(file, f"{name} is in a storage that the file does not hold")
    item = _itemsize(value.dtype)
    begin = value.offset * item
    reach = 0 if 0 in value.shape else sum((n - 1) * s for n, s in _axes(value)) + 1
    end, last = max(held, begin + reach * item), min(held, record.size, file.size - record.offset)
    if end > last:
        ends = f"{name} would end at byte {record.offset + end}, its record at {record.offset + last}"
        corrupt(file, ends)
    if _claim(value) > held:
        raise CheckpointError(
            f"{name} in {file.path} claims more than is stored",
            got=f"{_claim(value)} bytes in a storage of {held}: strides {list(value.strides)}"[:300],
            hint="an expanded tensor: make it contiguous and save the checkpoint again",
        )
    strides = None if _is_contiguous(value) else value.strides
    return StoredTensor(name, file, value.dtype, value.shape, record.offset + begin, strides)


def _claim(value: Described) -> int:
    """Bytes that a tensor would be in C order."""
    return math.prod(value.shape) * _itemsize(value.dtype)


def _axes(value: Described) -> Iterator[tuple[int, int]]:
    return zip(value.shape, value.strides, strict=True)


def _is_contiguous(value: Described) -> bool:
    """True in C order; strides of axes of one element mean nothing."""
    if 0 in value.shape:
        return True
    step = 1
    for extent, stride in reversed(list(_axes(value))):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True


def _itemsize(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _foreign(file: WeightFile, got: str) -> NoReturn:
    raise CheckpointError(
        f"{file.path} holds something other than weights, which was not run",
        got=got,
        expected="tensors by name",
        hint="do not use a checkpoint that you do not trust; ask its author for safetensors",
    )


def _big_endian(file: WeightFile) -> NoReturn:
    raise CheckpointError(f"{file.path} is not little-endian", hint="save it on an ordinary machine")
