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
    packed = b.reshape(as_float(b, op, op.qkv), 0, op.all_heads, 1, d, label="heads")
    qk, v = b.split(packed, [heads + op.num_kv_heads, op.num_kv_heads], 1, label="split_v")
    if op.rotary_dim:
        qk = rotate(b, op, qk, *b.shared("rotation", lambda: _rotation(b, op)))
    q, k = b.split(feature_map(b, op, qk), [heads, op.num_kv_heads], 1, label="split_qk")
    k, v = share_heads(b, op, k), share_heads(b, op, v)

    fade, gain, read_scale = _decay(b, op)
    written = b.reshape(b.op("Mul", k, gain, label="gain"), 0, heads, d, 1, label="gain/column")
    outer = b.op("Mul", written, v, label="state/write")
    faded = b.op("Mul", op.past_state, fade, label="state/fade")
    present = b.op("Add", faded, outer, label="state/update")
    o = b.op("MatMul", q, present, label="state/read")
    if read_scale is not None:
        o = b.op("Mul", o, read_scale, label="state/read_scale")
    merged = b.reshape(o, 0, 1, op.width, label="merge_heads")
    return norm_and_gate(b, op, merged), present


def _valid(b: Builder, op: Op) -> ir.Value:
    """1 for rows with a token, else 0: float32 [B, 1, 1, 1]."""
    some = b.op("Cast", b.op("Greater", op.seq_lens, b.constant(0, np.int32)), to=FLOAT)
    return b.reshape(some, -1, 1, 1, 1, label="valid")


def _rotation(b: Builder, op: Op) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine [B, 1, 1, r/2], for heads [B, heads, 1, d]."""
    return rotary_angles(b, op, b.op("Unsqueeze", op.positions, b.ints(1, 2)))


def _decay(b: Builder, op: Op) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """fade, gain, read_scale [B, H or 1, 1, 1], the last None if geometric; no token, no change of S."""
    valid = b.shared("valid", lambda: _valid(b, op))
    least = b.real(LEAST_LOG_DECAY)
    if op.gain is None or op.read_scale is None:
        rate = b.op("Max", op.log_decay, least)  # [H]
        fade = b.op("Exp", b.op("Mul", valid, b.reshape(rate, 1, op.num_heads, 1, 1)), label="fade")
        return fade, valid, None
    rate = b.op("Max", table_rows(b, op, op.log_decay, op.positions), least)  # [B, H]
    last = b.ints(2, 3)
    gain, read_scale = (table_rows(b, op, t, op.positions) for t in (op.gain, op.read_scale))
    fade = b.op("Exp", b.op("Mul", b.op("Unsqueeze", rate, last), valid), label="fade")
    gain = b.op("Mul", b.op("Unsqueeze", gain, last), valid, label="gain/rows")
    return fade, gain, b.op("Unsqueeze", read_scale, last)
