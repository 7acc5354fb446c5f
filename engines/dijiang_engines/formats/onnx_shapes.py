"""How large the values of a graph get: each node's output shape, from its inputs' shapes alone.

Even a closed list of operators can ask for any amount of memory: an Expand to [2^40], a Range, an outer
product. Here a graph is walked for one size of call, without its weights: shapes are inferred, and integers
that say shapes (what Shape, and arithmetic on it and on constants, gives) are computed. A value with more
elements than `most` allows, and a shape that depends on what the inputs hold, are errors.

Rules: Operators.md of onnx@v1.23.0, opsets 17 and 21; com.microsoft::LinearAttention as
exporter/dijiang_export/graph/body_ort.py describes it, MatMulNBits as `quantised.graph` does;
DijiangAttention as docs/op-contract.md does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.onnx_external import MAX_RANK
from dijiang_engines.formats.onnx_graph import (
    DEQUANTIZE,
    KEPT_VALUES,
    LINEAR,
    LINEAR_ATTENTION,
    MATMUL_NBITS,
    PLUGIN,
    Graph,
    Node,
)
from dijiang_engines.op_contract import INPUTS
from dijiang_engines.weight_formats import BLOCK

_INPUTS = [formal.name for formal in INPUTS]

Shape = tuple[int, ...]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Value:
    """What is known of one value."""

    shape: Shape
    integers: Integers | None = None
    """If it is small, integer and follows from the size of the call alone."""


class _Unknown(Exception):
    """A rule cannot be applied: the reason."""


def infer_shapes(graph: Graph, inputs: Mapping[str, Shape], most: int) -> dict[str, Shape]:
    """The shape of every value.

    Args:
        graph: any graph of the operators in `onnx_graph.OPERATORS`.
        inputs: name -> shape of the graph's inputs.
        most: elements that a node's output may have.

    Raises:
        BundleError: a node's output is larger, its shape does not follow from the inputs' shapes, a value is
            made twice, or used before it is made.
    """
    values = {name: Value(shape) for name, shape in inputs.items()}
    values |= {name: Value(constant.shape, constant.integers) for name, constant in graph.constants.items()}
    for node in graph.nodes:
        try:
            made = _apply(node, [values[name] if name else None for name in node.inputs], most)
        except KeyError as error:
            raise BundleError(f"{node} uses a value that is not there yet", got=str(error)[:200]) from None
        except (_Unknown, ValueError, IndexError, TypeError, OverflowError, AttributeError) as error:
            raise BundleError(
                f"the shape of what {node} makes cannot be told", got=str(error)[:200]
            ) from None
        for name, value in zip(node.outputs, made, strict=False):
            if math.prod(value.shape) > most or len(value.shape) > MAX_RANK:
                raise _too_large(node, value.shape, most)
            if name in values:
                raise BundleError(f"{node} makes a value that is there already", got=repr(name[:80]))
            if name:
                values[name] = value
    return {name: value.shape for name, value in values.items()}


def _apply(node: Node, inputs: Sequence[Value | None], most: int) -> list[Value]:
    rule = _RULES.get(node.operator)
    if rule is None:
        raise _Unknown("no rule for this operator")
    count = len(node.outputs)
    made = rule(_Call(node, inputs, most))
    if len(made) < count:
        raise _Unknown(f"{count} outputs")
    return made


@dataclass(frozen=True)
class _Call:
    node: Node
    inputs: Sequence[Value | None]
    most: int

    def __getitem__(self, index: int) -> Value:
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise _Unknown(f"no input {index}")
        return value

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def integers(self, index: int) -> list[int]:
        """The values of an input that says a shape or axes."""
        found = self[index].integers
        if found is None:
            raise _Unknown("it depends on what the inputs hold")
        return [int(v) for v in found.reshape(-1)]

    def attribute(self, name: str, default: Any = None) -> Any:
        value = self.node.attributes.get(name, default)
        if value is None:
            raise _Unknown(f"no attribute {name}")
        return value

    def axes(self, rank: int) -> list[int]:
        """Axes in an attribute or the second input; all of them if there are none."""
        if self.has(1):
            given = self.integers(1)
        else:
            given = list(self.node.attributes.get("axes", range(rank)))  # type: ignore[arg-type]
        axes = [_axis(axis, rank) for axis in given]
        if len(set(axes)) < len(axes):
            raise _Unknown(f"an axis twice in {given[:8]}")
        return axes


def _same(call: _Call) -> list[Value]:
    return [Value(call[0].shape)]


def _broadcast(operation: Callable[[Any, Any], Any] | None = None) -> Callable[[_Call], list[Value]]:
    def rule(call: _Call) -> list[Value]:
        inputs = [call[index] for index in range(len(call.inputs))]
        shape = _broadcast_shapes(call, *(value.shape for value in inputs))
        integers = None
        if operation is not None and all(v.integers is not None for v in inputs) and _is_small(shape):
            with np.errstate(all="ignore"):
                integers = inputs[0].integers
                for other in inputs[1:]:
                    integers = operation(integers, other.integers)
        return [Value(shape, integers)]

    return rule


def _broadcast_shapes(call: _Call, *shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    result = []
    for index in range(rank):
        sizes = {shape[index - rank + len(shape)] for shape in shapes if index - rank + len(shape) >= 0} - {1}
        if len(sizes) > 1:
            raise _Unknown(f"the shapes {', '.join(map(str, shapes))} do not go together")
        result.append(sizes.pop() if sizes else 1)
    return tuple(result)


def _divide(a: Integers, b: Integers) -> Integers:
    """ONNX's integer division cuts towards zero."""
    if np.any(b == 0):
        raise _Unknown("a division by zero")
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), np.int64)


def _cast(call: _Call) -> list[Value]:
    integer = call.attribute("to") in (6, 7)  # TensorProto.INT32, INT64
    return [Value(call[0].shape, call[0].integers if integer else None)]


def _concat(call: _Call) -> list[Value]:
    inputs = [call[index] for index in range(len(call.inputs))]
    rank = len(inputs[0].shape)
    axis = _axis(call.attribute("axis"), rank)
    rests = {value.shape[:axis] + value.shape[axis + 1 :] for value in inputs}
    if len(rests) > 1 or any(len(value.shape) != rank for value in inputs):
        raise _Unknown("the shapes do not go together")
    size = sum(value.shape[axis] for value in inputs)
    shape = (*inputs[0].shape[:axis], size, *inputs[0].shape[axis + 1 :])
    parts = [value.integers for value in inputs if value.integers is not None]
    known = len(parts) == len(inputs) and _is_small(shape)
    return [Value(shape, np.concatenate(parts, axis) if known else None)]


def _expand(call: _Call) -> list[Value]:
    shape = _broadcast_shapes(call, call[0].shape, _sizes(call.integers(1)))
    return [Value(shape)]


def _gather(call: _Call) -> list[Value]:
    data, index = call[0], call[1]
    axis = _axis(call.attribute("axis", 0), len(data.shape))
    shape = data.shape[:axis] + index.shape + data.shape[axis + 1 :]
    integers = None
    if data.integers is not None and index.integers is not None and _is_small(shape):
        integers = np.take(data.integers, index.integers, axis)
    return [Value(shape, integers)]


def _gemm(call: _Call) -> list[Value]:
    a, b = call[0].shape, call[1].shape
    a = a[::-1] if call.attribute("transA", 0) else a
    b = b[::-1] if call.attribute("transB", 0) else b
    return [Value(_matmul_shape(call, a, b))]


def _matmul(call: _Call) -> list[Value]:
    return [Value(_matmul_shape(call, call[0].shape, call[1].shape))]


def _matmul_shape(call: _Call, a: Shape, b: Shape) -> Shape:
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise _Unknown(f"no product of {a} and {b}")
    return (*_broadcast_shapes(call, a[:-2], b[:-2]), a[-2], b[-1]) if len(a) + len(b) > 4 else (a[-2], b[-1])


def _pad(call: _Call) -> list[Value]:
    shape, pads = call[0].shape, call.integers(1)
    if len(pads) != 2 * len(shape):
        raise _Unknown(f"{len(pads)} pads")
    return [Value(_sizes([n + a + b for n, a, b in zip(shape, pads, pads[len(shape) :], strict=False)]))]


def _range(call: _Call) -> list[Value]:
    start, stop, step = (call.integers(index)[0] for index in range(3))
    if step == 0:
        raise _Unknown("a step of 0")
    count = max(-((start - stop) // step), 0)
    if count > call.most:
        raise _too_large(call.node, (count,), call.most)
    return [Value((count,), np.arange(start, stop, step) if count <= KEPT_VALUES else None)]


def _reduce(call: _Call) -> list[Value]:
    shape = call[0].shape
    axes = call.axes(len(shape))
    if call.attribute("keepdims", 1):
        return [Value(tuple(1 if i in axes else n for i, n in enumerate(shape)))]
    return [Value(tuple(n for i, n in enumerate(shape) if i not in axes))]


def _reshape(call: _Call) -> list[Value]:
    data, target = call[0], call.integers(1)
    if call.attribute("allowzero", 0):
        sizes = list(target)
    else:
        sizes = [data.shape[i] if n == 0 else n for i, n in enumerate(target)]
    count = math.prod(data.shape)
    if sizes.count(-1) == 1:
        rest = math.prod(n for n in sizes if n != -1)
        sizes[sizes.index(-1)] = count // rest if rest else 0
    shape = _sizes(sizes)
    if math.prod(shape) != count:
        raise _Unknown(f"{data.shape} cannot become {target}")
    return [Value(shape, None if data.integers is None else data.integers.reshape(shape))]


def _shape(call: _Call) -> list[Value]:
    shape = call[0].shape
    part = shape[call.attribute("start", 0) : call.attribute("end", len(shape))]
    return [Value((len(part),), np.array(part, np.int64))]


def _slice(call: _Call) -> list[Value]:
    data, starts, ends = call[0], call.integers(1), call.integers(2)
    axes = call.integers(3) if call.has(3) else list(range(len(starts)))
    steps = call.integers(4) if call.has(4) else [1] * len(starts)
    cuts = [slice(None)] * len(data.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cuts[_axis(axis, len(cuts))] = slice(start, end, step)
    shape = tuple(len(range(*cut.indices(n))) for cut, n in zip(cuts, data.shape, strict=True))
    return [Value(shape, None if data.integers is None else data.integers[tuple(cuts)])]


def _split(call: _Call) -> list[Value]:
    shape = call[0].shape
    axis, count = _axis(call.attribute("axis", 0), len(shape)), len(call.node.outputs)
    sizes = call.integers(1) if call.has(1) else [shape[axis] // count] * count
    if sum(sizes) != shape[axis]:
        raise _Unknown(f"{shape[axis]} cannot be split into {sizes[:8]}")
    return [Value((*shape[:axis], size, *shape[axis + 1 :])) for size in _sizes(sizes)]


def _squeeze(call: _Call) -> list[Value]:
    data = call[0]
    axes = call.axes(len(data.shape)) if call.has(1) else [i for i, n in enumerate(data.shape) if n == 1]
    shape = tuple(n for i, n in enumerate(data.shape) if i not in axes)
    return [Value(shape, None if data.integers is None else data.integers.reshape(shape))]


def _unsqueeze(call: _Call) -> list[Value]:
    data = call[0]
    rank = len(data.shape) + len(call.integers(1))
    axes, rest = call.axes(rank), iter(data.shape)
    shape = tuple(1 if i in axes else next(rest) for i in range(rank))
    return [Value(shape, None if data.integers is None else data.integers.reshape(shape))]


def _transpose(call: _Call) -> list[Value]:
    shape = call[0].shape
    order = call.attribute("perm", tuple(reversed(range(len(shape)))))
    if sorted(order) != list(range(len(shape))):
        raise _Unknown(f"no order {order[:8]} of {len(shape)} dimensions")
    return [Value(tuple(shape[axis] for axis in order))]


def _matmul_nbits(call: _Call) -> list[Value]:
    x, inner = call[0].shape, call.attribute("K")
    if len(x) < 2 or x[-1] != inner:
        raise _Unknown(f"{x} has not {inner} columns")
    return [Value((*x[:-1], *_sizes([call.attribute("N")])))]


def _linear(call: _Call) -> list[Value]:
    x, weight = call[0].shape, call[1].shape
    if len(x) < 2 or len(weight) != 3 or x[-1] != BLOCK * weight[1]:
        raise _Unknown(f"no product of {x} and {weight}")
    return [Value((*x[:-1], weight[0]))]


def _linear_attention(call: _Call) -> list[Value]:
    return [Value(call[2].shape), Value(call[3].shape)]  # o as v, the state as the state


def _dijiang_attention(call: _Call) -> list[Value]:
    """The output is as large as the gate, the state as the state."""
    gate, past_state = (_INPUTS.index(name) for name in ("gate", "past_state"))
    return [Value(call[gate].shape), Value(call[past_state].shape)]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise _Unknown(f"no axis {axis} among {rank}")
    return axis % rank


def _sizes(sizes: Sequence[int]) -> Shape:
    if any(n < 0 for n in sizes):
        raise _Unknown(f"a negative size in {list(sizes[:8])}")
    return tuple(sizes)


def _is_small(shape: Shape) -> bool:
    return math.prod(shape) <= KEPT_VALUES


def _too_large(node: Node, shape: Shape, most: int) -> BundleError:
    return BundleError(
        f"{node} makes more than a model of this size can need",
        got=f"shape {list(shape[:MAX_RANK])}",
        expected=f"at most {most} elements in {MAX_RANK} dimensions",
    )


def _standard(*names: str) -> list[tuple[str, str]]:
    return [("", name) for name in names]


_RULES: dict[tuple[str, str], Callable[[_Call], list[Value]]] = {
    **dict.fromkeys(
        _standard(
            "Abs", "Clip", "Cos", "CumSum", "Erf", "Exp", "Floor", "LayerNormalization", "Reciprocal", "Relu",
            "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh",
        ),
        _same,
    ),
    **dict.fromkeys(_standard("Pow", "Greater", "GreaterOrEqual", "Less"), _broadcast()),
    ("", "Add"): _broadcast(np.add),
    ("", "Sub"): _broadcast(np.subtract),
    ("", "Mul"): _broadcast(np.multiply),
    ("", "Div"): _broadcast(_divide),
    ("", "Max"): _broadcast(np.maximum),
    ("", "Min"): _broadcast(np.minimum),
    ("", "Cast"): _cast,
    ("", "Concat"): _concat,
    ("", "Expand"): _expand,
    ("", "Gather"): _gather,
    ("", "GatherElements"): lambda call: [Value(call[1].shape)],
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    ("", "Pad"): _pad,
    ("", "Range"): _range,
    **dict.fromkeys(_standard("ReduceMax", "ReduceMean"), _reduce),
    ("", "Reshape"): _reshape,
    ("", "Shape"): _shape,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Squeeze"): _squeeze,
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _unsqueeze,
    DEQUANTIZE: _same,
    MATMUL_NBITS: _matmul_nbits,
    LINEAR: _linear,
    LINEAR_ATTENTION: _linear_attention,
    PLUGIN: _dijiang_attention,
}  # fmt: skip
