"""How fast this machine reads memory: the ceiling of decoding, which reads every weight for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

BUFFER_BYTES = 256 << 20
"""A thread's share: larger than any cache that it could come from."""
ROUNDS = 6


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second over all threads; the best of several rounds."""

    threads: int
    read: float
    """Reading alone: bitwise-or of 64-bit integers, the leanest reduction that NumPy has."""
    copy: float
    """Copying, reads and writes both counted."""


def measure_bandwidth(threads: int, *, buffer_bytes: int = BUFFER_BYTES, rounds: int = ROUNDS) -> Bandwidth:
    """Measure with NumPy, each thread on buffers of its own; takes about a second.

    Args:
        threads: as many as the runner uses.
        buffer_bytes: of each thread's source, and again of its target.
        rounds: of each kind; the best counts.
    """
    sources = [np.ones(buffer_bytes // 8, np.int64) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    total = sum(source.nbytes for source in sources)

    def read(index: int) -> None:
        np.bitwise_or.reduce(sources[index])

    def copy(index: int) -> None:
        np.copyto(targets[index], sources[index])

    with ThreadPoolExecutor(threads) as pool:

        def best(work: Callable[[int], None], moved: int) -> float:
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                list(pool.map(work, range(threads)))
                seconds.append(time.perf_counter() - start)
            return moved / min(seconds)

        # The first copy also brings the targets' pages into being; the best of the rounds ignores it.
        return Bandwidth(threads, best(read, total), best(copy, 2 * total))
