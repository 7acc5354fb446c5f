"""From logits to the next token: pure NumPy, all rows at once, float64 where it matters.

The order is: repetition penalty, temperature, top-k, top-p, min-p, draw. Each filter sees the
distribution that the one before left (renormalised), as is usual elsewhere. Ties are broken towards the lower
token id everywhere, so that equal logits give equal tokens on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError, UsageError

Logits = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float64]
"""[V], unnormalised probabilities."""
Places = npt.NDArray[np.int64]
"""Indices into weights."""


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
    return np.array(
        [_choose(row, options, at) for row, at in zip(scores, uniforms.tolist(), strict=True)], dtype=np.int64
    )


def _choose(scores: npt.NDArray[np.floating], options: SamplingOptions, uniform: float) -> int:
    """One token by scores [V], of those that the filters leave, by inversion of a number in [0, 1)."""
    kept = None if not options.top_k else largest(scores, options.top_k)
    weights = _weights(scores if kept is None else scores[kept], options.temperature)
    for places in _filters(options):
        left = places(weights)
        weights, kept = weights[left], left if kept is None else kept[left]
    chosen = draw(weights, uniform)
    return chosen if kept is None else int(kept[chosen])


def _filters(options: SamplingOptions) -> Iterator[Callable[[Weights], Places]]:
    """Those after top-k, each of weights that the one before left."""
    if options.top_p < 1:
        yield lambda weights: nucleus(weights, options.top_p)
    if options.min_p > 0:
        yield lambda weights: likely_enough(weights, options.min_p)


def _weights(scores: Logits, temperature: float) -> Weights:
    """exp((scores - max) / temperature) [V]: unnormalised probabilities, the largest being 1."""
    wide = scores.astype(np.float64)
    wide -= wide.max()
    with np.errstate(over="ignore"):  # a tiny temperature may overflow to -inf, which is right
        wide /= temperature
    return np.asarray(np.exp(wide, out=wide))


def largest(values: npt.NDArray[np.floating], k: int) -> Places:
    """Where the k largest of [V] are, ascending; of equal ones the first."""
    if k >= values.size:
        return np.arange(values.size)
    threshold = np.partition(values, -k)[-k]
    found = np.flatnonzero(values >= threshold)
    if found.size > k:
        equal = np.flatnonzero(values[found] == threshold)
        found = np.delete(found, equal[k - found.size :])
    return found


_AHEAD = 32
"""Random numbers that are drawn at once."""
_BIN_SHIFT = np.int64(46)
"""Bits of a float64 below those that name its bin: the exponent and six bits of the fraction are left."""
_FEW = 1024
"""Weights that are sorted sooner than they are put into bins."""
_BINS = 1 << 13
"""128 powers of two below the largest weight; what is smaller still shares the last bin."""


def nucleus(weights: Weights, p: float) -> Places:
    """Where the fewest largest of weights [V] are whose share reaches p, ascending; at least one.

    Sorting a whole vocabulary takes longer than a step of a small model. So those are left out that are too
    small to matter: all below (1 - p) / V of the whole have less than 1 - p of it together; half as much
    leaves room for rounding. The others are put into bins by their size, which the bits of positive floats
    tell in order, and only the bin in which p is reached is sorted.
    """
    total = weights.sum()
    large = (weights >= 0.5 * (1 - p) * total / weights.size).nonzero()[0]
    return np.sort(large[_nucleus_of(weights[large], p * total)])


def _nucleus_of(weights: Weights, target: float) -> Places:
    """Where the fewest largest of weights [n] are whose sum reaches `target`; all if rounding says so."""
    if weights.size <= _FEW:
        order = (-weights).argsort(kind="stable")
        return order[: int(weights[order].cumsum().searchsorted(target)) + 1]
    bits = weights.view(np.int64) >> _BIN_SHIFT
    bins = np.minimum(bits.max() - bits, _BINS - 1)
    reached = np.cumsum(np.bincount(bins, weights, _BINS))
    last = int(np.searchsorted(reached, target))
    before = reached[last - 1] if last else 0.0
    border = np.flatnonzero((bins == last) & (weights > 0))
    order = border[np.argsort(-weights[border], kind="stable")]
    within = before + weights[order].cumsum()
    kept = order[: int(np.searchsorted(within, target)) + 1]
    return np.concatenate([np.flatnonzero(bins < last), kept])


def likely_enough(weights: Weights, min_p: float) -> Places:
    """Where weights [V] are that are at least `min_p` times the largest, ascending."""
    return np.flatnonzero(weights >= min_p * weights.max())


def draw(weights: Weights, uniform: float) -> int:
    """A place in weights [V], with probability proportional to them, by inversion of a number in [0, 1)."""
    sums = weights.cumsum()
    # A point in [0, total): the first place whose running sum is beyond it, so never one of weight zero.
    chosen = int(sums.searchsorted(uniform * sums[-1], side="right"))
    if chosen == sums.size:  # rounding put the point at the very end
        chosen = int(np.flatnonzero(weights)[-1])
    return chosen


def uniform(seed: int, stream: int, index: int) -> float:
    """The `index`-th random number of `stream` under `seed`: in [0, 1), the same on every machine.

    Philox is counter-based: the number depends on these three alone, so what a row draws does not depend
    on its neighbours in a batch, nor on whether the text was resumed from a file.
    """
    return Uniforms(seed, stream).at(index)


class Uniforms:
    """`uniform` of one text, drawn ahead: a generator takes longer to make than a number.

    Args:
        seed: any integer, of which 64 bits count.
        stream: of the text; 0 to 2**64 - 1.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._key = np.array([seed % 2**64, stream], dtype=np.uint64)
        self._first = 0
        self._numbers: list[float] = []

    def at(self, index: int) -> float:
        """The `index`-th number; quickest in ascending order."""
        place = index - self._first
        if not 0 <= place < len(self._numbers):
            self._first, place = index, 0
            counter = np.array([index, 0, 0, 0], dtype=np.uint64)
            # Each value of the counter gives four words, of which the first is taken.
            words = np.random.Philox(key=self._key, counter=counter).random_raw(4 * _AHEAD)[::4]
            self._numbers = ((words >> np.uint64(11)) * 2.0**-53).tolist()
        return self._numbers[place]
