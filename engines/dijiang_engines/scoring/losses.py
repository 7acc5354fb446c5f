"""From logits to what is known of each predicted token, in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.machine import usable_cpus
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

    def work(rows: slice) -> None:
        x = _shifted(logits[rows])
        wanted = _at(x, targets[rows])
        out[rows] = np.log(np.exp(x, out=x).sum(-1)) - wanted

    _in_blocks(work, logits)
    return out


def differences(this: Logits, other: Logits, targets: IntArray) -> tuple[Doubles, Differences]:
    """This model's losses, and how the other's predictions differ: logits [n, V] finite, targets [n].

    With x and y the two models' logits and p = softmax(y),

        KL = sum of p·(ln p - ln softmax(x)) = sum of p·(y - x) + lse(x) - lse(y).
    """
    own, loss, kl = (np.empty(len(targets), np.float64) for _ in range(3))

    def work(rows: slice) -> None:
        x, y = _shifted(this[rows]), _shifted(other[rows])
        sum_x = np.exp(x).sum(-1)
        exp_y = np.exp(y)
        sum_y = exp_y.sum(-1)
        own[rows] = np.log(sum_x) - _at(x, targets[rows])
        loss[rows] = np.log(sum_y) - _at(y, targets[rows])
        y -= x
        y *= exp_y
        kl[rows] = y.sum(-1) / sum_y + np.log(sum_x) - np.log(sum_y)

    _in_blocks(work, this)
    # Exactly zero or more in exact arithmetic; rounding may leave -1e-16.
    return own, Differences(np.maximum(kl, 0.0), this.argmax(-1) == other.argmax(-1), loss)


def _shifted(logits: Logits) -> Doubles:
    """A float64 copy, less each row's largest: then no exp overflows, and their sum is at least 1."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x


def _at(values: Doubles, targets: IntArray) -> Doubles:
    return np.take_along_axis(values, targets[:, None], -1)[:, 0]


def _in_blocks(work: Callable[[slice], None], logits: Logits) -> None:
    """Call `work` for all rows, block after block on every core: NumPy lets go of the interpreter's lock."""
    step = max(1, _ELEMENTS // logits.shape[-1])
    blocks = [slice(first, first + step) for first in range(0, len(logits), step)]
    if len(blocks) == 1:
        work(blocks[0])
    else:
        list(_pool().map(work, blocks))  # the list: what one of them raises is raised here


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cpus(), "losses")
