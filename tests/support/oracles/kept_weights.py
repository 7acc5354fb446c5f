"""What a filter of `sampling` keeps, as weights of which the others are zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dijiang_engines.sampling import Places, Weights


def keep(weights: Weights, places: Callable[[Weights], Places]) -> Weights:
    """Rows [B, V] in which `places` of each are left, and all else is zero."""
    result = np.zeros_like(weights)
    for row, out in zip(weights, result, strict=True):
        left = places(row)
        assert (np.diff(left) > 0).all()
        out[left] = row[left]
    return result
