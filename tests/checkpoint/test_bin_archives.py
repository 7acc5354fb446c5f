"""`.bin` archives that contradict themselves, are compressed or are of another kind: refused at once."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.bin_files import archive, described, refused


def good_archive(path: Path) -> bytes:
    torch.save({"a": torch.arange(100.0), "b": torch.ones(50)}, path)
    return path.read_bytes()


def edit_directory(data: bytes, edit: Callable[[bytearray], None]) -> bytes:
    """The file with its central directory edited; the end's sizes stay right only if its length does."""
    at = data.index(b"PK\x01\x02")
    part = bytearray(data[at:])
    edit(part)
    return data[:at] + bytes(part)


def set_at(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda part: struct.pack_into(form, part, offset, value)


@pytest.mark.parametrize(
    "edit",
    [
        set_at(8, "<H", 1),  # encrypted
        set_at(20, "<I", 5),  # compressed size
        set_at(24, "<I", 5),
        set_at(28, "<H", 60000),  # lengths of name, extra, comment
        set_at(30, "<H", 60000),
        set_at(32, "<H", 60000),
        set_at(42, "<I", 5),  # where the record begins
        set_at(42, "<I", 2**32 - 1),
        set_at(0, "<I", 0),
        lambda part: part.__setitem__(slice(46, 50), b"evil"),
    ],
)
def test_directories_that_contradict_the_records(edit: Callable[[bytearray], None], tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(edit_directory(good_archive(path), edit))
    refused(path, "corrupt or truncated")


def test_records_that_overlap(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.bin", described(), {"0": bytes(16), "1": bytes(16)})
    data = path.read_bytes()
    last = data.rindex(b"PK\x01\x02")
    first = data.index(b"x/data/0") - 30
    path.write_bytes(data[: last + 42] + struct.pack("<I", first) + data[last + 46 :])
    refused(path, "begins inside another")


def test_two_records_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    archive(path, described(), {"0": b"", "1": b""})
    path.write_bytes(path.read_bytes().replace(b"x/data/1", b"x/data/0"))
    refused(path, "the same name")


def test_a_directory_of_millions(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    data = good_archive(path)
    end = data.rindex(b"PK\x05\x06")
    locator = data.rindex(b"PK\x06\x07")
    wide = data.rindex(b"PK\x06\x06")
    assert wide < locator < end
    path.write_bytes(data[: wide + 24] + struct.pack("<2Q", 2**40, 2**40) + data[wide + 40 :])
    refused(path, "a directory of 1099511627776 records")
    # and one that is really there, in a sparse file
    with open(path, "wb") as out:
        out.write(b"PK\x03\x04")
        out.truncate(5 << 30)
        out.seek(5 << 30)
        out.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 50000, 50000, 4 << 30, 4))
        out.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, 5 << 30, 1))
        out.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
    refused(path, "a directory of 50000 records and 4294967296 bytes")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_bombs(method: int, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w", method) as out:
        out.writestr("x/data.pkl", bytes(50 << 20))
    refused(path, "is compressed")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_and_tar(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    torch.jit.script(torch.nn.Linear(5, 3)).save(path)
    assert "code/__torch__" in refused(path, "is compressed")
    path.write_bytes(b"storages" + bytes(248) + b"ustar\x0000" + bytes(1000))
    refused(path, "corrupt or truncated")


def test_no_description(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as out:
        out.writestr("x/other", b"")
    refused(tmp_path / "w.bin", r"0 descriptions \(data.pkl\)")
