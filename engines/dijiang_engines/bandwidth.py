"""How fast this machine reads memory: the ceiling of decoding, which reads every weight for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dijiang_engines.cuda import Cuda

BUFFER_BYTES = 256 << 20
"""A thread's share: larger than any cache that it could come from."""
ROUNDS = 6
GPU_COPY_BYTES = 1 << 30
"""Of the buffer that is copied on a GPU; bytes read and bytes written are twice that."""
GPU_ROUNDS = 20


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second over all threads, or of a GPU; the best of several rounds."""

    threads: int
    """Of the CPU; 0 on a GPU."""
    read: float
    """Reading alone: bitwise-or of 64-bit integers, the leanest reduction that NumPy has. Without a kernel
    that only reads (a GPU without PyTorch): the rate of copying."""
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


def measure_gpu_bandwidth(
    cuda: Cuda, *, buffer_bytes: int = GPU_COPY_BYTES, rounds: int = GPU_ROUNDS
) -> Bandwidth:
    """Copy on a GPU and time it by its own events; needs no PyTorch. Takes well under a second.

    Args:
        cuda: the GPU.
        buffer_bytes: of the source, and again of the target; many times the GPU's cache.
        rounds: copies; the best counts, after one that does not.

    Raises:
        RunnerError: too little memory, or CUDA fails.
    """
    source, target = cuda.buffer(buffer_bytes), cuda.buffer(buffer_bytes)
    stream, begin, end = cuda.stream(), cuda.event(timing=True), cuda.event(timing=True)
    stream.fill(source.address, 1, buffer_bytes)
    seconds = []
    for _ in range(rounds + 1):
        stream.record(begin)
        stream.copy(target.address, source.address, buffer_bytes)
        stream.record(end)
        end.wait()
        seconds.append(end.seconds_since(begin))
    rate = 2 * buffer_bytes / min(seconds[1:])
    return Bandwidth(0, rate, rate)
