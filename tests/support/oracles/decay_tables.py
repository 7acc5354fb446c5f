"""Decay tables as the official forward needs them, from γ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def geometric_tables(log_decay: Array, rows: int) -> tuple[Array, Array]:
    """D1, D2 float64 [H, rows] that ln γ [H] stands for."""
    exponents = np.asarray(log_decay, dtype=np.float64)[:, None] * np.arange(rows)
    return np.exp(exponents), np.exp(-exponents)
