"""The nodes and constants of an ONNX file, read without the onnx package, and what of ONNX bundles may use.

A runtime runs whatever graph it is given, so what a stranger's graph may hold is a closed list: one graph,
the operators that the exporter writes, attributes that are numbers and texts. What remains has no loops, no
branches and no functions, so each node runs once. How large its results get is `onnx_shapes`' question.

Field numbers: onnx/onnx.proto (onnx@v1.23.0).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.onnx_external import ITEM_BITS, MAX_RANK
from dijiang_engines.formats.onnx_wire import VARINT, as_bytes, as_int, fields, packed
from dijiang_engines.op_contract import DOMAIN, LINEAR_NAME, OP_NAME

Operator = tuple[str, str]
"""(domain, type); ONNX's own domain is empty."""

STANDARD: frozenset[Operator] = frozenset(
    ("", name)
    for name in (
        "Abs", "Add", "Cast", "Clip", "Concat", "Cos", "CumSum", "Div", "Erf", "Exp", "Expand", "Floor",
        "Gather", "GatherElements", "Gemm", "Greater", "GreaterOrEqual", "LayerNormalization", "Less",
        "MatMul", "Max", "Min", "Mul", "Pad", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean",
        "Relu", "Reshape", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub",
        "Tanh", "Transpose", "Unsqueeze",
    )
)  # fmt: skip
"""Operators of graphs in standard ONNX."""
PLUGIN: Operator = (DOMAIN, OP_NAME)
LINEAR_ATTENTION: Operator = ("com.microsoft", "LinearAttention")
OPERATORS: Mapping[str, frozenset[Operator]] = MappingProxyType(
    {".trt.onnx": STANDARD | {PLUGIN}, ".ort.onnx": STANDARD | {LINEAR_ATTENTION}, ".onnx": STANDARD}
)
"""By the end of a graph's file name, the first that fits: what its nodes may be."""
LINEAR: Operator = (DOMAIN, LINEAR_NAME)
MATMUL_NBITS: Operator = ("com.microsoft", "MatMulNBits")
DEQUANTIZE: Operator = ("", "DequantizeLinear")
PORTABLE = ".portable.onnx"


def operators(file: str, quantised: bool) -> frozenset[Operator]:
    """What the nodes of a bundle's graph may be.

    Args:
        file: its file's name; the end of it says which runtime the graph is for.
        quantised: the bundle's weights are. Then a product is MatMulNBits, for TensorRT DijiangLinear, and in
            a portable graph, which is for any runtime, DequantizeLinear before a MatMul.
    """
    allowed = next(some for end, some in OPERATORS.items() if file.endswith(end))
    if not quantised:
        return allowed
    if file.endswith(PORTABLE):
        return allowed | {DEQUANTIZE}
    return allowed | {LINEAR if PLUGIN in allowed else MATMUL_NBITS}


MAX_NODES_PER_LAYER = 256
"""The largest of the exporter, prefill with trained tables, have about 130, and 50 around the layers."""
KEPT_VALUES = 4096
"""Integers of a constant that are read; longer ones never say a shape."""

_INT32, _INT64 = 6, 7  # TensorProto.DataType
Attribute = int | float | str | tuple[int | float, ...]


@dataclass(frozen=True)
class Node:
    """One operation."""

    operator: Operator
    name: str
    inputs: tuple[str, ...]
    """Names of values; empty for an optional input that is left out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def __str__(self) -> str:
        domain, kind = self.operator
        return f"node {self.name!r} ({domain}::{kind})" if domain else f"node {self.name!r} ({kind})"


@dataclass(frozen=True)
class Constant:
    """An initializer."""

    shape: tuple[int, ...]
    data_type: int
    integers: npt.NDArray[np.int64] | None
    """The values of an int32 or int64 constant of at most KEPT_VALUES that lies in the graph, else None."""


@dataclass(frozen=True)
class Graph:
    """What runs."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_graph(model: bytes) -> Graph:
    """The graph of a serialised ModelProto.

    Raises:
        BundleError: it is not well-formed, or holds what graphs of a bundle have no use for: functions,
            training information, graphs or tensors in attributes, sparse tensors, a second graph.
    """
    graphs = []
    for number, wire, value in fields(memoryview(model)):
        if number in (20, 25):
            raise _foreign("functions" if number == 25 else "training information")
        if number == 7:
            graphs.append(as_bytes(wire, value))
    if len(graphs) != 1:
        raise BundleError("an ONNX file does not hold one graph", got=f"{len(graphs)}")
    nodes: list[Node] = []
    constants: dict[str, Constant] = {}
    names: dict[int, list[str]] = {11: [], 12: []}
    for number, wire, value in fields(graphs[0]):
        if number == 1:
            nodes.append(_node(as_bytes(wire, value)))
        elif number == 5:
            name, constant = _constant(as_bytes(wire, value))
            if name in constants:
                raise BundleError("two constants of a graph have one name", got=repr(name[:80]))
            constants[name] = constant
        elif number in names:  # ValueInfoProto
            names[number].append(_texts(as_bytes(wire, value), 1)[0])
        elif number == 15:
            raise _foreign("sparse tensors")
    return Graph(tuple(nodes), constants, tuple(names[11]), tuple(names[12]))


def check_operators(graph: Graph, file: str, layers: int, *, quantised: bool = False) -> None:
    """Refuse what the exporter never writes.

    Args:
        graph: of a bundle.
        file: its file's name, and
        quantised: whether the bundle's weights are: as for `operators`.
        layers: of the model.

    Raises:
        BundleError: an operator that is not in the list, or too many nodes.
    """
    allowed = operators(file, quantised)
    for node in graph.nodes:
        if node.operator not in allowed:
            domain, kind = node.operator
            raise BundleError(
                f"the operator {kind!r} of {node} is not one that a bundle's graph may use",
                got=f"domain {domain!r}" if domain else None,
                expected=", ".join(sorted(kind for _, kind in allowed)),
                hint="export the checkpoint again with this version of dijiang-export",
            )
    most = MAX_NODES_PER_LAYER * (layers + 1)
    if len(graph.nodes) > most:
        raise BundleError("a graph has too many nodes", got=len(graph.nodes), expected=f"at most {most}")


def _node(message: memoryview) -> Node:
    inputs: list[str] = []
    outputs: list[str] = []
    singles: dict[int, str] = {}
    attributes: dict[str, Attribute] = {}
    for number, wire, value in fields(message):
        if number in (1, 2):
            (inputs if number == 1 else outputs).append(_text(as_bytes(wire, value)))
        elif number in (3, 4, 7, 8):  # name, op_type, domain, overload
            if number in singles:
                raise BundleError("a node of an ONNX file states its type twice")
            singles[number] = _text(as_bytes(wire, value))
        elif number == 5:
            name, attribute = _attribute(as_bytes(wire, value))
            if name in attributes:
                raise BundleError("a node of an ONNX file has an attribute twice", got=repr(name[:80]))
            attributes[name] = attribute
    if singles.get(8):
        raise _foreign("functions")
    operator = (singles.get(7, ""), singles.get(4, ""))
    return Node(operator, singles.get(3, "")[:200], tuple(inputs), tuple(outputs), attributes)


def _attribute(message: memoryview) -> tuple[str, Attribute]:
    name = ""
    single: Attribute | None = None
    many: list[int | float] = []
    for number, wire, value in fields(message):
        if number == 1:
            name = _text(as_bytes(wire, value))
        elif number == 2 and isinstance(value, memoryview) and len(value) == 4:
            single = float(struct.unpack("<f", value)[0])
        elif number == 3:
            single = _signed(as_int(wire, value))
        elif number == 4:
            single = _text(as_bytes(wire, value))
        elif number == 7 and isinstance(value, memoryview) and len(value) % 4 == 0:
            many += struct.unpack(f"<{len(value) // 4}f", value)
        elif number == 8:
            many += [_signed(v) for v in ([value] if isinstance(value, int) else packed(wire, value))]
        elif number not in (13, 20):  # doc_string, type
            raise _foreign("attributes that are neither numbers nor texts")
    return name, tuple(many) if single is None else single


def _constant(message: memoryview) -> tuple[str, Constant]:
    name, data_type = "", 0
    dims: list[int] = []
    numbers: list[int] = []
    raw: memoryview | None = None
    for number, wire, value in fields(message):
        if number == 1:
            dims += [value] if isinstance(value, int) and wire == VARINT else packed(wire, value)
        elif number == 2:
            data_type = as_int(wire, value)
        elif number in (5, 7):  # int32_data, int64_data
            numbers += [value] if isinstance(value, int) else packed(wire, value)
        elif number == 8:
            name = _text(as_bytes(wire, value))
        elif number == 9:
            raw = as_bytes(wire, value)
    if data_type not in ITEM_BITS:
        raise BundleError(
            f"constant {name[:80]!r} has an element type that models have no use for", got=data_type
        )
    if len(dims) > MAX_RANK or any(dim >= 2**63 for dim in dims):
        raise BundleError(
            f"constant {name[:80]!r} has a shape that no tensor of a model has", got=f"{len(dims)} dimensions"
        )
    return name, Constant(tuple(dims), data_type, _integers(dims, data_type, raw, numbers))


def _integers(
    dims: list[int], data_type: int, raw: memoryview | None, numbers: list[int]
) -> npt.NDArray[np.int64] | None:
    count = int(np.prod(np.array(dims, dtype=object), initial=1))
    if data_type not in (_INT32, _INT64) or count > KEPT_VALUES:
        return None
    if raw is not None:
        kind = "<i4" if data_type == _INT32 else "<i8"
        values = np.frombuffer(raw, kind) if len(raw) == count * int(kind[2]) else None
    else:
        values = np.array([_signed(v) for v in numbers]) if len(numbers) == count else None
    return None if values is None else values.astype(np.int64).reshape(dims)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _texts(message: memoryview, field: int) -> list[str]:
    found = [_text(as_bytes(wire, value)) for number, wire, value in fields(message) if number == field]
    return found or [""]


def _text(data: memoryview) -> str:
    return bytes(data).decode("utf-8", "backslashreplace")


def _foreign(what: str) -> BundleError:
    return BundleError(f"a graph of a bundle may not hold {what}")
