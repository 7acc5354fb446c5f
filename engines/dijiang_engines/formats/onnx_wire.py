"""Protobuf's wire format, as far as ONNX files need it, stricter than a parser: no groups, no long integers.

All raise BundleError for what is not well-formed.
"""

from __future__ import annotations

from collections.abc import Iterator

from dijiang_engines.errors import BundleError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """(field number, wire type, value) of each field: an int for varints, else the raw bytes."""
    position, end = 0, len(message)
    while position < end:
        key, position = varint(message, position)
        number, wire = key >> 3, key & 7
        if number == 0 or number >= 2**29:
            raise malformed("field number 0 or too large")
        value: int | memoryview
        if wire == VARINT:
            value, position = varint(message, position)
        else:
            if wire == BYTES:
                length, position = varint(message, position)
            elif wire == FIXED64:
                length = 8
            elif wire == FIXED32:
                length = 4
            else:
                raise malformed(f"wire type {wire}")
            if length > end - position:
                raise malformed("a field runs past the end")
            value = message[position : position + length]
            position += length
        yield number, wire, value


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """The integer at `position`, and where it ends."""
    result = shift = 0
    end = len(message)
    while position < end:
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if result >= 2**64:
                raise malformed("an integer of more than 64 bits")
            return result, position
        shift += 7
        if shift >= 70:
            break
    raise malformed("an integer that does not end")


def packed(wire: int, value: int | memoryview) -> list[int]:
    """The integers of a packed field."""
    data = as_bytes(wire, value)
    result, position = [], 0
    while position < len(data):
        number, position = varint(data, position)
        result.append(number)
    return result


def as_bytes(wire: int, value: int | memoryview) -> memoryview:
    """A field's value as a message or text."""
    if wire != BYTES or isinstance(value, int):
        raise malformed("a number where a message or text belongs")
    return value


def as_int(wire: int, value: int | memoryview) -> int:
    """A field's value as a number."""
    if wire != VARINT or not isinstance(value, int):
        raise malformed("text where a number belongs")
    return value


def malformed(why: str) -> BundleError:
    """The error for a file that no parser would read, or not every parser alike."""
    return BundleError("not a well-formed ONNX file", got=why)
