"""DijiangAttention for any number of tokens in standard operators: the chunked parallel form.

Tokens are cut into nc chunks of C. With E_j the valid tokens before chunk j (so E_0 = 0), g = log_decay:

    inside      O_c  = (Q_c K_cᵀ ∘ M) V_c                      M[t, s] = exp(g (t - s)) for s <= t
    written     U_c  = K_cᵀ (rest ∘ V_c)                       rest[t] = exp(g (E_{c+1} - 1 - t))
    states      X_c  = Σ_{j <= c} W[c, j] [past, U_0, U_1, ..]_j      W[c, j] = exp(g (E_c - E_j))
    read        O_c += (fade ∘ Q_c) X_c                        fade[t] = exp(g (t - c C + 1))

Chunk edges are clipped at seq_lens, so X_nc is each sequence's exact final state, whatever its length.
Trained tables replace g·(distance) by sums of log_decay, and scale K by gain and O by read_scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from dijiang_engines.op_contract import chunk_size
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
    share_heads,
    table_rows,
)
from dijiang_export.graph.builder import Builder

INT64 = ir.DataType.INT64.value


@dataclass(frozen=True)
class Chunks:
    """Sizes, masks and positions of a call, the same for every layer. Lp = nc·C is L rounded up."""

    batch: ir.Value  # int64 [1]
    length: ir.Value  # int64 [1], L
    size: ir.Value  # int64 [1], C = min(chunk_size, L)
    count: ir.Value  # int64 [1], nc
    pads: ir.Value  # int64 [6], for [B, L, ...] -> [B, Lp, ...]
    token_positions: ir.Value  # int32 [B, Lp]
    valid: ir.Value  # float32 [B, 1, Lp, 1]
    distance: ir.Value  # float32 [C, C], max(t - s, 0)
    causal: ir.Value  # float32 [C, C], 1 for s <= t
    states_causal: ir.Value  # float32 [nc+1, nc+1]
    fade_count: ir.Value  # float32 [C, 1], t + 1
    rest_count: ir.Value  # float32 [B, 1, nc, C, 1], valid tokens after t in its chunk
    states_distance: ir.Value  # float32 [B, 1, nc+1, nc+1], max(E_c - E_j, 0)


@dataclass(frozen=True)
class ChunkDecay:
    """M, rest, W and fade of one layer, broadcastable over [B, H, nc, C, ...]; gain, read_scale or None."""

    inside: ir.Value
    rest: ir.Value
    states: ir.Value
    fade: ir.Value
    gain: ir.Value | None = None
    read_scale: ir.Value | None = None


def prefill_body(b: Builder, op: Op) -> tuple[ir.Value, ir.Value]:
    """Returns (output T [B, L, A], present_state float32 [B, H, d, d])."""
    heads, d = op.num_heads, op.head_dim
    chunks: Chunks = b.shared("chunks", lambda: _chunks(b, op))
    padded = b.op("Pad", as_float(b, op, op.qkv), chunks.pads, label="pad")
    packed = b.reshape(padded, 0, -1, op.all_heads, d, label="heads")
    packed = b.op("Transpose", packed, perm=[0, 2, 1, 3], label="heads_first")  # [B, heads, Lp, d]
    qk, v = b.split(packed, [heads + op.num_kv_heads, op.num_kv_heads], 1, label="split_v")
    if op.rotary_dim:
        qk = rotate(b, op, qk, *b.shared("rotation", lambda: _rotation(b, op, chunks)))
    q, k = b.split(feature_map(b, op, qk), [heads, op.num_kv_heads], 1, label="split_qk")

    decay = _geometric(b, op, chunks) if op.gain is None else _tables(b, op, chunks)
    k, v = share_heads(b, op, k), share_heads(b, op, v)
    k = b.op("Mul", k, chunks.valid if decay.gain is None else decay.gain, label="gain")

    q, v = (b.reshape(x, 0, heads, -1, chunks.size, d, label="chunked") for x in (q, v))
    # One 5-D permutation would take ONNX Runtime's slow path; batched 2-D transposes are fast.
    k_rows = b.reshape(k, -1, chunks.size, d, label="k_rows")
    k_t = b.reshape(
        b.op("Transpose", k_rows, perm=[0, 2, 1], label="k_columns"),
        chunks.batch, heads, chunks.count, d, chunks.size, label="k_t",
    )  # fmt: skip
    scores = b.op("Mul", b.op("MatMul", q, k_t, label="inside/scores"), decay.inside, label="inside/decayed")
    inside = b.op("MatMul", scores, v, label="inside/MatMul")
    written = b.op("MatMul", k_t, b.op("Mul", v, decay.rest, label="written/rest"), label="written/MatMul")

    flat = b.reshape(written, 0, heads, -1, d * d, label="written/flat")
    past = b.reshape(op.past_state, 0, heads, 1, d * d, label="past/flat")
    terms = b.op("Concat", past, flat, axis=2, label="states/terms")
    states = b.op("MatMul", decay.states, terms, label="states/MatMul")
    sizes = b.shared("states_split", lambda: b.op("Concat", chunks.count, b.ints(1), axis=0))
    starts, final = b.op("Split", states, sizes, axis=2, outputs=2, label="states/Split")
    present = b.reshape(final, 0, heads, d, d, label="present")

    faded = b.op("Mul", q, decay.fade, label="read/fade")
    carried = b.op(
        "MatMul", faded, b.reshape(starts, 0, heads, -1, d, d, label="read/starts"), label="read/MatMul"
    )
    o = b.reshape(b.op("Add", inside, carried), 0, heads, -1, d, label="unchunked")
    if decay.read_scale is not None:
        o = b.op("Mul", o, decay.read_scale, label="read_scale")
    merged = b.reshape(b.op("Transpose", o, perm=[0, 2, 1, 3]), 0, -1, op.width, label="merge_heads")
    merged = b.op("Slice", merged, b.ints(0), chunks.length, b.ints(1), label="unpad")
    return norm_and_gate(b, op, merged), present


def _rotation(b: Builder, op: Op, chunks: Chunks) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine [B, 1, Lp, r/2], for heads [B, heads, Lp, d]."""
    return rotary_angles(b, op, b.op("Unsqueeze", chunks.token_positions, b.ints(1)))


def _chunks(b: Builder, op: Op) -> Chunks:
    batch = b.op("Shape", op.qkv, start=0, end=1, label="B")
    length = b.op("Shape", op.qkv, start=1, end=2, label="L")
    one, zero = b.ints(1), b.ints(0)
    most = chunk_size(op.head_dim)
    size = b.op("Min", length, b.ints(most), label="C")
    # By the constant, which gives the same count: runtimes that plan ahead divide by no size of a call.
    count = b.op("Div", b.op("Add", length, b.ints(most - 1)), b.ints(most), label="nc")
    padded = b.op("Mul", count, size, label="Lp")
    excess = b.op("Sub", padded, length)
    pads = b.op("Concat", b.ints(0, 0, 0, 0), excess, zero, axis=0, label="pads")

    lens = b.op("Unsqueeze", b.op("Cast", op.seq_lens, to=INT64), one)  # [B, 1]
    tokens = _range(b, padded, "tokens")  # [Lp]
    valid = b.op("Cast", b.op("Less", tokens, lens), to=FLOAT)  # [B, Lp]
    positions = b.op("Unsqueeze", b.op("Cast", op.positions, to=INT64), one)
    token_positions = b.op("Cast", b.op("Add", positions, tokens), to=ir.DataType.INT32.value)

    inner = _range(b, size, "inner")  # [C]
    gap = b.op("Sub", b.op("Unsqueeze", inner, one), b.op("Unsqueeze", inner, zero))
    causal = b.op("Cast", b.op("GreaterOrEqual", gap, b.scalar(0)), to=FLOAT, label="causal")

    index = _range(b, b.op("Add", count, one), "chunk")  # [nc+1]
    edges = b.op("Min", b.op("Unsqueeze", b.op("Mul", index, size), zero), lens, label="E")  # [B, nc+1]
    rows = b.op("Unsqueeze", edges, b.ints(1, 3))  # [B, 1, nc+1, 1]
    edge_gap = b.op("Sub", rows, b.op("Unsqueeze", edges, b.ints(1, 2)))
    chunk_gap = b.op("Sub", b.op("Unsqueeze", index, one), b.op("Unsqueeze", index, zero))
    states_causal = b.op("Cast", b.op("GreaterOrEqual", chunk_gap, b.scalar(0)), to=FLOAT)
    ends = b.op("Slice", edges, one, b.ints(np.iinfo(np.int64).max), one)  # [B, nc], E_{c+1}
    by_chunk = b.reshape(tokens, 1, 1, -1, size, 1)
    rest = b.op("Sub", b.op("Sub", b.op("Unsqueeze", ends, b.ints(1, 3, 4)), by_chunk), b.scalar(1))
    return Chunks(
        batch=batch,
        length=length,
        size=size,
        count=count,
        pads=pads,
        token_positions=token_positions,
        valid=b.op("Unsqueeze", valid, b.ints(1, 3), label="valid"),
        distance=_count(b, gap, "distance"),
        causal=causal,
        states_causal=states_causal,
        fade_count=_count(b, b.op("Add", b.op("Unsqueeze", inner, one), b.scalar(1)), "fade_count"),
        rest_count=_count(b, rest, "rest_count"),
        states_distance=_count(b, edge_gap, "states_distance"),
    )


def _range(b: Builder, size: ir.Value, label: str) -> ir.Value:
    """0, 1, ... size - 1 as int64, for size int64 [1]."""
    stop = b.op("Squeeze", size, b.ints(0))
    return b.op("Range", b.scalar(0), stop, b.scalar(1), label=label)


def _count(b: Builder, x: ir.Value, label: str) -> ir.Value:
    """max(x, 0) as float32."""
    return b.op("Cast", b.op("Max", x, b.scalar(0)), to=FLOAT, label=label)


def _geometric(b: Builder, op: Op, chunks: Chunks) -> ChunkDecay:
    heads = op.num_heads
    rate = b.op("Max", op.log_decay, b.real(LEAST_LOG_DECAY), label="decay/rate")
    rate5 = b.reshape(rate, 1, heads, 1, 1, 1)
    rate4 = b.reshape(rate, 1, heads, 1, 1)

    def decayed(rate: ir.Value, counts: ir.Value, label: str) -> ir.Value:
        return b.op("Exp", b.op("Mul", rate, counts), label=label)

    inside = decayed(rate5, chunks.distance, "decay/inside")
    states = decayed(rate4, chunks.states_distance, "decay/states")
    return ChunkDecay(
        inside=b.op("Mul", inside, chunks.causal, label="decay/inside_causal"),
        rest=decayed(rate5, chunks.rest_count, "decay/rest"),
        states=b.op("Mul", states, chunks.states_causal, label="decay/states_causal"),
        fade=decayed(rate5, chunks.fade_count, "decay/fade"),
    )


def _tables(b: Builder, op: Op, chunks: Chunks) -> ChunkDecay:
    assert op.gain is not None and op.read_scale is not None
    heads, zero = op.num_heads, b.real(0.0)

    def per_token(table: ir.Value) -> ir.Value:
        rows = table_rows(b, op, table, chunks.token_positions)  # [B, Lp, H]
        columns = b.op("Transpose", rows, perm=[0, 2, 1])
        return b.op("Unsqueeze", columns, b.ints(3))  # [B, H, Lp, 1]

    rate = b.op("Max", per_token(op.log_decay), b.real(LEAST_LOG_DECAY))
    rate = b.reshape(b.op("Mul", rate, chunks.valid), 0, heads, -1, chunks.size)  # [B, H, nc, C]
    total = b.op("CumSum", rate, b.scalar(3), label="decay/total")
    gap = b.op("Sub", b.op("Unsqueeze", total, b.ints(4)), b.op("Unsqueeze", total, b.ints(3)))
    whole = b.op("Slice", total, b.ints(-1), b.ints(np.iinfo(np.int64).max), b.ints(3))  # [B, H, nc, 1]
    # Sums over all chunks grow long; their differences must not lose the short ones: float64.
    edges = b.op("CumSum", b.op("Cast", whole, to=DOUBLE), b.scalar(2))
    edges = b.op("Pad", edges, b.ints(0, 0, 1, 0, 0, 0, 0, 0))  # [B, H, nc+1, 1]
    edge_gap = b.op("Cast", b.op("Sub", edges, b.op("Transpose", edges, perm=[0, 1, 3, 2])), to=FLOAT)

    def decayed(exponent: ir.Value, mask: ir.Value, label: str) -> ir.Value:
        # Above the diagonal exponents are positive: cut before exp, masked after.
        return b.op("Mul", b.op("Exp", b.op("Min", exponent, zero)), mask, label=label)

    return ChunkDecay(
        inside=decayed(gap, chunks.causal, "decay/inside"),
        rest=b.op("Unsqueeze", b.op("Exp", b.op("Sub", whole, total)), b.ints(4), label="decay/rest"),
        states=decayed(edge_gap, chunks.states_causal, "decay/states"),
        fade=b.op("Unsqueeze", b.op("Exp", total), b.ints(4), label="decay/fade"),
        gain=b.op("Mul", per_token(op.gain), chunks.valid, label="decay/gain"),
        read_scale=per_token(op.read_scale),
    )
