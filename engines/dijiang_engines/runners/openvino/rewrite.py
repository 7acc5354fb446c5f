"""What a graph says, said so that OpenVINO computes it: all floats are float32 there, whatever their type.

OpenVINO's CPU plugin turns float64 and float16 into float32 when it compiles a model, and drops what
converted between them (seen with 2026.4.1); bfloat16 too where the processor has no instructions for it, and
else it computes in bfloat16, whatever precision is asked for. So that is made float32 here. That activations
keep more digits than a type has is no harm. But constants that a graph rounds, P, would stay unrounded: they
are rounded here. And without float64 logits are off by 1e-4 at position 1,000, and are anybody's guess at
10^9. Two things in a bundle's graphs are float64, and each is replaced:

angles   turns = p · w, reduced to one turn, of positions p < 2^31 and constants w. Here p is cut into bits
         22 to 30, 11 to 21 and 0 to 10; the turns of each part come reduced from a table that NumPy computes
         in float64, and what they add up to is reduced again. In all at most 3·2^-26 + 2·2^-25 turns off,
         7e-7 radian.
sums     E_i - E_j of sums E over chunks, in which short differences of long sums must survive. Here each
         difference is a sum by itself, from j to i: no long sums, and nothing is subtracted.

A graph with anything else in float64 is refused.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError

Doubles = npt.NDArray[np.float64]
Node = Any
"""An openvino.Node, as Model and Output: the package may be absent."""

_SHIFTS, _BITS = (22, 11, 0), 11
"""Where the parts of a position begin, the highest first, and how many bits each has."""


def rewrite(model: Any) -> None:
    """Round the constants that `model` rounds, and replace what it computes in float64; in place.

    Args:
        model: an openvino.Model as it was read.

    Raises:
        RunnerError: something in float64 is none of what this module knows.
    """
    for node in model.get_ordered_ops():
        if not _is(node, "Convert"):
            continue
        made = _rounded(node) or (_is_float64(node.input(0)) and (_angles(node) or _differences(node)))
        if not made:
            continue
        made.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))
    _widen(model)
    left = [node for node in model.get_ordered_ops() if any(map(_is_float64, node.outputs()))]
    if left:
        raise RunnerError(
            "OpenVINO would compute in float32 what the graph computes in float64",
            got=f"{left[-1].get_type_name()} {left[-1].get_friendly_name()}",
            hint="run the bundle on ONNX Runtime: --runner onnxruntime-cpu",
        )


def _widen(model: Any) -> None:
    """Compute in float32 what is bfloat16; stored constants stay as they are."""
    for node in model.get_ordered_ops():
        if not node.outputs() or _type(node.output(0)) != "bf16":
            continue
        if _is(node, "Convert"):
            node.set_attribute("destination_type", "f32")
        elif _is(node, "Constant"):
            readers = node.output(0).get_target_inputs()
            wide = _ops().convert(node, "f32")
            for reader in readers:
                reader.replace_source_output(wide.output(0))
    model.validate_nodes_and_infer_types()


def rounded_to(dtype: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Finite float32 values, rounded to the nearest of "f16" or "bf16", ties to even."""
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return nearest.astype(np.uint32).view(np.float32)


def turn_tables(per_token: Doubles) -> list[npt.NDArray[np.float32]]:
    """Turns of each part of a position, less whole ones, the highest part first.

    Returns:
        float32 [512 or 2048, r/2], -0.5..0.5.

    Args:
        per_token: turns a token, float64 [r/2].
    """
    tables = []
    for shift in _SHIFTS:
        parts = np.arange(min(1 << _BITS, 1 << (31 - shift)), dtype=np.float64) * 2.0**shift
        turns = parts[:, None] * per_token
        tables.append((turns - np.rint(turns)).astype(np.float32))
    return tables


def _rounded(convert: Node) -> Node | None:
    """float32(float16 or bfloat16(a float32 constant))."""
    narrow = _source(convert, 0)
    if _type(convert.output(0)) != "f32" or not _is(narrow, "Convert"):
        return None
    given, dtype = _source(narrow, 0), _type(narrow.output(0))
    if dtype not in ("f16", "bf16") or not _is(given, "Constant") or _type(given.output(0)) != "f32":
        return None
    return _ops().constant(rounded_to(dtype, np.ascontiguousarray(given.data)))


def _angles(convert: Node) -> Node | None:
    """float32(frac(Unsqueeze(float64(p), -1) · w) · turn): int32 p [...], constants w [r/2] and turn."""
    scaled = _by_constant(_source(convert, 0))
    if scaled is None:
        return None
    fraction, turn = scaled
    if not _is(fraction, "Subtract") or not _is(_source(fraction, 1), "Floor"):
        return None
    turns = _source(fraction, 0)
    product = _by_constant(turns)
    if product is None or _name(_source(_source(fraction, 1), 0)) != _name(turns):
        return None
    wide, per_token = product
    if not _is(wide, "Unsqueeze") or not _is(_source(wide, 0), "Convert"):
        return None
    positions = _source(wide, 0).input_value(0)
    last = _constant(_source(wide, 1))
    if last is None or last.tolist() not in (-1, [-1]) or per_token.ndim != 1 or turn.size != 1:
        return None
    return _reduced(positions, per_token, turn) if _type(positions) == "i32" else None


def _reduced(positions: Any, per_token: Doubles, turn: Doubles) -> Node:
    ops = _ops()
    total: Any = None
    for shift, table in zip(_SHIFTS, turn_tables(per_token), strict=True):
        part = ops.bitwise_right_shift(positions, ops.constant(np.int32(shift)), "NUMPY")
        part = ops.bitwise_and(part, ops.constant(np.int32(len(table) - 1)), "NUMPY")
        turns = ops.gather(ops.constant(table), part, ops.constant(np.int32(0)))
        if total is None:
            total = turns
            continue
        total = ops.add(total, turns)
        total = ops.subtract(total, ops.round(total, "half_to_even"))
    return ops.multiply(total, ops.constant(np.float32(turn.reshape(())[()])))


def _differences(convert: Node) -> Node | None:
    """float32(E - transposed E), for E = Pad(CumSum(float64(x), 2), one row of zeros before), x [B, H, n, 1].

    Returns [B, H, n + 1, n + 1]: at i, j the sum of x from j to i - 1; 0 where j > i, where E_i - E_j is the
    other's negative, and what is made of it is masked.
    """
    ops = _ops()
    difference = _source(convert, 0)
    if not _is(difference, "Subtract") or not _is(_source(difference, 1), "Transpose"):
        return None
    edges, turned = _source(difference, 0), _source(difference, 1)
    if not _is(edges, "Pad") or _name(_source(turned, 0)) != _name(edges):
        return None
    total = _source(edges, 0)
    if not _is(total, "CumSum") or not _is(_source(total, 0), "Convert"):
        return None
    expected = ((turned, 1, [0, 1, 3, 2]), (edges, 1, [0, 0, 1, 0]), (edges, 2, [0, 0, 0, 0]),
                (edges, 3, 0), (total, 1, 2))  # fmt: skip
    for node, index, value in expected:
        constant = _constant(_source(node, index))
        if constant is None or constant.tolist() != value:
            return None
    whole = _source(total, 0).input_value(0)
    attributes = total.get_attributes()
    if _type(whole) != "f32" or attributes["exclusive"] or attributes["reverse"]:
        return None
    zero, one = ops.constant(np.int32(0)), ops.constant(np.int32(1))
    count = ops.gather(ops.shape_of(whole, "i32"), ops.constant(np.int32(2)), zero)
    terms = ops.unsqueeze(ops.range(zero, count, one, "i32"), one)  # [n, 1]: k
    starts = ops.unsqueeze(ops.range(zero, ops.add(count, one), one, "i32"), zero)  # [1, n + 1]: j
    counted = ops.select(ops.greater_equal(terms, starts), whole, ops.constant(np.float32(0)))
    before = ops.pad(counted, _shape(0, 0, 1, 0), _shape(0, 0, 0, 0), "constant", ops.constant(np.float32(0)))
    return ops.cum_sum(before, ops.constant(np.int32(2)))


# -- reading a model ---------------------------------------------------------------------------------------


def _ops() -> Any:
    return importlib.import_module("openvino.opset15")


def _shape(*values: int) -> Node:
    return _ops().constant(np.array(values, np.int32))


def _type(port: Any) -> str:
    return str(port.get_element_type().get_type_name())


def _is_float64(port: Any) -> bool:
    return _type(port) == "f64"


def _is(node: Node, kind: str) -> bool:
    return bool(node.get_type_name() == kind)


def _name(node: Node) -> str:
    return str(node.get_name())


def _source(node: Node, index: int) -> Node:
    return node.input_value(index).get_node()


def _constant(node: Node) -> Doubles | None:
    """The value of constants, converted and multiplied; None of anything else."""
    if _is(node, "Constant"):
        return np.asarray(node.data, np.float64)
    if _is(node, "Convert"):
        return _constant(_source(node, 0))
    if _is(node, "Multiply"):
        factors = [_constant(_source(node, index)) for index in (0, 1)]
        return None if factors[0] is None or factors[1] is None else factors[0] * factors[1]
    return None


def _by_constant(node: Node) -> tuple[Node, Doubles] | None:
    """What a product multiplies with a constant, and the constant; None if `node` is none."""
    if not _is(node, "Multiply"):
        return None
    for index in (0, 1):
        constant = _constant(_source(node, index))
        if constant is not None:
            return _source(node, 1 - index), constant
    return None
