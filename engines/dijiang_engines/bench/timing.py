"""Seconds of single calls, and how long to go on measuring them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls."""

    calls: int
    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    best: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise at least one measured call."""
        low, median, high = np.percentile(np.asarray(seconds, np.float64), [10, 50, 90])
        return cls(len(seconds), float(median), float(low), float(high), float(min(seconds)))


@dataclass(frozen=True)
class Effort:
    """How long to measure each figure."""

    seconds: float = 2.0
    """Stop after this much time, once there are `least` calls."""
    least: int = 5
    most: int = 400


def until_done(effort: Effort) -> Iterator[None]:
    """Yields once for each measured call, until there are enough."""
    start, calls = time.perf_counter(), 0
    while calls < effort.least or (calls < effort.most and time.perf_counter() - start < effort.seconds):
        yield
        calls += 1
