"""What the step and the prefill body share: heads, RoPE, feature map, GroupNorm and gate.

Symbols as in docs/mathematics.md. Arithmetic is float32 whatever T is; RoPE angles are float64 until
they are reduced to one turn, because float32 is up to 0.03 radian wrong at position 10^6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dijiang_engines.op_contract import ATTRIBUTES, INPUTS, Attributes, Inputs
from dijiang_export.graph.builder import Builder
from dijiang_export.reference.attention import LEAST_EPSILON

FLOAT, DOUBLE = ir.DataType.FLOAT.value, ir.DataType.DOUBLE.value
LEAST_LOG_DECAY = -30.0
"""Steeper steps are clamped: what they leave, e^-30 of a state whose newest term has gain 1, is far below
float32's rounding, and sums of them must keep the precision of their small terms."""


@dataclass(frozen=True)
class Op(Inputs[ir.Value], Attributes):
    """One DijiangAttention node: its inputs and its attributes by the contract's names, and T."""

    dtype: ir.DataType

    @classmethod
    def of(cls, node: ir.Node) -> Op:
        """Read a node of the contract."""
        inputs: dict[str, Any] = {f.name: x for f, x in zip(INPUTS, node.inputs, strict=False)}
        attributes = {name: node.attributes[name].value for name in ATTRIBUTES}
        dtype = node.outputs[0].dtype
        assert dtype is not None
        return cls(**inputs, **attributes, dtype=dtype)

    @property
    def all_heads(self) -> int:
        """Query, key and value heads of the packed projection."""
        return self.num_heads + 2 * self.num_kv_heads


def as_float(b: Builder, op: Op, x: ir.Value) -> ir.Value:
    """T -> float32."""
    return x if op.dtype == ir.DataType.FLOAT else b.op("Cast", x, to=FLOAT)


def rotary_angles(b: Builder, op: Op, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of integer `positions` [...] times inv_freq: float32 [..., r/2]."""
    last = b.ints(-1)
    wide = b.op("Unsqueeze", b.op("Cast", positions, to=DOUBLE), last)
    per_token = b.op("Cast", op.inv_freq, to=DOUBLE)
    turns = b.op("Mul", wide, b.op("Mul", per_token, b.constant(0.5 / math.pi, np.float64)))
    fraction = b.op("Sub", turns, b.op("Floor", turns))
    angle = b.op("Cast", b.op("Mul", fraction, b.constant(2 * math.pi, np.float64)), to=FLOAT)
    return b.op("Cos", angle, label="cos"), b.op("Sin", angle, label="sin")


def rotate(b: Builder, op: Op, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """RoPE, rotate-half, on the leading r of the last dimension of x."""
    half, rest = op.rotary_dim // 2, op.head_dim - op.rotary_dim
    parts = b.split(x, [half, half, rest] if rest else [half, half], -1, label="rope/Split")
    first, second = parts[0], parts[1]
    turned = [
        b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin), label="rope/Sub"),
        b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin), label="rope/Add"),
    ]
    return b.op("Concat", *turned, *parts[2:], axis=-1, label="rope/Concat")


def feature_map(b: Builder, op: Op, x: ir.Value) -> ir.Value:
    """φ(x) = softmax(x @ P), P rounded to T as a kernel in T holds it."""
    proj = op.proj
    if op.dtype != ir.DataType.FLOAT:
        proj = b.op("Cast", b.op("Cast", proj, to=op.dtype.value), to=FLOAT)
    projected = b.op("MatMul", x, proj, label="feature_map/MatMul")
    return b.op("Softmax", projected, axis=-1, label="feature_map/Softmax")


def share_heads(b: Builder, op: Op, x: ir.Value) -> ir.Value:
    """Repeat key or value heads (axis 1) for the query heads that read them."""
    group = op.num_heads // op.num_kv_heads
    if group == 1:
        return x
    index = b.ints(*(head // group for head in range(op.num_heads)))
    return b.op("Gather", x, index, axis=1, label="share_heads")


def table_rows(b: Builder, op: Op, table: ir.Value, token_positions: ir.Value) -> ir.Value:
    """Rows min(position, N-1) of a [N, H] table: [..., H] for positions [...]."""

    def rows() -> ir.Value:
        assert table.shape is not None
        last = b.constant(int(table.shape[0]) - 1, np.int32)
        return b.op("Min", token_positions, last, label="table_rows")

    return b.op("Gather", table, b.shared("table_rows", rows), axis=0)


def norm_and_gate(b: Builder, op: Op, o: ir.Value) -> ir.Value:
    """silu(gate) · GroupNorm(o): o [B, L, A] -> T.

    The contract's zero output on padding is left out here: what follows in a standard graph works on each
    token alone, padding writes nothing to a state, and its logits are unspecified.
    """
    grouped = b.reshape(o, 0, 0, op.head_dim, op.num_heads, label="group_norm/groups")
    normed = _wide_range_norm(b, op, grouped) if op.read_scale is not None else _norm(b, op, grouped)
    normed = b.reshape(normed, 0, 0, op.width, label="group_norm/merge")
    scaled = b.op("Mul", normed, op.norm_weight, label="group_norm/Mul")
    affine = b.op("Add", scaled, op.norm_bias, label="group_norm/Add")
    gate = as_float(b, op, op.gate)
    silu = b.op("Mul", gate, b.op("Sigmoid", gate, label="gate/Sigmoid"), label="gate/Mul")
    out = b.op("Mul", affine, silu, label="output")
    return out if op.dtype == ir.DataType.FLOAT else b.op("Cast", out, to=op.dtype.value)


def _norm(b: Builder, op: Op, grouped: ir.Value) -> ir.Value:
    """A group's normalisation is LayerNormalization over its H channels without an affine part."""
    ones = b.constant(np.ones(op.num_heads), np.float32)
    return b.op(
        "LayerNormalization",
        grouped,
        ones,
        axis=-1,
        epsilon=op.epsilon,
        label="group_norm/LayerNormalization",
    )


def _wide_range_norm(b: Builder, op: Op, grouped: ir.Value) -> ir.Value:
    """The same, dividing each group by its largest magnitude first: a large read_scale cannot overflow."""
    largest = b.op("ReduceMax", b.op("Abs", grouped), axes=[-1], keepdims=1)
    scale = b.op("Max", largest, b.real(1.0), label="group_norm/scale")
    small = b.op("Div", grouped, scale)
    centred = b.op("Sub", small, b.op("ReduceMean", small, axes=[-1], keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes=[-1], keepdims=1)
    epsilon = b.op("Div", b.op("Div", b.real(op.epsilon), scale), scale)
    epsilon = b.op("Max", epsilon, b.real(LEAST_EPSILON))
    return b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, epsilon)))
