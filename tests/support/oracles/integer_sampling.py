"""The token that the kernel of dijiang_sample chooses, to the last bit: plugins/include/dijiang/sampling.h.

Softmax weights are float32 exponentials made integers, and everything after them is exact.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dijiang_engines.sampling import SamplingOptions

Floats = npt.NDArray[np.float32]
_LARGEST = float(np.finfo(np.float32).max)
_NORMAL = 1.17549435e-38
"""float32's least normal number."""


def _exp2f() -> Callable[[float], float]:
    """The C library's, which is the emulator's too: NumPy's may differ from it in the last bit."""
    function = ctypes.CDLL(ctypes.util.find_library("m")).exp2f
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    return function


def penalised(logits: Floats, penalty: float) -> Floats:
    """Logits [n], divided if positive and multiplied if negative, rounded once; infinite ones stay."""
    wide = logits.astype(np.float64)
    wide = np.where(wide > 0, wide / penalty, wide * penalty).clip(-_LARGEST, _LARGEST)
    return np.where(np.isfinite(logits), wide, logits).astype(np.float32)


def weights_of(scores: Floats, temperature: float) -> tuple[npt.NDArray[np.bool_], list[int]]:
    """Which of scores [V] have weight at all, and the weights [V], at most 2**(62 - bits of V - 1)."""
    bits = 62 - (scores.size - 1).bit_length()
    rate = np.float32(min(max(1.4426950408889634 / temperature, _NORMAL), _LARGEST))
    with np.errstate(over="ignore", invalid="ignore"):
        exponents = (scores - scores.max()) * rate
    there = exponents >= -(bits + 1)
    exp2f, weights, scale = _exp2f(), [0] * scores.size, np.float32(2.0**bits)
    for at in np.flatnonzero(there):
        weights[at] = int(np.rint(np.float32(exp2f(exponents[at])) * scale))
    return there, weights


def choose(
    logits: Floats,
    options: SamplingOptions,
    uniform: float,
    *,
    seen: npt.NDArray[np.bool_] | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> int:
    """One token by logits [V], finite or -inf.

    Args:
        logits: of the row.
        options: with a temperature.
        uniform: a multiple of 2**-53 in [0, 1).
        seen: [V], tokens the repetition penalty applies to.
        allowed: [V], tokens that may be chosen.
    """
    scores = logits.copy()
    if seen is not None and options.repetition_penalty != 1:
        scores[seen] = penalised(logits[seen], options.repetition_penalty)
    if allowed is not None:
        scores[~allowed] = -np.inf
    scores += np.float32(0)  # of -0 as of 0
    there, weights = weights_of(scores, options.temperature)
    kept = [int(at) for at in np.argsort(-scores, kind="stable") if there[at]]
    if 0 < options.top_k < scores.size:
        kept = kept[: options.top_k]
    if options.top_p < 1:
        total = sum(weights[at] for at in kept)
        target = min(max(math.ceil(options.top_p * float(total)), 1), total)
        reached = 0
        for number, at in enumerate(kept):
            reached += weights[at]
            if reached >= target:
                kept = kept[: number + 1]
                break
    bits = 62 - (scores.size - 1).bit_length()
    least = max(math.ceil(options.min_p * 2.0**bits), 1)
    kept = sorted(at for at in kept if weights[at] >= least)
    place = sum(weights[at] for at in kept) * (int(uniform * 2**53) << 11) >> 64
    for at in kept:
        if place < weights[at]:
            return at
        place -= weights[at]
    raise AssertionError("a place beyond all weights")
