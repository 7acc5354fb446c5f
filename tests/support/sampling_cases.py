"""Rows of logits and options to choose tokens with, and how close a choice is to sampling.py's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from support.oracles.kept_weights import keep

from dijiang_engines import sampling
from dijiang_engines.sampling import SamplingOptions

SEED = 0x9E3779B97F4A7C15  # above 2^63: seeds are unsigned
NEAR = 2e-6
"""How far a uniform number may be from the boundary between two tokens where host and device disagree. In
float32 a weight e^-x is off by about 2^-23 (1 + x) of itself, so a sum of weights by a few 1e-7 of itself."""

OPTIONS = {
    "greedy": SamplingOptions(),
    "plain": SamplingOptions(1.0),
    "hot": SamplingOptions(5.0),
    "cold": SamplingOptions(0.05),
    "top-k 1": SamplingOptions(1.0, top_k=1),
    "top-k": SamplingOptions(0.9, top_k=50),
    "large top-k": SamplingOptions(1.0, top_k=5000),
    "top-p": SamplingOptions(1.0, top_p=0.9),
    "small top-p": SamplingOptions(1.0, top_p=1e-6),
    "high top-p": SamplingOptions(1.5, top_p=0.999),
    "min-p": SamplingOptions(0.8, min_p=0.05),
    "all": SamplingOptions(0.7, top_k=400, top_p=0.95, min_p=0.002, repetition_penalty=1.3),
    "few": SamplingOptions(0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2),
    "penalty": SamplingOptions(0.0, repetition_penalty=0.5),
}

Floats = npt.NDArray[np.float32]


def normal(width: float) -> Callable[[np.random.Generator, int, int], Floats]:
    return lambda rng, b, v: (width * rng.standard_normal((b, v))).astype(np.float32)


def ties(rng: np.random.Generator, b: int, v: int) -> Floats:
    return np.round(2 * rng.standard_normal((b, v))).astype(np.float32) * 0.5


def equal(rng: np.random.Generator, b: int, v: int) -> Floats:
    return np.full((b, v), -3.25, np.float32)


def peaked(rng: np.random.Generator, b: int, v: int) -> Floats:
    logits = normal(1)(rng, b, v)
    logits[np.arange(b), rng.integers(v, size=b)] += 9
    return logits


def sparse(rng: np.random.Generator, b: int, v: int) -> Floats:
    logits = normal(2)(rng, b, v)
    logits[rng.random((b, v)) < 0.95] = -np.inf
    logits[:, v // 2] = 0.0
    return logits


def zeros(rng: np.random.Generator, b: int, v: int) -> Floats:
    """Zeros of both signs, which are equal, and numbers around them."""
    return rng.choice(np.array([0.0, -0.0, 1e-6, -1e-6], np.float32), (b, v))


def far(rng: np.random.Generator, b: int, v: int) -> Floats:
    logits = normal(3)(rng, b, v)
    logits[:, :: max(v // 3, 1)] = -3e38
    return logits


KINDS: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "normal": normal(1), "wide": normal(4), "ties": ties, "equal": equal, "peaked": peaked, "sparse": sparse,
    "zeros": zeros, "far": far,
}  # fmt: skip


def bitmask(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """[..., V] -> [..., ceil(V/32)]; bits beyond V are set, as they must not matter."""
    padding = [(0, 0)] * (chosen.ndim - 1) + [(0, -chosen.shape[-1] % 32)]
    padded = np.pad(chosen, padding, constant_values=True)
    return np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)


def gap(
    scores: Floats, options: SamplingOptions, u: float, token: int, seen: npt.NDArray[np.bool_] | None
) -> float:
    """How far u is from the interval that sampling.py gives to `token`; huge if it gives none."""
    wide = scores.astype(np.float64)
    if seen is not None:
        factor = options.repetition_penalty
        wide[seen] = np.where(wide[seen] > 0, wide[seen] / factor, wide[seen] * factor)
    weights = np.exp((wide - wide.max()) / options.temperature)[None]
    if options.top_k:
        weights = keep(weights, lambda row: sampling.largest(row, options.top_k))
    if options.top_p < 1:
        weights = keep(weights, lambda row: sampling.nucleus(row, options.top_p))
    if options.min_p:
        weights = keep(weights, lambda row: sampling.likely_enough(row, options.min_p))
    if weights[0, token] == 0:
        return 1e9
    sums = np.cumsum(weights[0])
    low, high = (sums[token] - weights[0, token]) / sums[-1], sums[token] / sums[-1]
    return float(max(low - u, u - high, 0.0))
