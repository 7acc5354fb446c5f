"""`.bin` files that are made by hand, and reading them or failing to."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from pathlib import Path

import pytest

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.bin_file import read_bin_table
from dijiang_export.checkpoint.stored import StoredTensor, WeightFile


def table_of(path: Path) -> dict[str, StoredTensor]:
    return read_bin_table(WeightFile(path))


def refused(path: Path, match: str) -> str:
    """Reading must fail quickly, with a short CheckpointError; returns the message."""
    started = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        table_of(path)
    assert time.process_time() - started < 4  # two seconds and some for a busy machine
    message = str(caught.value)
    assert len(message) < 2000
    return message


def archive(path: Path, description: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A `.bin` with this data.pkl, as torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", description)
        for key, data in (storages or {}).items():
            out.writestr(f"x/data/{key}", data)
    return path


def tensor(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    count: int,
    offset: int = 0,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """The description of a tensor, as torch.save writes it."""
    out = io.BytesIO()
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    out.write(pickle.dumps("storage", 2)[2:-1])
    out.write(b"ctorch\n" + kind.encode() + b"\n")
    for value in (key, "cpu", count):
        out.write(pickle.dumps(value, 2)[2:-1])
    out.write(b"tQ")
    for rest in (offset, shape, strides, False, None):
        out.write(pickle.dumps(rest, 2)[2:-1])
    out.write(b"tR")
    return out.getvalue()


def described(*tensors: bytes) -> bytes:
    """A data.pkl: the dictionary of these tensors, called t0, t1, ..."""
    items = b"".join(b"X\x02\0\0\0" + f"t{i}".encode() + data for i, data in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."
