"""How many parameters a model has, and the bytes that they take: arithmetic on its spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class PartSize:
    """The parameters of one part of a model."""

    count: int
    """Elements that have the bundle's type."""
    wide: int = 0
    """Elements that are float32 in every bundle: the op's constants."""

    def nbytes(self, dtype: str) -> int:
        """Bytes in a bundle of `dtype`."""
        return self.count * ITEM_BYTES[dtype] + 4 * self.wide


def part_sizes(spec: ModelSpec) -> dict[str, PartSize]:
    """Parameters by part. Tied embeddings count once, under "embedding"; parts of size 0 are left out."""
    h, e, v, n = spec.hidden_size, spec.embedding_size, spec.vocab_size, spec.num_layers
    width, inner = spec.attention_size, spec.intermediate_size
    norm = h if spec.norm == "rms_norm" else 2 * h
    matrices = 3 if spec.gated_mlp else 2
    mlp_bias = (matrices - 1) * inner + h if spec.mlp_bias else 0
    rows = 1 if spec.decay == "geometric" else 3 * spec.decay_rows
    projections = 2 * h * e if e != h else 0
    parts = {
        "embedding": PartSize(v * e),
        "positions": PartSize(
            (spec.position_embeddings + spec.position_offset) * h if spec.position_embeddings else 0
        ),
        "embedding projections": PartSize(projections),
        "attention qkv": PartSize(n * spec.qkv_size * (h + int(spec.attention_bias))),
        "attention gate": PartSize(n * width * h),
        "attention output": PartSize(n * (width * h + (h if spec.dense_bias else 0))),
        "feature map and group norm": PartSize(0, n * (spec.head_dim**2 + 2 * width)),
        "decay": PartSize(0, n * rows * spec.num_heads),
        "MLP": PartSize(n * (matrices * inner * h + mlp_bias)),
        "norms": PartSize(n * 2 * norm + (norm if spec.final_norm else 0)),
        "language model head": PartSize(0 if spec.tied_embeddings else v * e),
    }
    return {name: size for name, size in parts.items() if size.count or size.wide}


def weight_bytes(spec: ModelSpec, dtype: str, quantised: Mapping[str, Sequence[Matrix]] | None = None) -> int:
    """Bytes of all weights in a bundle of `dtype`.

    Args:
        spec: the model.
        dtype: of what is not quantised.
        quantised: canonical name -> stored matrices of what is.
    """
    total = sum(part.nbytes(dtype) for part in part_sizes(spec).values())
    for matrix in (one for parts in (quantised or {}).values() for one in parts):
        total += matrix.nbytes - matrix.rows * matrix.columns * ITEM_BYTES[dtype]
    return total
