"""How fast this machine reads memory: the ceiling of decoding, which reads every weight for every token."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from dijiang_engines.nvidia.cuda import Cuda

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


class GpuCopy(Protocol):
    """A copy of a large buffer within one GPU's memory, ready to be done again and again."""

    size: int
    """Bytes of the source, and of the target."""

    def seconds(self) -> float:
        """Do the copy once, on a stream and not in a CUDA graph; its time between two events of the GPU.

        A copy that is captured in a graph can be a third slower than the same copy on a stream, so its rate
        is not the memory's.
        """
        ...


def measure_gpu_bandwidth(copy: GpuCopy, *, rounds: int = GPU_ROUNDS) -> Bandwidth:
    """The rate of a GPU's memory, for every benchmark: whole copies on a stream. Takes well under a second.

    Args:
        copy: of GPU_COPY_BYTES; `CudaCopy`, or with PyTorch `dijiang_export.bench.memory_rate.TorchCopy`.
        rounds: copies; the best counts, after one that does not.
    """
    copy.seconds()
    rate = 2 * copy.size / min(copy.seconds() for _ in range(rounds))
    return Bandwidth(0, rate, rate)


class CudaCopy:
    """A copy through cuda-bindings; needs no PyTorch.

    Args:
        cuda: the GPU.
        size: bytes of the source, and again of the target; many times the GPU's cache.

    Raises:
        RunnerError: too little memory, or CUDA fails.
    """

    def __init__(self, cuda: Cuda, size: int = GPU_COPY_BYTES) -> None:
        self.size = size
        self._source, self._target = cuda.buffer(size), cuda.buffer(size)
        self._stream = cuda.stream()
        self._begin, self._end = cuda.event(timing=True), cuda.event(timing=True)
        self._stream.fill(self._source.address, 1, size)

    def seconds(self) -> float:
        """See `GpuCopy`.

        Raises:
            RunnerError: CUDA fails.
        """
        self._stream.record(self._begin)
        self._stream.copy(self._target.address, self._source.address, self.size)
        self._stream.record(self._end)
        self._end.wait()
        return self._end.seconds_since(self._begin)
