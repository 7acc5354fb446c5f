"""A checkpoint whose quantised matrices are what weights.data holds of them: what engines multiply with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix
from dijiang_export.checkpoint.checkpoint import Checkpoint
from dijiang_export.graph.weights import Layout
from dijiang_export.quantise.blocks import dequantise, unpack
from dijiang_export.quantise.recipe import Recipe


class DequantisedCheckpoint:
    """Delivers a model's tensors as a `Checkpoint` does, quantised ones as q · scale in float32.

    Args:
        checkpoint: where all others come from.
        recipe: what is quantised.
        layout: where it is in
        path: weights.data, as far as it is written.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, layout: Layout, path: Path) -> None:
        self._checkpoint, self.parts, self.layout, self.path = checkpoint, recipe.parts, layout, path
        self.spec: ModelSpec = checkpoint.spec
        self.quantised = frozenset(recipe.parts)
        """Canonical names of the matrices that are."""
        if self.spec.tied_embeddings:
            self.quantised |= {"lm_head.weight"}

    def names(self) -> list[str]:
        """As `Checkpoint.names`."""
        return self._checkpoint.names()

    def tensor(self, name: str) -> Tensor:
        """As `Checkpoint.tensor`."""
        if name not in self.quantised:
            return self._checkpoint.tensor(name)
        return self.rows(name, 0, self._checkpoint.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """As `Checkpoint.rows`."""
        if name not in self.quantised:
            return self._checkpoint.rows(name, start, stop)
        found = []
        for part in self._parts_of(name):
            first, last = max(start - part.first_row, 0), min(stop - part.first_row, part.rows)
            if first < last:
                found.append(self._read(part, first, last))
        return torch.cat(found) if len(found) != 1 else found[0]

    def row_blocks(self, name: str, max_bytes: int = 16 << 20) -> Iterator[tuple[int, Tensor]]:
        """As `Checkpoint.row_blocks`."""
        if name not in self.quantised:
            yield from self._checkpoint.row_blocks(name, max_bytes)
            return
        rows, columns = self._checkpoint.shape(name)
        step = max(1, max_bytes // (4 * columns))
        for start in range(0, rows, step):
            yield start, self.rows(name, start, min(start + step, rows))

    def _parts_of(self, name: str) -> list[Matrix]:
        return list(self.parts["embed_tokens.weight" if name not in self.parts else name])

    def _read(self, part: Matrix, start: int, stop: int) -> Tensor:
        elements = self._bytes(part.stored_name, start, stop)
        scales = self._bytes(part.scale_name, start, stop).view(torch.float16)
        return dequantise(unpack(elements.reshape(stop - start, -1), part.format), scales)

    def _bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor of weights.data: uint8 [n, bytes of a row]."""
        weight = self.layout[name]
        row = weight.nbytes // weight.shape[0]
        buffer = bytearray((stop - start) * row)
        with self.path.open("rb", buffering=0) as file:
            read = os.preadv(file.fileno(), [buffer], weight.offset + start * row)
        if read != len(buffer):
            raise OSError(f"{self.path} ends early")
        return torch.frombuffer(buffer, dtype=torch.uint8).reshape(stop - start, row)


ModelWeights = Checkpoint | DequantisedCheckpoint
"""Where the recorders take a model's weights from."""


def is_exact(weights: ModelWeights, name: str) -> bool:
    """Whether a tensor is q · scale, which is not rounded to the bundle's type."""
    return isinstance(weights, DequantisedCheckpoint) and name in weights.quantised
