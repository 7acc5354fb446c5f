"""A prefill whose quantised weights are floats from the start: `--prepack wide`.

ONNX Runtime widens an int8 matrix anew in every call that multiplies with floats, and cannot pack what it
has widened. Here each such product is MatMul with a float32 matrix [K, N] that is made once, which it packs.
q · scale, of 8 and 11 bits, is exact in float32: the products are those of before, added up in another order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dijiang_engines.formats import onnx_write as write
from dijiang_engines.formats.onnx_external import ExternalTensor, external_tensors
from dijiang_engines.formats.onnx_graph import MATMUL_NBITS, Node, read_graph
from dijiang_engines.formats.onnx_wire import as_bytes, fields
from dijiang_engines.weight_formats import BLOCK, ZERO, Matrix

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER = 1, 5  # of GraphProto
_FLOAT = 1  # TensorProto.DataType
_AT_ONCE = 1 << 20
"""Elements of a matrix that are widened at a time."""


@dataclass(frozen=True)
class Widened:
    """What a session is made of.

    Attributes:
        model: a ModelProto; its new initializers say that they are in weights.data, and are not.
        arrays: they are here, by name, each [K, N].
    """

    model: bytes
    arrays: Mapping[str, Floats]


def is_float_product(node: Node) -> bool:
    """Whether it multiplies activations as they are, and not rounded to int8."""
    return node.operator == MATMUL_NBITS and node.attributes.get("accuracy_level", 0) == 0


def widen(model: bytes, matrices: Iterable[Matrix], data: Bytes, location: str) -> Widened:
    """Replace a checked graph's products of quantised weights and floats.

    Args:
        model: the ModelProto of a bundle's graph with MatMulNBits, whose activations are float32.
        matrices: the bundle's.
        data: its weights.data.
        location: that file's name.

    Returns:
        No arrays if the graph has no such product.
    """
    stored = {matrix.stored_name: matrix for matrix in matrices}
    places = {tensor.name: tensor for tensor in external_tensors(model)}
    nodes = iter(read_graph(model).nodes)
    arrays: dict[str, Floats] = {}

    def product(node: Node) -> bytes:
        matrix = stored[node.inputs[1]]
        name = f"{matrix.name}.wide"
        if name not in arrays:
            arrays[name] = widened(matrix, places, data)
        return write.node("MatMul", node.name, [node.inputs[0], name], node.outputs)

    def graph(message: memoryview) -> bytes:
        parts = []
        for number, wire, value in fields(message):
            node = next(nodes) if number == _NODE else None
            if node is not None and is_float_product(node):
                parts.append(write.field(_NODE, product(node)))
            else:
                parts.append(write.field(number, value, wire))
        for name, array in arrays.items():
            tensor = write.external_tensor(
                name, _FLOAT, array.shape, location=location, offset=0, length=array.nbytes
            )
            parts.append(write.field(_INITIALIZER, tensor))
        return b"".join(parts)

    made = [
        write.field(number, graph(as_bytes(wire, value)))
        if number == _GRAPH
        else write.field(number, value, wire)
        for number, wire, value in fields(memoryview(model))
    ]
    return Widened(b"".join(made), arrays)


def widened(matrix: Matrix, places: Mapping[str, ExternalTensor], data: Bytes) -> Floats:
    """A stored matrix as float32 [K, N].

    Args:
        matrix: which.
        places: of its elements and scales in `data`, by name.
    """

    def stored(name: str) -> Bytes:
        place = places[name]
        return data[place.offset : place.offset + place.length]

    elements = stored(matrix.stored_name).reshape(matrix.stored_shape)
    scales = stored(matrix.scale_name).view(np.float16).reshape(matrix.scale_shape)
    found = np.empty((matrix.columns, matrix.rows), np.float32)
    each = max(1, _AT_ONCE // matrix.columns)
    for start in range(0, matrix.rows, each):
        rows = slice(start, min(start + each, matrix.rows))
        values = _integers(elements[rows], matrix) * scales[rows, :, None].astype(np.float32)
        found[:, rows] = values.reshape(-1, matrix.columns).T
    return found


def _integers(elements: Bytes, matrix: Matrix) -> Floats:
    """[n, K/32, 32] of stored bytes."""
    if matrix.bits == 8:
        values = elements
    else:
        values = np.empty((*elements.shape[:2], BLOCK), np.uint8)
        values[..., 0::2], values[..., 1::2] = elements & 15, elements >> 4
    found: Floats = values.astype(np.float32)
    found -= ZERO[matrix.format]
    return found
