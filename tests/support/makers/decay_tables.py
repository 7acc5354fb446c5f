"""The decay of the official code and the tables D1, D2 that it trains, written once more for tests.

Nothing here uses the package under test, so that its own tables can be compared with these.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


def official_gammas(heads: int) -> torch.Tensor:
    """float32 [H]: the decay per head that the official code starts with."""
    return 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), heads))


def official_tables(heads: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D1 and D2, float32 [1, H, N, 1], as the official code initialises them."""
    powers = official_gammas(heads).view(heads, 1, 1) ** torch.arange(positions).unsqueeze(1)
    return powers.float().unsqueeze(0), (1 / powers).float().unsqueeze(0)


def trained_tables(heads: int, positions: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables that no γ describes: noise, negative entries, zeros and a few large ratios. float32."""
    d1, d2 = official_tables(heads, positions)
    d1 = d1 + 0.05 * torch.randn(d1.shape, generator=rng)
    d2 = d2 * (1 + 0.5 * torch.randn(d2.shape, generator=rng))
    flip = torch.rand(d2.shape, generator=rng) < 0.1
    d2 = torch.where(flip, -d2, d2)
    d2[:, :, positions // 3] = 0.0
    d2[:, 0, positions // 2] *= 100.0
    return d1, d2


def geometric_tables(log_decay: Array, rows: int) -> tuple[Array, Array]:
    """D1, D2 float64 [H, rows] that ln γ [H] stands for."""
    exponents = np.asarray(log_decay, dtype=np.float64)[:, None] * np.arange(rows)
    return np.exp(exponents), np.exp(-exponents)
