"""What `bench products` measures, and the arithmetic around it. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix
from dijiang_export.bench.step import shapes
from dijiang_export.bench.step.shapes import SHAPES, Weights, formats, product_sizes

Name = Literal["410m", "1b", "2.8b"]
"""Of `SHAPES`: those whose layers have a parallel residual, so that an engine makes two calls of each."""
FEW = 16
"""Rows up to which an engine has norms inside its products, and multiplies as in a step."""
MANY_LAYERS = 8
"""Layers that are measured of many rows, without the head, of which a prefill makes one row."""


@dataclass(frozen=True)
class Cell(shapes.Cell):
    """All products of some layers: of a whole step if rows are few."""

    @property
    def few(self) -> bool:
        """As in a step: all layers, with norms, and the head."""
        return self.rows <= FEW

    @property
    def layers(self) -> int:
        """That are measured, each with weights of its own."""
        return SHAPES[self.shape].num_layers if self.few else MANY_LAYERS

    @property
    def spec(self) -> ModelSpec:
        """Of one layer and the head."""
        return dataclasses.replace(SHAPES[self.shape], num_layers=1)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(N, K) of every product, in order."""
        *layer, head = product_sizes(self.spec)
        return layer * self.layers + [head] * self.few

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        parts = planned(self.spec, self.weights, self.rows)
        if parts is None:
            return 2 * sum(n * k for n, k in self.sizes)
        times = {name: self.layers if name.startswith("layers.") else int(self.few) for name in parts}
        times["embed_tokens.weight"] = 0
        return sum(times[name] * it.nbytes for name, stored in parts.items() for it in stored)

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * sum(n * k for n, k in self.sizes)


def planned(spec: ModelSpec, weights: Weights, rows: int) -> dict[str, list[Matrix]] | None:
    """Canonical name -> matrices as a plan for so many rows multiplies with them; None: floats.

    What a bundle has in two parts, some rows in int4 and some in int8, is two matrices to few rows, and one
    of int8 to many.
    """
    stored = formats(spec, weights)
    if stored is None:
        return None
    return {name: list(parts) if rows <= FEW else [_joined(parts)] for name, parts in stored.items()}


def _joined(parts: Sequence[Matrix]) -> Matrix:
    if len(parts) == 1:
        return parts[0]
    kinds = {it.format for it in parts}
    return dataclasses.replace(
        parts[0], name=parts[0].source, rows=sum(it.rows for it in parts),
        format=parts[0].format if len(kinds) == 1 else "int8",
    )  # fmt: skip
