"""Quantised matrices in a bundle's graphs: what reads them, and that they are those of the manifest.

com.microsoft::MatMulNBits (ContribOperators.md of onnxruntime@v1.32.0) has inputs A [.., K], B uint8
[N, K/32, bits·4] and scales [N, K/32], attributes K, N, bits, block_size and optionally accuracy_level; other
inputs and attributes bundles have no use for. DequantizeLinear (onnx@v1.23.0, opset 21) has elements [N, K],
and scales and zero points [N, K/32]. DijiangLinear is as `op_contract.linear_fields` says. A runtime
multiplies with what these say, and trusts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.onnx_external import UINT4, UINT8
from dijiang_engines.formats.onnx_graph import DEQUANTIZE, LINEAR, MATMUL_NBITS, Constant, Graph, Node
from dijiang_engines.op_contract import linear_fields
from dijiang_engines.weight_formats import BLOCK, Matrix

_INT32, _FLOAT16 = 6, 10  # TensorProto.DataType
_LEVELS = (0, 1, 2, 3, 4)


def check_quantised(graph: Graph, matrices: Sequence[Matrix]) -> None:
    """Check every node that reads quantised matrices, and the shape and type of each that the graph has.

    Raises:
        BundleError: a node reads something else, or in another way than the exporter writes.
    """
    known = {matrix.stored_name: matrix for matrix in matrices}
    scales = {matrix.scale_name: matrix for matrix in matrices}
    for name, matrix in scales.items():
        if name in graph.constants:
            _check_constant(name, graph.constants[name], {(_FLOAT16, matrix.scale_shape)})
    for name, matrix in known.items():
        if name in graph.constants:
            _check_constant(name, graph.constants[name], _stored_as(matrix))
    casts = {node.outputs[0]: node.inputs[0] for node in graph.nodes if _is_cast(node)}
    for node in graph.nodes:
        if node.operator == MATMUL_NBITS:
            matrix = _matrix_of(node, 1, graph.constants, known, casts, scale=2)
            _check_nbits(node, matrix, graph.constants[matrix.stored_name])
        elif node.operator == DEQUANTIZE:
            matrix = _matrix_of(node, 0, graph.constants, known, casts, scale=1)
            _check_dequantise(node, matrix, graph.constants)
        elif node.operator == LINEAR:
            matrix = _matrix_of(node, 1, graph.constants, known, {}, scale=2)
            _check_linear(node, matrix, graph.constants[matrix.stored_name])


def _stored_as(matrix: Matrix) -> set[tuple[int, tuple[int, ...]]]:
    """MatMulNBits' bytes, DequantizeLinear's elements, or DijiangLinear's words."""
    whole = (UINT8 if matrix.bits == 8 else UINT4, (matrix.rows, matrix.columns))
    return {(UINT8, matrix.stored_shape), whole, (_INT32, _words(matrix))}


def _words(matrix: Matrix) -> tuple[int, int, int]:
    rows, blocks, width = matrix.stored_shape
    return (rows, blocks, width // 4)


def _check_constant(name: str, constant: Constant, expected: set[tuple[int, tuple[int, ...]]]) -> None:
    if (constant.data_type, constant.shape) not in expected:
        raise BundleError(
            f"the quantised matrix {name[:80]!r} of a graph has another type or shape than the manifest says",
            got=f"TensorProto.DataType {constant.data_type}, {list(constant.shape)}",
            expected=" or ".join(f"{kind}, {list(shape)}" for kind, shape in sorted(expected)),
        )


def _is_cast(node: Node) -> bool:
    return node.operator == ("", "Cast") and len(node.inputs) == 1 and len(node.outputs) == 1


def _matrix_of(
    node: Node,
    index: int,
    constants: Mapping[str, Constant],
    known: Mapping[str, Matrix],
    casts: Mapping[str, str],
    scale: int,
) -> Matrix:
    """The matrix whose elements are the node's input `index`, and whose scales are its input `scale`."""
    name = node.inputs[index] if index < len(node.inputs) else ""
    matrix = known.get(name)
    if matrix is None or name not in constants:
        raise BundleError(f"{node} reads what is no quantised matrix of the model", got=repr(name[:80]))
    given = node.inputs[scale] if scale < len(node.inputs) else ""
    given = casts.get(given, given)
    if given != matrix.scale_name or given not in constants:
        raise BundleError(
            f"{node} does not read the matrix's own scales",
            got=repr(given[:80]),
            expected=repr(matrix.scale_name),
        )
    return matrix


def _check_nbits(node: Node, matrix: Matrix, stored: Constant) -> None:
    _check_constant(matrix.stored_name, stored, {(UINT8, matrix.stored_shape)})
    expected = {"K": matrix.columns, "N": matrix.rows, "bits": matrix.bits, "block_size": BLOCK}
    found = dict(node.attributes)
    level = found.pop("accuracy_level", 0)
    if len(node.inputs) != 3 or any(type(value) is not int for value in found.values()) or found != expected:
        raise BundleError(
            f"the attributes of {node} are not those of its matrix",
            got=f"{len(node.inputs)} inputs, {found}"[:200],
            expected=f"3 inputs, {expected}",
        )
    if type(level) is not int or level not in _LEVELS:
        raise BundleError(f"{node} has an unknown accuracy_level", got=repr(level)[:80])


def _check_linear(node: Node, matrix: Matrix, stored: Constant) -> None:
    _check_constant(matrix.stored_name, stored, {(_INT32, _words(matrix))})
    found = dict(node.attributes)
    expected = [_tuples(linear_fields(matrix.format, dtype)) for dtype in (1, 2)]
    if len(node.inputs) != 3 or found not in expected:
        raise BundleError(
            f"the attributes of {node} are not those of its matrix",
            got=f"{len(node.inputs)} inputs, {found}"[:300],
            expected=f"3 inputs, {expected[0]}",
        )


def _tuples(fields: Mapping[str, list[int] | list[float] | str]) -> dict[str, object]:
    return {name: value if isinstance(value, str) else tuple(value) for name, value in fields.items()}


def _check_dequantise(node: Node, matrix: Matrix, constants: Mapping[str, Constant]) -> None:
    expected = {"axis": 1, "block_size": BLOCK}
    zero = constants.get(node.inputs[2]) if len(node.inputs) == 3 else None
    kind = UINT8 if matrix.bits == 8 else UINT4
    _check_constant(
        matrix.stored_name, constants[matrix.stored_name], {(kind, (matrix.rows, matrix.columns))}
    )
    good = zero is not None and (zero.data_type, zero.shape) == (kind, matrix.scale_shape)
    if not good or dict(node.attributes) != expected:
        raise BundleError(
            f"{node} does not dequantise its matrix in blocks of a row",
            got=f"{dict(node.attributes)}"[:200],
            expected=f"{expected}, and zero points of the shape of its scales",
        )
