"""From logits to the next token: pure NumPy, all rows at once, float64 where it matters.

The order is: repetition penalty, temperature, top-k, top-p, min-p, draw. Each filter sees the
distribution that the one before left (renormalised), as is usual elsewhere. Ties are broken towards the lower
token id everywhere, so that equal logits give equal tokens on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError, UsageError

Logits = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. The defaults are greedy.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Only the fewest most likely tokens that together reach this probability; 1 = all."""
    min_p: float = 0.0
    """Only tokens at least this likely relative to the most likely one; 0 = all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the text already has; 1 = none."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top-k": (self.top_k >= 0, "0 (all) or more"),
            "top-p": (0 < self.top_p <= 1, "above 0, at most 1 (all)"),
            "min-p": (0 <= self.min_p <= 1, "0 (all) to 1"),
            "repetition penalty": (0 < self.repetition_penalty < float("inf"), "above 0; 1 is none"),
        }
        for name, (good, expected) in checks.items():
            if not good:  # a NaN is not good either
                got = getattr(self, name.replace("-", "_").replace(" ", "_"))
                raise UsageError(f"{name} is out of range", got=got, expected=expected)

    @property
    def greedy(self) -> bool:
        """True if no randomness is involved."""
        return self.temperature == 0


def sample(
    logits: Logits,
    options: SamplingOptions,
    uniforms: npt.NDArray[np.float64] | None = None,
    *,
    seen: Mask | None = None,
    banned: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Choose one token per row.

    Args:
        logits: [B, V], finite or -inf; not changed.
        options: how.
        uniforms: [B] in [0, 1), one random number per row; not needed when greedy.
        seen: [B, V], tokens that the repetition penalty applies to.
        banned: token ids that are never chosen.

    Returns:
        [B] int64.

    Raises:
        RunnerError: a row holds NaN or +inf, or nothing that may be chosen.
    """
    scores: Logits = np.array(logits, dtype=np.float32)
    if banned is not None and banned.size:
        scores[:, banned] = -np.inf
    highest = scores.max(axis=1)  # NaN if any is NaN
    if not np.isfinite(highest).all():
        row = int(np.flatnonzero(~np.isfinite(highest))[0])
        raise RunnerError(
            f"the model's logits of row {row} are not finite",
            got=f"{np.isnan(scores[row]).sum()} NaN and {np.isposinf(scores[row]).sum()} +inf",
            hint="`dijiang-export validate` shows where the model goes wrong",
        )
    if seen is not None and options.repetition_penalty != 1:
        rows, tokens = np.nonzero(seen)
        scores = scores.astype(np.float64)  # the penalty may leave float32's range
        factor, old = options.repetition_penalty, scores[rows, tokens]
        scores[rows, tokens] = np.where(old > 0, old / factor, old * factor)
    if options.greedy:
        return np.asarray(scores.argmax(axis=1), dtype=np.int64)
    if uniforms is None:
        raise UsageError("sampling needs random numbers")
    weights = _weights(scores, options.temperature)
    if options.top_k:
        weights = keep_top_k(weights, options.top_k)
    if options.top_p < 1:
        weights = keep_top_p(weights, options.top_p)
    if options.min_p > 0:
        weights = keep_min_p(weights, options.min_p)
    return draw(weights, uniforms)


def _weights(scores: Logits, temperature: float) -> npt.NDArray[np.float64]:
    """exp((scores - max) / temperature) [B, V]: unnormalised probabilities, the largest being 1."""
    wide = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature may overflow to -inf, which is right
        wide = (wide - wide.max(axis=1, keepdims=True)) / temperature
    return np.asarray(np.exp(wide))


def keep_top_k(weights: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.float64]:
    """Zero all but each row's k largest weights [B, V]."""
    if k >= weights.shape[1]:
        return weights
    threshold = np.partition(weights, -k, axis=1)[:, -k, None]
    above = weights > threshold
    # Fill up from those equal to the k-th largest, lowest ids first.
    equal = weights == threshold
    room = k - above.sum(axis=1, keepdims=True)
    keep = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return np.where(keep, weights, 0.0)


def keep_top_p(weights: npt.NDArray[np.float64], p: float) -> npt.NDArray[np.float64]:
    """Zero all but each row's fewest largest weights [B, V] whose share reaches p; at least one stays."""
    result = np.zeros_like(weights)
    for row in range(weights.shape[0]):
        result[row] = _row_top_p(weights[row], p)
    return result


def _row_top_p(weights: npt.NDArray[np.float64], p: float) -> npt.NDArray[np.float64]:
    target = p * weights.sum()
    size = weights.shape[0]
    count = min(size, 128)
    while True:
        # Sorting a whole vocabulary takes longer than a step of a small model; the nucleus is mostly small.
        least = 0.0 if count == size else np.partition(weights, -count)[-count]
        top = np.flatnonzero((weights >= least) & (weights > 0))
        order = top[np.argsort(-weights[top], kind="stable")]
        reached = np.cumsum(weights[order])
        if reached[-1] >= target or count == size:
            break
        count = min(size, count * 8)
    keep = order[: int(np.searchsorted(reached, target)) + 1]
    result = np.zeros_like(weights)
    result[keep] = weights[keep]
    return result


def keep_min_p(weights: npt.NDArray[np.float64], min_p: float) -> npt.NDArray[np.float64]:
    """Zero weights [B, V] below `min_p` times their row's largest."""
    return np.where(weights >= min_p * weights.max(axis=1, keepdims=True), weights, 0.0)


def draw(weights: npt.NDArray[np.float64], uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """One index per row, with probability proportional to weights [B, V], by inversion of uniforms [B]."""
    sums = np.cumsum(weights, axis=1)
    # A place in [0, total): the first index whose running sum is beyond it, so never one of weight zero.
    places = uniforms * sums[:, -1]
    chosen = (sums <= places[:, None]).sum(axis=1)
    last = weights.shape[1] - 1 - (weights[:, ::-1] > 0).argmax(axis=1)
    return np.asarray(
        np.minimum(chosen, last), dtype=np.int64
    )  # rounding may have put a place at the very end


def uniform(seed: int, stream: int, index: int) -> float:
    """The `index`-th random number of `stream` under `seed`: in [0, 1), the same on every machine.

    Philox is counter-based: the number depends on these three alone, so what a row draws does not depend
    on its neighbours in a batch, nor on whether the text was resumed from a file.
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=np.array([index, 0, 0, 0], dtype=np.uint64)).random_raw()
    return float(raw >> 11) * 2.0**-53
