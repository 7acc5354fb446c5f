"""Where an ONNX file keeps its weights, read without the onnx package.

A device that runs a bundle has ONNX Runtime or TensorRT, but not `onnx`. Before a runtime is given a
graph, the places that it would read from must be known to be harmless: ONNX Runtime, for one, takes
some spellings of an external location for an address in memory. This module walks the protobuf wire
format of a ModelProto and returns every tensor that claims external data, wherever it hides: initializers,
sparse initializers, node attributes, subgraphs, functions and training information.

It is deliberately stricter than a protobuf parser. Whatever two parsers could read differently (a
repeated key, a tensor marked external without a location, a group) is refused.

The field numbers are those of onnx/onnx.proto (onnx@v1.23.0), which never change within ONNX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.onnx_wire import VARINT, as_bytes, as_int, fields, packed

MAX_DEPTH = 64
"""Nesting of messages; a graph in a node in a graph counts three. Real exports reach about 10."""

MAX_RANK = 8
"""Dimensions of a tensor; those of a model have at most five."""

# Message kind -> field number -> kind of the message in that field. Fields that cannot lead to a tensor
# are skipped unread.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}

_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
_LOCATION_EXTERNAL = 1

UINT8, UINT4 = 2, 21  # TensorProto.DataType
# TensorProto.DataType -> bits of one element, for the types that weights come in.
ITEM_BITS = {
    1: 32, UINT8: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, UINT4: 4,
}  # fmt: skip

_KEYS = ("location", "offset", "length", "checksum")


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes are in another file."""

    name: str
    data_type: int
    """TensorProto.DataType: 1 float32, 10 float16, 16 bfloat16, 7 int64, ..."""
    dims: tuple[int, ...]
    location: str
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""


def external_tensors(model: bytes) -> list[ExternalTensor]:
    """Every tensor of a serialised ModelProto that keeps its data in another file, in file order.

    Raises:
        BundleError: the bytes are not a well-formed model, or a tensor's external data is stated in a
            way that readers could take differently.
    """
    found: list[ExternalTensor] = []
    view = memoryview(model)
    stack = [("model", view, 1)]
    has_graph = False
    while stack:
        kind, message, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise BundleError("an ONNX graph is nested too deeply", expected=f"at most {MAX_DEPTH} levels")
        if kind == "tensor":
            tensor = _tensor(message)
            if tensor is not None:
                found.append(tensor)
            continue
        children = _CHILDREN[kind]
        nested = []
        for number, wire, value in fields(message):
            child = children.get(number)
            if child is None:
                continue
            nested.append((child, as_bytes(wire, value), depth + 1))
            has_graph = has_graph or (kind == "model" and number == 7)
        stack.extend(reversed(nested))
    if not has_graph:
        raise BundleError("an ONNX file holds no graph")
    return found


def check_external_data(model: bytes, *, location: str, file_bytes: int) -> list[ExternalTensor]:
    """The external tensors of a model, all of them inside the one file that they may use.

    Args:
        model: a serialised ModelProto.
        location: the only file name that may be named, exactly.
        file_bytes: that file's size.

    Raises:
        BundleError: a tensor names another file, lies (partly) outside the file, or has a length that
            is not its shape's.
    """
    tensors = external_tensors(model)
    for tensor in tensors:
        if tensor.location != location:
            raise BundleError(
                f"tensor {tensor.name!r} keeps its data outside the bundle's weights",
                got=repr(tensor.location[:200]),
                expected=repr(location),
            )
        if tensor.offset + tensor.length > file_bytes:
            raise BundleError(
                f"tensor {tensor.name!r} lies outside {location}",
                got=f"bytes {tensor.offset} to {tensor.offset + tensor.length}",
                expected=f"at most {file_bytes} bytes",
            )
        bits = ITEM_BITS.get(tensor.data_type)
        if bits is None:
            raise BundleError(
                f"tensor {tensor.name!r} has an element type that weights do not come in",
                got=f"TensorProto.DataType {tensor.data_type}",
            )
        size = -(-bits * math.prod(tensor.dims) // 8)
        if size != tensor.length:
            raise BundleError(
                f"tensor {tensor.name!r} has another length than its shape",
                got=f"{tensor.length} bytes for {list(tensor.dims)}",
                expected=f"{size} bytes",
            )
    return tensors


def _tensor(message: memoryview) -> ExternalTensor | None:
    dims: list[int] = []
    data_type = 0
    name = ""
    external = False
    entries: dict[str, str] = {}
    for number, wire, value in fields(message):
        if number == _TENSOR_DIMS:
            # proto2 repeated int64: one varint a field, or (packed) many in one run of bytes.
            dims.extend([value] if isinstance(value, int) and wire == VARINT else packed(wire, value))
        elif number == _TENSOR_TYPE:
            data_type = as_int(wire, value)
        elif number == _TENSOR_NAME:
            name = bytes(as_bytes(wire, value)[:200]).decode("utf-8", "replace")
        elif number == _TENSOR_LOCATION:
            external = external or as_int(wire, value) == _LOCATION_EXTERNAL
        elif number == _TENSOR_EXTERNAL:
            key, text = _entry(as_bytes(wire, value))
            if key in entries or key not in _KEYS:
                raise BundleError(
                    f"tensor {name!r} states its external data in an unknown way",
                    got=repr(key[:80]),
                    expected="location, offset and length, once each",
                )
            entries[key] = text
    if not external and not entries:
        return None
    if any(key not in entries for key in ("location", "offset", "length")):
        raise BundleError(
            f"tensor {name!r} keeps its data outside the graph but does not say where",
            got=", ".join(sorted(entries)) or "nothing",
            expected="location, offset and length",
        )
    if len(dims) > MAX_RANK:
        raise BundleError(f"tensor {name!r} has too many dimensions", got=len(dims), expected=MAX_RANK)
    if any(dim >= 2**63 for dim in dims):
        raise BundleError(f"tensor {name!r} has a negative dimension")
    return ExternalTensor(
        name, data_type, tuple(dims), entries["location"],
        _decimal(name, "offset", entries["offset"]), _decimal(name, "length", entries["length"]),
    )  # fmt: skip


def _decimal(name: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BundleError(f"tensor {name!r} has a bad {key}", got=repr(text[:80]), expected="a byte count")
    return int(text)


def _entry(message: memoryview) -> tuple[str, str]:
    texts: dict[int, str] = {}
    for number, wire, value in fields(message):
        if number not in (1, 2) or number in texts:
            raise BundleError("an ONNX file's external data entry is malformed")
        try:
            texts[number] = bytes(as_bytes(wire, value)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError("an ONNX file's external data entry is not text") from error
    return texts.get(1, ""), texts.get(2, "")
