"""DijiangAttention for ONNX Runtime on CUDA: its own recurrence operator, and steps for CUDA graphs.

Heads stay where the projection put them, [B, L, heads, d], so nothing is transposed. The recurrence is
`com.microsoft::LinearAttention` with the rule "gated", scale 1 and decay = log_decay:

    S_t = exp(decay_t) S_{t-1} + k_t ⊗ v_t      o_t = q_tᵀ S_t

Padding has decay 0 and k = 0. Trained tables scale k by gain and o by read_scale. The operator's state has
the type of its inputs, so all of them are float32 whatever T is.

A captured CUDA graph repeats copies from the host's memory to the device with whatever that memory holds
by then. ONNX Runtime's CUDA kernels make such copies for a Split or a Concat into unequal parts, and keep
them valid only in recent versions, so a step has neither: heads and RoPE's pairs are taken by Gather. (ONNX
Runtime would put Slices together again to a Split.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from dijiang_export.graph.body_common import (
    DOUBLE,
    FLOAT,
    LEAST_LOG_DECAY,
    Op,
    as_float,
    feature_map,
    norm_and_gate,
    rotary_angles,
    rotate,
    table_rows,
)
from dijiang_export.graph.body_prefill import prefill_body
from dijiang_export.graph.builder import Builder

DOMAIN, DOMAIN_VERSION = "com.microsoft", 1
WIDEST_HEAD = 128
"""The operator's CUDA kernel keeps a head's d×d state in shared memory; d = 256 does not fit."""

INT64, INT32 = ir.DataType.INT64.value, ir.DataType.INT32.value
Kind = Literal["prefill", "step"]


def ort_body(b: Builder, op: Op, kind: Kind) -> tuple[ir.Value, ir.Value]:
    """Either graph with LinearAttention; wider heads than WIDEST_HEAD in standard operators.

    Returns (output T [B, L, A], present_state float32 [B, H, d, d]).
    """
    if op.head_dim > WIDEST_HEAD:
        return prefill_body(b, op) if kind == "prefill" else capture_step_body(b, op)
    q, k, v, decay, read_scale = _inputs(b, op, kind)
    flat = [b.reshape(x, 0, 0, op.width, label="pack") for x in (q, k, v)]
    o, present = b.op(
        "LinearAttention", *flat, op.past_state, decay, label="LinearAttention", outputs=2, domain=DOMAIN,
        q_num_heads=op.num_heads, kv_num_heads=op.num_heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    if read_scale is not None:
        o = b.reshape(o, 0, 0, op.num_heads, op.head_dim, label="read_scale/heads")
        o = b.reshape(
            b.op("Mul", o, read_scale, label="read_scale"), 0, 0, op.width, label="read_scale/merge"
        )
    return norm_and_gate(b, op, o), present


def capture_step_body(b: Builder, op: Op) -> tuple[ir.Value, ir.Value]:
    """A step in standard operators that a CUDA graph can hold; see `ort_body`."""
    heads, d = op.num_heads, op.head_dim
    q, k, v, decay, read_scale = _inputs(b, op, "step")
    fade = b.reshape(b.op("Exp", decay, label="fade"), 0, heads, 1, 1, label="fade/heads")
    q, v = (b.reshape(x, 0, heads, 1, d, label="row") for x in (q, v))
    outer = b.op("Mul", b.reshape(k, 0, heads, d, 1, label="column"), v, label="state/write")
    present = b.op("Add", b.op("Mul", op.past_state, fade, label="state/fade"), outer, label="state/update")
    o = b.reshape(b.op("MatMul", q, present, label="state/read"), 0, 1, heads, d, label="state/heads")
    if read_scale is not None:
        o = b.op("Mul", o, read_scale, label="read_scale")
    return norm_and_gate(b, op, b.reshape(o, 0, 0, op.width, label="merge_heads")), present


def _inputs(b: Builder, op: Op, kind: Kind) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value, ir.Value | None]:
    """φ(q), gained and masked φ(k), v [B, L, H, d]; decay [B, L, H]; read_scale [B, L, H, 1] or None."""
    heads, kv_heads = op.num_heads, op.num_kv_heads
    positions: ir.Value
    valid: ir.Value
    positions, valid = b.shared("tokens", lambda: _tokens(b, op, kind))
    packed = b.reshape(as_float(b, op, op.qkv), 0, 0, op.all_heads, op.head_dim, label="heads")
    group = heads // kv_heads
    shared = [
        head // group for head in range(heads)
    ]  # each query head has a state, and so k and v, of its own
    qk = _heads(b, packed, range(heads + kv_heads), "qk")
    v = _heads(b, packed, [heads + kv_heads + head for head in shared], "v")
    if op.rotary_dim:
        qk = _rotate_step(b, op, qk, positions) if kind == "step" else _rotate(b, op, qk, positions)
    features = feature_map(b, op, qk)
    q = _heads(b, features, range(heads), "q")
    k = _heads(b, features, [heads + head for head in shared], "k")

    least, last = b.real(LEAST_LOG_DECAY), b.ints(3)
    if op.gain is None or op.read_scale is None:
        decay = b.op("Mul", valid, b.op("Max", op.log_decay, least, label="decay/rate"), label="decay")
        masked = b.shared("valid_heads", lambda: b.op("Unsqueeze", valid, last))
        return q, b.op("Mul", k, masked, label="mask"), v, decay, None
    rate, gain, read_scale = (
        table_rows(b, op, table, positions) for table in (op.log_decay, op.gain, op.read_scale)
    )
    decay = b.op("Mul", b.op("Max", rate, least), valid, label="decay")
    gain = b.op("Unsqueeze", b.op("Mul", gain, valid), last, label="gain/rows")
    return q, b.op("Mul", k, gain, label="gain"), v, decay, b.op("Unsqueeze", read_scale, last)


def _tokens(b: Builder, op: Op, kind: Kind) -> tuple[ir.Value, ir.Value]:
    """Each token's position, int32 [B, L], and whether it is one, float32 [B, L, 1]."""
    one, last = b.ints(1), b.ints(2)
    if kind == "step":
        some = b.op("Greater", b.op("Unsqueeze", op.seq_lens, one), b.constant(0, np.int32))
        positions = b.op("Unsqueeze", op.positions, one)
    else:
        length = b.op("Squeeze", b.op("Shape", op.qkv, start=1, end=2, label="L"), b.ints(0))
        tokens = b.op("Range", b.scalar(0), length, b.scalar(1), label="tokens")
        some = b.op("Less", tokens, b.op("Unsqueeze", b.op("Cast", op.seq_lens, to=INT64), one))
        start = b.op("Unsqueeze", b.op("Cast", op.positions, to=INT64), one)
        positions = b.op("Cast", b.op("Add", start, tokens), to=INT32, label="positions")
    return positions, b.op("Unsqueeze", b.op("Cast", some, to=FLOAT), last, label="valid")


def _heads(b: Builder, x: ir.Value, heads: Sequence[int], label: str) -> ir.Value:
    """These heads of x [B, L, heads, d]."""
    return b.op("Gather", x, b.ints(*heads), axis=2, label=label)


def _rotate(b: Builder, op: Op, x: ir.Value, positions: ir.Value) -> ir.Value:
    """RoPE for heads [B, L, heads, d]."""
    turn = b.shared("rotation", lambda: rotary_angles(b, op, b.op("Unsqueeze", positions, b.ints(2))))
    return rotate(b, op, x, *turn)


def _rotate_step(b: Builder, op: Op, x: ir.Value, positions: ir.Value) -> ir.Value:
    """The same without a Split or a Concat: x cos + x' sin, where x' is x with the halves of r swapped.

    Channels beyond r turn by no angle. Every product and sum is the one that `rotate` makes.
    """
    half, rest = op.rotary_dim // 2, op.head_dim - op.rotary_dim
    swapped = b.ints(*range(half, 2 * half), *range(half), *range(2 * half, op.head_dim))

    def turn() -> tuple[ir.Value, ir.Value]:
        kept = b.constant([1.0] * (2 * half) + [0.0] * rest, np.float64)
        sign = b.constant([-1.0] * half + [1.0] * half + [0.0] * rest, np.float32)
        pairs = b.ints(*range(half), *range(half), *([0] * rest))
        per_token = b.op("Gather", b.op("Cast", op.inv_freq, to=DOUBLE), pairs, axis=0)
        per_token = b.op("Mul", b.op("Mul", per_token, b.constant(0.5 / math.pi, np.float64)), kept)
        turns = b.op("Mul", b.op("Cast", b.op("Unsqueeze", positions, b.ints(2, 3)), to=DOUBLE), per_token)
        fraction = b.op("Sub", turns, b.op("Floor", turns))
        angle = b.op("Cast", b.op("Mul", fraction, b.constant(2 * math.pi, np.float64)), to=FLOAT)
        return b.op("Cos", angle, label="cos"), b.op("Mul", b.op("Sin", angle), sign, label="sin")

    cos, sin = b.shared("rotation", turn)  # [B, 1, 1, d]
    other = b.op("Gather", x, swapped, axis=3, label="rope/Gather")
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", other, sin), label="rope/Add")
