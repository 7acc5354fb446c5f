"""Where the records of a PyTorch archive lie: a strict reader of uncompressed zip files.

torch.save writes plain zip archives (PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5): one uncompressed record
after the other, then the central directory, with 64-bit sizes where they are needed. Anything else is
refused: compressed or encrypted records, records that overlap or share a name, local headers that contradict
the directory, a comment. Nothing is read but headers, and not more of them than MOST_RECORDS.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.stored import WeightFile, corrupt

MOST_RECORDS = 100_000
"""A storage each, and a few more; large unsplit models have some thousands."""
MOST_DIRECTORY_BYTES = 32 << 20

_END = struct.Struct(
    "<4s4H2LH"
)  # end of central directory: signature, disks and counts, size, offset, comment
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF  # the value stands in the 64-bit extra field


@dataclass(frozen=True)
class Record:
    """Where one record's bytes are."""

    offset: int
    size: int


@dataclass(frozen=True)
class _Entry:
    """One line of the central directory."""

    name: bytes
    size: int
    header: int


def read_records(file: WeightFile) -> dict[str, Record]:
    """Every record of an archive by its name.

    Raises:
        CheckpointError: the archive is corrupt, truncated, compressed, or has too many records.
    """
    count, size, offset = _find_directory(file)
    if count > MOST_RECORDS or size > MOST_DIRECTORY_BYTES:
        corrupt(file, f"a directory of {count} records and {size} bytes")
    records: dict[str, Record] = {}
    at = 0
    for entry in sorted(_directory(file, file.read(offset, size), count), key=lambda entry: entry.header):
        if entry.header < at or entry.header >= offset:
            corrupt(file, f"the record at byte {entry.header} begins inside another, or beyond the last")
        record = _locate(file, entry)
        at = record.offset + record.size
        if at > offset:
            corrupt(file, f"the record at byte {entry.header} would end at byte {at}")
        name = entry.name.decode("utf-8", "surrogateescape")
        if name in records:
            corrupt(file, "two records have the same name")
        records[name] = record
    return records


def _find_directory(file: WeightFile) -> tuple[int, int, int]:
    """Number of records, bytes and offset of the central directory."""
    at = file.size - _END.size
    if at < 0:
        corrupt(file, "no end of an archive")
    mark, *_, count, size, offset, comment = _END.unpack(file.read(at, _END.size))
    if mark != b"PK\x05\x06" or comment:
        corrupt(file, "no end of an archive")
    end = at
    if at >= _LOCATOR.size + _END64.size:
        mark, _, where, _ = _LOCATOR.unpack(file.read(at - _LOCATOR.size, _LOCATOR.size))
        if mark == b"PK\x06\x07":
            if where > at - _LOCATOR.size - _END64.size:
                corrupt(file, "no end of an archive")
            mark, *_, count, size, offset = _END64.unpack(file.read(where, _END64.size))
            end = where
            if mark != b"PK\x06\x06":
                corrupt(file, "no end of an archive")
    if offset + size > end:
        corrupt(file, "a directory beyond its end")
    return count, size, offset


def _directory(file: WeightFile, data: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    at = 0
    try:
        for _ in range(count):
            fields = _CENTRAL.unpack_from(data, at)
            mark, _, _, flags, method, _, _, _, packed, size, *lengths, _, _, _, header = fields
            name_bytes, extra_bytes, comment_bytes = lengths
            at += _CENTRAL.size
            name, extra = data[at : at + name_bytes], data[at + name_bytes : at + name_bytes + extra_bytes]
            at += name_bytes + extra_bytes + comment_bytes
            if mark != b"PK\x01\x02" or flags & 1:
                corrupt(file, "a directory that is not one, or encrypted records")
            if method:
                raise CheckpointError(
                    f"{file.path} is compressed",
                    got=name[:100].decode("utf-8", "replace"),
                    hint="save it again with torch.save, or as safetensors",
                )
            size, packed, header = _wide(extra, size, packed, header)
            if size != packed:
                corrupt(file, "a record whose two sizes differ")
            entries.append(_Entry(name, size, header))
    except struct.error:
        corrupt(file, "a directory that ends too early")
    if at != len(data):
        corrupt(file, f"{len(data) - at} bytes in the directory that belong to no record")
    return entries


def _wide(extra: bytes, *values: int) -> list[int]:
    """The values, those that are _FULL from the extra field of 64-bit numbers (APPNOTE 4.5.3), in order."""
    if _FULL not in values:
        return list(values)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{values.count(_FULL)}Q", extra[at + 4 : at + 4 + length]))
            return [next(wide) if value == _FULL else value for value in values]
        at += 4 + length
    raise struct.error


def _locate(file: WeightFile, entry: _Entry) -> Record:
    """Where the data of a record start, by its local header, which must agree with the directory."""
    head = file.read(entry.header, _LOCAL.size + len(entry.name))
    mark, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    agrees = name_bytes == len(entry.name) and head[_LOCAL.size :] == entry.name
    if mark != b"PK\x03\x04" or flags & 1 or method or not agrees:
        corrupt(file, f"no record at byte {entry.header}")
    return Record(entry.header + _LOCAL.size + name_bytes + extra_bytes, entry.size)
