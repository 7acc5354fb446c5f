"""Small models of every family that a step in one launch serves."""

from __future__ import annotations

import dataclasses

from support.makers.random_models import LLAMA, NEOX, with_heads, with_tables

from dijiang_engines.spec import ModelSpec

SMALL = dataclasses.replace(
    NEOX,
    vocab_size=101,
    hidden_size=64,
    embedding_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=4,
)
MODELS: dict[str, ModelSpec] = {
    "neox": SMALL,
    "neox, tables": with_tables(SMALL, 12),
    "neox, sequential": dataclasses.replace(SMALL, parallel_residual=False, activation="gelu_tanh"),
    "llama": dataclasses.replace(LLAMA, intermediate_size=96, vocab_size=77),
    # Groups of GroupNorm that straddle heads, heads of no power of two, a head size that units pad.
    "six heads": dataclasses.replace(with_heads(NEOX, 6, 3, 48, 48), intermediate_size=160),
    "opt": dataclasses.replace(
        SMALL, family="opt", rotary_dim=0, position_embeddings=40, position_offset=2, parallel_residual=False,
        activation="relu", tied_embeddings=True,
    ),
}  # fmt: skip
RAGGED: dict[str, ModelSpec] = {
    # Rows that end inside a unit; the MLP's of int8 in the second round of a group.
    name: dataclasses.replace(
        MODELS[name], hidden_size=544, embedding_size=544, intermediate_size=2144, num_layers=1
    )
    for name in ("neox", "llama")
}
WIDE = dataclasses.replace(
    with_heads(SMALL, 16, 16, 80, 20),
    hidden_size=1056,
    embedding_size=1056,
    intermediate_size=4128,
    num_layers=1,
)
"""More of everything that comes from other blocks than a thread takes at once of narrow models."""
