"""A call's arrays on their way to the GPU and back, through memory that is kept for the next call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.nvidia.cuda import Buffer, Pinned
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.tensorrt.contexts import Gpu


class Transfers:
    """Token ids up, logits down. The memory grows with the largest call so far and is reused."""

    def __init__(self, gpu: Gpu, vocab_size: int) -> None:
        self._gpu, self._vocab_size = gpu, vocab_size
        self._scratch: dict[str, Buffer] = {}
        self._staging: dict[str, Pinned] = {}

    def upload_ids(self, ids: IntArray, address: int | None = None) -> int:
        """Copy token ids [B, L] to device memory, and say where that is.

        Args:
            ids: the tokens.
            address: where; None: memory of this object's, good until the next call.
        """
        integers = self._gpu.integers
        size = ids.size * integers.itemsize
        staging = self._pinned("ids", ids.size, integers)
        staging.array[: ids.size] = ids.reshape(-1)
        address = self._grow("ids", size) if address is None else address
        self._gpu.stream.upload(address, staging.address, size)
        return address

    def logits(self, batch: int, rows: int) -> int:
        """A device address with room for float32 [batch, rows, V]; good until the next call."""
        return self._grow("logits", 4 * batch * rows * self._vocab_size)

    def read_logits(self, address: int, batch: int, rows: int) -> FloatArray:
        """[batch, rows, V] on the host; waits for the stream."""
        shape, stream = (batch, rows, self._vocab_size), self._gpu.stream
        if rows > 1:  # too much to keep page-locked
            result = np.empty(shape, np.float32)
            stream.download(result.ctypes.data, address, result.nbytes)
            stream.synchronize()
            return result
        count = math.prod(shape)
        staging = self._pinned("logits", count, np.dtype(np.float32))
        stream.download(staging.address, address, 4 * count)
        stream.synchronize()
        found: npt.NDArray[np.float32] = staging.array[:count].reshape(shape).copy()
        return found

    def _pinned(self, name: str, count: int, dtype: np.dtype[Any]) -> Pinned:
        staging = self._staging.get(name)
        if staging is None or staging.array.size < count:
            staging = self._staging[name] = self._gpu.cuda.pinned((count,), dtype)
        return staging

    def _grow(self, name: str, size: int) -> int:
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < size:
            self._gpu.stream.synchronize()  # what uses the old one
            self._scratch.pop(name, None)
            buffer = self._scratch[name] = self._gpu.cuda.buffer(size)
        return buffer.address
