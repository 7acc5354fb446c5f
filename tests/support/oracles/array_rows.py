"""Rows of states that are lists of NumPy arrays [B, H, d, d]: `Runner`'s calls for runners of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.checks import check_places, check_row_layers, check_rows
from dijiang_engines.spec import ModelSpec

Array = np.ndarray[Any, Any]


class ArrayRows:
    """What a runner inherits whose states are such lists."""

    spec: ModelSpec

    def reset_rows(self, state: list[Array], rows: Sequence[int]) -> None:
        found = check_rows(rows, len(state[0]))
        for layer in state:
            layer[found] = 0

    def get_rows(self, state: list[Array], rows: Sequence[int]) -> list[Array]:
        found = check_rows(rows, len(state[0]))
        return [layer[found].astype(np.float32) for layer in state]

    def put_rows(self, state: list[Array], rows: Sequence[int], layers: list[Array]) -> None:
        found, arrays = check_row_layers(self.spec, rows, len(state[0]), layers)
        for layer, array in zip(state, arrays, strict=True):
            layer[found] = array

    def copy_rows(
        self, source: list[Array], rows: Sequence[int], target: list[Array], places: Sequence[int]
    ) -> None:
        found, ends = check_rows(rows, len(source[0])), check_places(places, len(target[0]))
        if source is target or len(found) != len(ends):
            raise RunnerError("rows do not fit their places")
        for old, new in zip(source, target, strict=True):
            new[ends] = old[found]
