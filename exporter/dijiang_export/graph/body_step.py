"""DijiangAttention for one token (L = 1) in standard operators: the recurrence of docs/mathematics.md."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dijiang_export.graph.body_common import (
    FLOAT,
    LEAST_LOG_DECAY,
    Op,
    as_float,
    feature_map,
    norm_and_gate,
    rotary_angles,
    rotate,
    share_heads,
    table_rows,
)
from dijiang_export.graph.builder import Builder


def step_body(b: Builder, op: Op) -> tuple[ir.Value, ir.Value]:
    """Returns (output T [B, 1, A], present_state float32 [B, H, d, d]).

    o is read from the new state, so every reader of past_state comes before present_state by data
    dependency: a runtime may bind both to one buffer.
    """
    heads, d = op.num_heads, op.head_dim
    packed = b.reshape(as_float(b, op, op.qkv), 0, op.all_heads, d, label="heads")
    qk, v = b.split(packed, [heads + op.num_kv_heads, op.num_kv_heads], 1, label="split_v")
    if op.rotary_dim:
        qk = rotate(b, op, qk, *b.shared("rotation", lambda: _rotation(b, op)))
    q, k = b.split(feature_map(b, op, qk), [heads, op.num_kv_heads], 1, label="split_qk")
    k, v = share_heads(b, op, k), share_heads(b, op, v)

    fade, gain, read_scale = _decay(b, op)
    written = b.op("Mul", k, gain, label="gain")
    outer = b.op(
        "Mul", b.op("Unsqueeze", written, b.ints(3)), b.op("Unsqueeze", v, b.ints(2)), label="state/write"
    )
    faded = b.op("Mul", op.past_state, fade, label="state/fade")
    present = b.op("Add", faded, outer, label="state/update")
    o = b.op("MatMul", b.op("Unsqueeze", q, b.ints(2)), present, label="state/read")
    if read_scale is not None:
        o = b.op("Mul", o, read_scale, label="state/read_scale")
    merged = b.reshape(o, 0, 1, op.size, label="merge_heads")
    valid = b.shared("valid", lambda: _valid(b, op))
    return norm_and_gate(b, op, merged, valid), present


def _valid(b: Builder, op: Op) -> ir.Value:
    """1 for rows with a token, else 0: float32 [B, 1, 1]."""
    some = b.op("Cast", b.op("Greater", op.seq_lens, b.constant(0, np.int32)), to=FLOAT)
    return b.reshape(some, -1, 1, 1, label="valid")


def _rotation(b: Builder, op: Op) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine [B, 1, r/2], for heads [B, heads, d]."""
    return rotary_angles(b, op, b.op("Unsqueeze", op.positions, b.ints(1)))


def _decay(b: Builder, op: Op) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """fade [B, H, 1, 1], gain [B, H or 1, 1], read_scale [B, H, 1, 1] or None; no token, no change of S."""
    valid = b.shared("valid", lambda: _valid(b, op))  # [B, 1, 1]
    least = b.real(LEAST_LOG_DECAY)
    if op.gain is None or op.read_scale is None:
        rate = b.op("Max", op.log_decay, least)  # [H]
        fade = b.op("Exp", b.op("Mul", valid, rate))  # [B, 1, H]
        return b.reshape(fade, 0, op.num_heads, 1, 1, label="fade"), valid, None
    rate = b.op("Max", table_rows(b, op, op.log_decay, op.positions), least)  # [B, H]
    mask = b.shared("valid_row", lambda: b.reshape(valid, 0, 1))
    fade = b.op("Exp", b.op("Mul", rate, mask))
    gain = b.op("Mul", table_rows(b, op, op.gain, op.positions), mask)
    read_scale = table_rows(b, op, op.read_scale, op.positions)
    return (
        b.reshape(fade, 0, op.num_heads, 1, 1, label="fade"),
        b.reshape(gain, 0, op.num_heads, 1),
        b.reshape(read_scale, 0, op.num_heads, 1, 1),
    )
