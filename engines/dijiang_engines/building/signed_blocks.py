"""The graphs of a quantised bundle as TensorRT for RTX takes them, written before it parses.

Its parser (1.7.1) has neither MatMulNBits nor elements that are counted from 8 or 128, but DequantizeLinear
of signed ones in blocks, and its plans keep these in 4 or 8 bits. A stored byte holds q + 128, or two of
q + 8 (`weight_formats`); with the highest bit of each number inverted the same byte holds q. So

    MatMulNBits(x, W, scale)     DequantizeLinear(W signed, scale), Transpose, MatMul
    DijiangLinear(x, W, scale)   the same, in a graph with the plugin's attention
    Gather(W of bytes, ids)      Gather of the same as int32, and its bytes by arithmetic: a table of bytes
                                 would be in the plan in four times the size

The folder that the builder reads from gets a copy of weights.data, changed on the way; the bundle is as it
was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dijiang_engines.errors import BundleError
from dijiang_engines.formats import onnx_write as write
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.formats.onnx_external import UINT8, ExternalTensor, external_tensors
from dijiang_engines.formats.onnx_graph import LINEAR, MATMUL_NBITS, Node, read_graph
from dijiang_engines.formats.onnx_wire import as_bytes, fields
from dijiang_engines.formats.safe_files import LIMITS
from dijiang_engines.weight_formats import BLOCK, ZERO_BYTE, Matrix

OPSET, IR_VERSION = 21, 10
"""The first that have DequantizeLinear in blocks, and integers of 4 bits."""
PIECE = 8 << 20
"""Bytes of weights.data that are in memory at a time."""

_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET = 1, 7, 8  # ModelProto
_NODE, _INITIALIZER, _VALUE_INFO = 1, 5, 13  # GraphProto
_SIGNED = {"int8": 3, "int4": 22}  # TensorProto.DataType
_INT32, _FLOAT = 6, 1
_CASTS = {"float32": (_FLOAT,), "float16": (), "bfloat16": (_FLOAT, 16)}
"""By the type of activations: what scales are cast to, and weights after that. float16 are as stored."""
_REDUCTIONS = ("ReduceMax", "ReduceMean")  # axes: an attribute up to opset 17, an input since
_STEP, _ZERO = "signed_blocks.256", "signed_blocks.0"
_AXES, _SHAPE = "signed_blocks.axes", "signed_blocks.shape"


@dataclass
class SignedWeights:
    """Where weights are in the copy of weights.data.

    Attributes:
        end: the copy's size so far; it begins with everything that the bundle's has.
        gathered: names of tensors whose rows some graph reads as they are stored.
        flipped: (offset, length, bits to invert) of what is signed in its own place.
        appended: the same of what is there twice, and where it comes from: offset in the copy, then those.
    """

    end: int
    gathered: Set[str] = frozenset()
    flipped: dict[int, tuple[int, int]] = field(default_factory=dict)
    appended: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def place(self, stored: ExternalTensor, kind: str) -> int:
        """Where a matrix is signed.

        Args:
            stored: its elements in weights.data.
            kind: int8 or int4.
        """
        bits = ZERO_BYTE[kind]
        if stored.name not in self.gathered:
            self.flipped[stored.offset] = (stored.length, bits)
            return stored.offset
        for start, (offset, _, _) in self.appended.items():
            if offset == stored.offset:
                return start
        start, self.end = self.end, self.end + stored.length
        self.appended[start] = (stored.offset, stored.length, bits)
        return start


def write_signed(bundle: Bundle, graphs: Sequence[str], folder: Path) -> dict[str, Path]:
    """Write graphs of a quantised bundle, and their weights, for TensorRT for RTX.

    Args:
        bundle: whose weights are quantised.
        graphs: the bundle's names for them; with MatMulNBits, or the plugin's nodes.
        folder: exists, and is empty; gets weights.data and a file for each graph.

    Returns:
        The graphs' paths by name.

    Raises:
        BundleError: the bundle has no such graph, was changed meanwhile, or a graph is not one of its own.
        OSError: the folder cannot be written to.
    """
    assert bundle.quantisation is not None, "only quantised weights are rewritten"
    matrices = {part.stored_name: part for part in bundle.quantisation.stored}
    files = {name: bundle.graph_path(name).name for name in graphs}
    models = {name: bundle.opened.read(file, LIMITS["graph"]) for name, file in files.items()}
    gathered = {table for model in models.values() for table in tables(model)}
    weights = SignedWeights(bundle.files[WEIGHTS].bytes, gathered)
    found = {name: folder / file for name, file in files.items()}
    for name, model in models.items():
        found[name].write_bytes(rewrite(model, matrices, weights, bundle.dtype))
    with (
        bundle.opened.unchanged(WEIGHTS) as root,
        (root / WEIGHTS).open("rb") as source,
        (folder / WEIGHTS).open("wb") as target,
    ):
        copy_signed(source, target, weights)
    return found


def copy_signed(source: BinaryIO, target: BinaryIO, weights: SignedWeights) -> None:
    """Copy weights.data piece by piece, with what is signed changed, and what is there twice behind it."""
    position = 0
    for offset, (length, bits) in sorted(weights.flipped.items()):
        _copy(source, target, position, offset - position, 0)
        _copy(source, target, offset, length, bits)
        position = offset + length
    _copy(source, target, position, source.seek(0, 2) - position, 0)
    for start, (offset, length, bits) in sorted(weights.appended.items()):
        assert target.tell() == start, "the copy is as long as was planned"
        _copy(source, target, offset, length, bits)


def _copy(source: BinaryIO, target: BinaryIO, offset: int, length: int, bits: int) -> None:
    source.seek(offset)
    while length > 0:
        piece = source.read(min(length, PIECE))
        if not piece:
            raise BundleError("the weights end before they should", got=f"{length} bytes are missing")
        target.write((np.frombuffer(piece, np.uint8) ^ np.uint8(bits)).data if bits else piece)
        length -= len(piece)


def tables(model: bytes) -> Set[str]:
    """Names of what a graph's Gathers read."""
    return {node.inputs[0] for node in read_graph(model).nodes if node.operator == ("", "Gather")}


def rewrite(model: bytes, matrices: Mapping[str, Matrix], weights: SignedWeights, dtype: str) -> bytes:
    """A graph with signed weights.

    Args:
        model: a ModelProto of a bundle.
        matrices: by the names of their elements.
        weights: gets what becomes of each that the graph reads.
        dtype: of activations.

    Raises:
        BundleError: it is no graph of a bundle.
    """
    parts = []
    for number, wire, value in fields(memoryview(model)):
        if number == _MODEL_GRAPH:
            graph = _Rewriter(model, as_bytes(wire, value), matrices, weights, dtype)
            parts.append(write.field(number, graph.run()))
        elif number == _MODEL_OPSET and b"com.microsoft" in bytes(as_bytes(wire, value)):
            continue
        elif number == _MODEL_OPSET and b"dijiang" not in bytes(as_bytes(wire, value)):
            parts.append(write.field(number, write.field(1, "") + write.field(2, OPSET)))
        elif number == _MODEL_IR:
            parts.append(write.field(number, IR_VERSION))
        else:
            parts.append(write.field(number, value, wire))
    return b"".join(parts)


class _Rewriter:
    def __init__(
        self,
        model: bytes,
        message: memoryview,
        matrices: Mapping[str, Matrix],
        weights: SignedWeights,
        dtype: str,
    ) -> None:
        self._message, self._matrices, self._weights, self._dtype = message, matrices, weights, dtype
        self._nodes = read_graph(model).nodes
        self._places = {tensor.name: tensor for tensor in external_tensors(model)}
        self._scales = {matrix.scale_name for matrix in matrices.values()}
        self._tensors: dict[str, bytes] = {}
        """New initializers, by name; those of the old names are left out."""

    def run(self) -> bytes:
        """The GraphProto."""
        nodes = iter(self._nodes)
        parts: list[bytes] = []
        tensors: list[memoryview] = []
        for number, wire, value in fields(self._message):
            if number == _NODE:
                made = self._node(next(nodes), as_bytes(wire, value))
                parts += [write.field(_NODE, one) for one in made]
            elif number == _INITIALIZER:
                tensors.append(as_bytes(wire, value))
            elif number != _VALUE_INFO:  # shapes of what may not be there any more
                parts.append(write.field(number, value, wire))
        kept = [one for one in tensors if self._name(one) not in self._matrices]
        every: list[bytes | memoryview] = [*kept, *self._tensors.values()]
        return b"".join([*parts, *(write.field(_INITIALIZER, one) for one in every)])

    @staticmethod
    def _name(tensor: memoryview) -> str:
        return next(bytes(as_bytes(w, v)).decode() for number, w, v in fields(tensor) if number == 8)

    def _node(self, node: Node, message: memoryview) -> Iterator[bytes | memoryview]:
        kind = node.operator[1]
        if node.operator in (MATMUL_NBITS, LINEAR):
            yield from self._product(node)
        elif kind == "Gather" and node.inputs[0] in self._matrices:
            yield from self._rows(node)
        elif kind == "Cast" and node.inputs[0] in self._scales:
            return  # for MatMulNBits; a product casts its own
        elif kind in _REDUCTIONS and "axes" in node.attributes:
            yield self._reduction(node)
        else:
            yield message

    def _product(self, node: Node) -> Iterator[bytes]:
        """y [B, L, N] of x [B, L, K]."""
        x, stored = node.inputs[0], node.inputs[1]
        matrix, at = self._matrices[stored], node.outputs[0]
        weight, scale = self._signed(matrix), matrix.scale_name
        casts = _CASTS[self._dtype]
        for kind in casts[:1]:
            yield write.node("Cast", f"{at}/scale", [scale], [f"{at}/scale_output"], to=kind)
            scale = f"{at}/scale_output"
        dequantised = f"{at}/dequantised_output"
        yield write.node(
            "DequantizeLinear", f"{at}/dequantised", [weight, scale], [dequantised], axis=1, block_size=BLOCK
        )
        for kind in casts[1:]:
            yield write.node("Cast", f"{at}/weight", [dequantised], [f"{at}/weight_output"], to=kind)
            dequantised = f"{at}/weight_output"
        turned = f"{at}/turned_output"
        yield write.node("Transpose", f"{at}/turned", [dequantised], [turned], perm=(1, 0))
        yield write.node("MatMul", f"{at}/MatMul", [x, turned], node.outputs)

    def _signed(self, matrix: Matrix) -> str:
        """The name of a matrix's signed elements [N, K]."""
        name = f"{matrix.stored_name}.signed"
        if name not in self._tensors:
            old = self._places[matrix.stored_name]
            offset = self._weights.place(old, matrix.format)
            self._tensors[name] = write.external_tensor(
                name, _SIGNED[matrix.format], (matrix.rows, matrix.columns),
                location=WEIGHTS, offset=offset, length=old.length,
            )  # fmt: skip
        return name

    def _rows(self, node: Node) -> Iterator[bytes]:
        """Rows of bytes, as numbers from 0 to 255: int32 [B, L, E/32, 32]. With the plugin's nodes a graph
        does that itself."""
        matrix, ids = self._matrices[node.inputs[0]], node.inputs[1]
        old, name, at = self._places[matrix.stored_name], f"{matrix.stored_name}.words", node.outputs[0]
        words = (matrix.rows, matrix.columns // BLOCK, BLOCK // 4)
        self._tensors[name] = write.external_tensor(
            name, _INT32, words, location=WEIGHTS, offset=old.offset, length=old.length
        )
        bytes_of = old.data_type == UINT8
        rows = f"{at}/words_output" if bytes_of else node.outputs[0]
        yield write.node("Gather", f"{at}/words", [name, ids], [rows], axis=0)
        if bytes_of:
            yield from self._bytes(rows, node.outputs[0], at)

    def _bytes(self, words: str, result: str, at: str) -> Iterator[bytes]:
        """Little-endian; right whichever way a runtime rounds quotients, as `graph/quantised` of the exporter
        has it."""
        self._tensors[_STEP] = write.integers(_STEP, 256, wide=False)
        self._tensors[_ZERO] = write.integers(_ZERO, 0, wide=False)
        self._tensors[_AXES] = write.integers(_AXES, [4])
        self._tensors[_SHAPE] = write.integers(_SHAPE, [0, 0, 0, BLOCK])
        parts, rest = [], words
        for index in range(4):
            to, part, quotient = f"{at}/{index}", rest, ""
            if index < 3:
                quotient, whole, part = f"{to}/quotient", f"{to}/whole", f"{to}/part"
                yield write.node("Div", quotient, [rest, _STEP], [quotient])
                yield write.node("Mul", whole, [quotient, _STEP], [whole])
                yield write.node("Sub", part, [rest, whole], [part])
            less, below, more, byte = f"{to}/less", f"{to}/below", f"{to}/more", f"{to}/byte"
            yield write.node("Less", less, [part, _ZERO], [less])
            yield write.node("Cast", below, [less], [below], to=_INT32)
            yield write.node("Mul", more, [below, _STEP], [more])
            yield write.node("Add", byte, [part, more], [byte])
            parts.append(f"{to}/last")
            yield write.node("Unsqueeze", parts[-1], [byte, _AXES], [parts[-1]])
            if quotient:
                rest = f"{to}/rest"
                yield write.node("Sub", rest, [quotient, below], [rest])
        joined = f"{at}/joined"
        yield write.node("Concat", joined, parts, [joined], axis=-1)
        yield write.node("Reshape", f"{at}/bytes", [joined, _SHAPE], [result])

    def _reduction(self, node: Node) -> bytes:
        attributes = dict(node.attributes)
        axes, name = attributes.pop("axes"), f"{node.outputs[0]}/axes"
        if not isinstance(axes, tuple) or not all(type(v) is int for v in attributes.values()):
            raise BundleError(f"{node} is not one that the exporter writes", got=str(node.attributes)[:200])
        self._tensors[name] = write.integers(name, [int(axis) for axis in axes])
        kept = {key: value for key, value in attributes.items() if isinstance(value, int)}
        return write.node(node.operator[1], node.name, [node.inputs[0], name], node.outputs, **kept)
