"""From logits to what is known of each predicted token, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.runners.base import IntArray

_ELEMENTS = 1 << 18
"""Logits that are worked on at once: in float64 they stay in a core's cache."""

Logits = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Differences:
    """How another model's predictions differ, token by token."""

    kl: Doubles
    """[n]: KL(other || this) in nats."""
    agree: npt.NDArray[np.bool_]
    """[n]: both find the same token the likeliest."""
    loss: Doubles
    """[n]: the other's -ln p(token)."""


def first_not_finite(logits: Logits) -> int | None:
    """The first row of logits [n, V] with NaN or infinity."""
    if np.isfinite(logits).all():
        return None
    return int(np.argmin(np.isfinite(logits).all(-1)))


def losses(logits: Logits, targets: IntArray) -> Doubles:
    """-ln softmax(logits)[target] in nats: logits [n, V] finite, targets [n] -> [n] float64."""
    out = np.empty(len(targets), np.float64)
    for rows in _blocks(logits):
        x = logits[rows].astype(np.float64)
        most = x.max(-1)
        wanted = np.take_along_axis(x, targets[rows, None], -1)[:, 0]
        x -= most[:, None]
        out[rows] = np.log(np.exp(x, out=x).sum(-1)) + (most - wanted)
    return out


def differences(this: Logits, other: Logits, targets: IntArray) -> tuple[Doubles, Differences]:
    """This model's losses, and how the other's predictions differ: logits [n, V] each.

    The KL divergence is summed as p·(d + exp(-d) - 1), p the other's probabilities and d = ln p - ln q: that
    is p·d, whose sum it is, and terms q - p, whose sum is zero. No term is negative, so that nearly equal
    predictions do not cancel to noise.
    """
    count = len(targets)
    out = [np.empty(count, np.float64) for _ in range(3)]
    for rows in _blocks(this):
        log_q, log_p = _log_softmax(this[rows]), _log_softmax(other[rows])
        for place, logs in ((0, log_q), (1, log_p)):
            out[place][rows] = -np.take_along_axis(logs, targets[rows, None], -1)[:, 0]
        out[2][rows] = _kl(log_p, log_q)
    return out[0], Differences(out[2], this.argmax(-1) == other.argmax(-1), out[1])


def _kl(log_p: Doubles, log_q: Doubles) -> Doubles:
    """KL(p || q) along the last axis."""
    p, d = np.exp(log_p), log_p - log_q
    near = np.abs(d) < 1  # where exp(-d) - 1 loses digits; far from there it may overflow
    terms = np.where(near, p * (d + np.expm1(-np.where(near, d, 0.0))), p * d + (np.exp(log_q) - p))
    found: Doubles = np.maximum(terms.sum(-1), 0.0)
    return found


def _log_softmax(logits: Logits) -> Doubles:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def _blocks(logits: Logits) -> list[slice]:
    step = max(1, _ELEMENTS // logits.shape[-1])
    return [slice(first, first + step) for first in range(0, len(logits), step)]
