"""The models whose steps `bench step` measures, and the bytes that one must read. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dijiang_engines.kernels.step import step_parts
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix, matrix_shapes
from dijiang_export.quantise.recipe import choose_recipe

Weights = Literal["float", "int8", "int4"]
"""float: of the activations' type; int8 and int4: as `to-onnx --weight-format` chooses for each matrix."""
Name = Literal["410m", "1b", "2.8b", "smollm2-135m"]

_NEOX_410M = ModelSpec(
    family="gpt_neox", vocab_size=50304, hidden_size=1024, intermediate_size=4096, num_layers=24,
    num_heads=16, num_kv_heads=16, head_dim=64, rotary_dim=16, rope_theta=10000.0, rope_scaling=None,
    norm="layer_norm", norm_epsilon=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True,
    post_norm=False, final_norm=True, attention_bias=True, dense_bias=True, mlp_bias=True,
    position_embeddings=0, position_offset=0, embedding_size=1024, tied_embeddings=False,
    max_position_embeddings=2048, decay="geometric", decay_rows=0, decay_extended=False,
    group_norm_epsilon=1e-5, bos_token_id=0, eos_token_ids=(0,),
)  # fmt: skip
SHAPES: Mapping[Name, ModelSpec] = MappingProxyType({
    "410m": _NEOX_410M,
    "1b": dataclasses.replace(
        _NEOX_410M, hidden_size=2048, embedding_size=2048, intermediate_size=8192, num_layers=16, num_heads=8,
        num_kv_heads=8, head_dim=256, rotary_dim=64,
    ),
    "2.8b": dataclasses.replace(
        _NEOX_410M, hidden_size=2560, embedding_size=2560, intermediate_size=10240, num_layers=32,
        num_heads=32, num_kv_heads=32, head_dim=80, rotary_dim=20,
    ),
    "smollm2-135m": dataclasses.replace(
        _NEOX_410M, family="llama", vocab_size=49152, hidden_size=576, embedding_size=576,
        intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, rotary_dim=64, norm="rms_norm",
        activation="silu", gated_mlp=True, parallel_residual=False, attention_bias=False, dense_bias=False,
        mlp_bias=False, tied_embeddings=True,
    ),
})  # fmt: skip
"""Sizes of EleutherAI/pythia-410m, -1b and -2.8b, and of HuggingFaceTB/SmolLM2-135M (their config.json)."""


@dataclass(frozen=True)
class Cell:
    """One step that is measured."""

    shape: Name
    weights: Weights
    rows: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.weights} weights, {self.rows} row{'s' * (self.rows != 1)}"

    @property
    def nbytes(self) -> int:
        """Of the matrices that a step reads whole."""
        return weight_bytes(SHAPES[self.shape], self.weights)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the products."""
        return 2 * self.rows * sum(n * k for n, k in product_sizes(SHAPES[self.shape]))


def formats(spec: ModelSpec, weights: Weights) -> Mapping[str, Sequence[Matrix]] | None:
    """Canonical name -> stored matrices; None of float weights."""
    return None if weights == "float" else choose_recipe(spec, weights).parts


def product_sizes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(N, K) of every product of a step, in order."""
    sizes = [size for name, size in matrix_shapes(spec).items() if not name.startswith("embed_tokens")]
    return [*sizes, (spec.vocab_size, spec.hidden_size)] if spec.tied_embeddings else sizes


def weight_bytes(spec: ModelSpec, weights: Weights) -> int:
    """Of the matrices that a step reads whole: all of them, and the head, but the embedding's rows."""
    parts = formats(spec, weights)
    if parts is not None:
        return sum(part.stored.nbytes * part.rows // part.stored.rows for part in step_parts(spec, parts))
    return 2 * sum(n * k for n, k in product_sizes(spec))
