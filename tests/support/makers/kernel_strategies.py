"""Hypothesis strategies for calls of DijiangAttention."""

from __future__ import annotations

from hypothesis import strategies as st
from support.makers.kernel_cases import Case


@st.composite
def cases(draw: st.DrawFn, *, longest: int = 700, widest: int = 256) -> Case:
    """Any call that the contract allows, small enough for a reference in float64."""
    d = 16 * draw(st.integers(1, widest // 16))
    kv_heads = draw(st.integers(1, 8))
    heads = kv_heads * draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    while heads * d > 4096:
        heads, kv_heads = max(heads // 2, 1), 1
    decay = draw(st.sampled_from(["official", "trained", "none", "slowest", "mixed", "single-row"]))
    magnitudes = ["usual", "usual", "large-v", "peaked", "small"] + ["huge-read"] * (decay == "trained")
    length = draw(st.one_of(st.just(1), st.integers(1, 130), st.integers(1, longest)))
    batch = draw(st.integers(1, 4))
    lens = tuple(draw(st.integers(0, length)) for _ in range(batch))
    return Case(
        heads=heads, d=d, length=length, batch=batch, kv_heads=kv_heads,
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        rotary=2 * draw(st.integers(0, d // 2)),
        decay=decay, rows=draw(st.integers(4, 400)), magnitude=draw(st.sampled_from(magnitudes)),
        position=draw(st.sampled_from([0, 1, 63, 200, 4095, 65_536, 999_999])),
        lens=lens, past=draw(st.booleans()), seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip
