"""Reference models with quantised matrices: as a bundle stores them, and as they are in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import QK, QKV, Matrix, V, matrices, matrix_shapes
from dijiang_export.bench.step import weights
from dijiang_export.bench.step.weights import QuantisedWeights
from dijiang_export.quantise.recipe import choose_recipe
from dijiang_export.reference.model import ReferenceModel

KINDS = ("int8", "int4", "all int4", "any")
"""The recipes of --weight-format; int4 everywhere; and each matrix of each layer in either, drawn."""
STORED_KINDS = ("int8", "int4", "mixed")
"""Those that a bundle can have, whose embedding is int8: the recipes, and "any" but for the embedding."""


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
    """Quantise a model's matrices in place, as one of `KINDS` or `STORED_KINDS`."""
    return weights.quantise_model(model, formats_of(spec, kind))
