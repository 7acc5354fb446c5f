"""Messages of ONNX files, written without the onnx package: as much as rewriting a graph takes.

Field numbers: onnx/onnx.proto (onnx@v1.23.0); all functions give a message's bytes without its own key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dijiang_engines.formats.onnx_wire import BYTES, FIXED32, FIXED64, VARINT

_INT, _INTS = 2, 7  # AttributeProto.AttributeType
_INT32, _INT64 = 6, 7  # TensorProto.DataType
_EXTERNAL = 1  # TensorProto.DataLocation


def field(number: int, value: int | str | bytes | memoryview, wire: int | None = None) -> bytes:
    """One field, with its key.

    Args:
        number: of the field.
        value: a number, or what is written with its length before it.
        wire: of a value that `onnx_wire.fields` gave; default: what the value's type says.
    """
    if wire is None:
        wire = VARINT if isinstance(value, int) else BYTES
    key = varint(number << 3 | wire)
    if isinstance(value, int):
        return key + varint(value)
    data = value.encode() if isinstance(value, str) else bytes(value)
    return key + data if wire in (FIXED32, FIXED64) else key + varint(len(data)) + data


def varint(value: int) -> bytes:
    """A number as protobuf writes it; negative ones as 64 bits."""
    value &= 2**64 - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def external_tensor(
    name: str, data_type: int, shape: Sequence[int], *, location: str, offset: int, length: int
) -> bytes:
    """A TensorProto whose data is in a file.

    Args:
        name: of the tensor.
        data_type: TensorProto.DataType.
        shape: of the tensor.
        location: the file, beside the graph.
        offset, length: of the data there, in bytes.
    """
    entries = (("location", location), ("offset", str(offset)), ("length", str(length)))
    parts = [field(1, dim) for dim in shape] + [field(2, data_type), field(8, name)]
    parts += [field(13, field(1, key) + field(2, text)) for key, text in entries]
    return b"".join([*parts, field(14, _EXTERNAL)])


def integers(name: str, values: Sequence[int] | int, *, wide: bool = True) -> bytes:
    """A TensorProto of int64, or int32 unless `wide`: of one dimension, or of none for a single number."""
    array = np.array(values, "<i8" if wide else "<i4")
    parts = [field(1, dim) for dim in array.shape]
    parts += [field(2, _INT64 if wide else _INT32), field(8, name), field(9, array.tobytes())]
    return b"".join(parts)


def node(
    kind: str, name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | Sequence[int]
) -> bytes:
    """A NodeProto of ONNX's own domain."""
    parts = [field(1, text) for text in inputs] + [field(2, text) for text in outputs]
    parts += [field(3, name), field(4, kind)]
    for key, value in attributes.items():
        if isinstance(value, int):
            parts.append(field(5, field(1, key) + field(3, value) + field(20, _INT)))
        else:
            numbers = b"".join(field(8, number) for number in value)
            parts.append(field(5, field(1, key) + numbers + field(20, _INTS)))
    return b"".join(parts)
