"""Reference models with quantised matrices: as a bundle stores them, and as they are in float64."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import QK, QKV, Matrix, V, matrices, matrix_shapes
from dijiang_export.quantise.blocks import dequantise, pack, quantise
from dijiang_export.quantise.recipe import choose_recipe
from dijiang_export.reference.model import ReferenceModel

KINDS = ("int8", "int4", "all int4", "any")
"""The recipes of --weight-format; int4 everywhere; and each matrix of each layer in either, drawn."""
STORED_KINDS = ("int8", "int4", "mixed")
"""Those that a bundle can have, whose embedding is int8: the recipes, and "any" but for the embedding."""


@dataclass(frozen=True)
class QuantisedWeights:
    """The matrices of one model."""

    parts: Mapping[str, Sequence[Matrix]]
    """Canonical name -> stored matrices, as a manifest says it."""
    values: Mapping[str, Tensor]
    """Name of a stored matrix -> uint8 [N, K/32, 32 or 16]."""
    scales: Mapping[str, Tensor]
    """float16 [N, K/32]."""


def formats_of(spec: ModelSpec, kind: str) -> dict[str, Sequence[Matrix]]:
    """Canonical name -> stored matrices, of one of `KINDS` or `STORED_KINDS`."""
    if kind in ("int8", "int4"):
        return dict(choose_recipe(spec, kind).parts)  # type: ignore[arg-type]
    draw, formats = random.Random(1), {}
    for source in matrix_shapes(spec):
        at = source.removesuffix(QKV)
        for name in (at + QK, at + V) if source.endswith(QKV) else (source,):
            formats[name] = "int4" if kind == "all int4" else draw.choice(("int8", "int4"))
    if kind == "mixed":
        formats["embed_tokens.weight"] = "int8"
    return dict(matrices(spec, formats))


def quantise_model(spec: ModelSpec, model: ReferenceModel, kind: str) -> QuantisedWeights:
    """Quantise the model's matrices, and put what is stored in their place: q · scale.

    Args:
        spec: of the model.
        model: on any device, of any type that holds q · scale exactly, or nearly.
        kind: of `KINDS` or `STORED_KINDS`.
    """
    parts, values, scales = formats_of(spec, kind), {}, {}
    state = model.state_dict()
    for source, stored in parts.items():
        weight = state[source]
        for it in stored:
            rows = slice(it.first_row, it.first_row + it.rows)
            q, scale = quantise(weight[rows], it.format, it.name)
            values[it.name], scales[it.name] = pack(q, it.format), scale
            weight[rows] = dequantise(q, scale).to(weight.dtype)
    return QuantisedWeights(parts, values, scales)
