"""The decode loop on the GPU: step, sample and advance as one CUDA graph per token.

The host launches the graph for the next token before it looks at the last one's, so its own work (text,
stop conditions) runs beside the GPU's. Rows that end by a stop token end on the GPU; rows that end by their
number of tokens are ended by two small writes before the launch that would read too far.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError
from dijiang_engines.kernels.abi import ROW_STATUS
from dijiang_engines.nvidia.cuda import Event, Pinned
from dijiang_engines.runners.base import IntArray
from dijiang_engines.runners.decoding import DecodeRequest
from dijiang_engines.runners.tensorrt.contexts import Contexts, TensorRTState

SLOTS = 3
"""Results on their way to the host: one being read, one being written, one to spare."""


@dataclass(frozen=True)
class View:
    """Device memory with a type, for the kernels' checks."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3 of the interface."""
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False),
            "version": 3, "strides": None,
        }  # fmt: skip


@dataclass
class _Slot:
    host: Pinned
    """Tokens, then row_status, as they lie on the device."""
    event: Event


class TensorRTDecoder:
    """See `decoding.Decoder`. Made by `TensorRTRunner.start_decoding`.

    Args:
        contexts: what a step runs in.
        state: which one; the decoder's until it is closed.
        request: checked (`checks.check_decoding`).
        kernels: `kernels.attention.Kernels`.
    """

    def __init__(
        self, contexts: Contexts, state: TensorRTState, request: DecodeRequest, kernels: Any
    ) -> None:
        self._state, self._request = state, request
        self._cuda, self._stream, self._integers = (
            contexts.gpu.cuda, contexts.gpu.stream, contexts.gpu.integers,
        )  # fmt: skip
        self._cuda.activate()
        batch, vocabulary = state.batch, contexts.engine.spec.vocab_size
        self._batch = batch
        self._remaining = np.array(request.remaining, np.int64)
        self._ended = self._remaining <= 0
        """Rows that the device knows to be finished."""
        self._told_ended, self._told_left = self._ended.copy(), self._remaining.copy()
        """The same as the caller knows it, up to two launches later."""
        self._pitch = state.pitch
        self._result = self._cuda.buffer(2 * self._pitch)
        self._tokens = View(self._result.address, (batch,), self._integers)
        self._status = View(self._result.address + self._pitch, (batch,), np.dtype(np.int32))
        self._buffers: list[Any] = [self._result]
        finished = self._put(self._ended.astype(np.int32))
        self._finished = finished.address
        sampling, words = request.sampling, (vocabulary + 31) // 32
        allowed = None
        if request.banned is not None and request.banned.size:
            mask = np.ones(vocabulary, np.bool_)
            mask[request.banned] = False
            allowed = self._put(_bits(mask[None], words)[0])
        seen = None
        if request.seen is not None:
            seen = self._put(_bits(request.seen, words))
        draws = self._put(np.asarray(request.draws, np.int64))
        streams = self._put(np.asarray(request.streams, np.int64))
        stops = self._put(np.array(request.stop_ids, np.int32)) if request.stop_ids else None
        context = contexts.bound_step(state)
        view = View(state.logits, (batch, vocabulary), np.dtype(np.float32))
        integers = {
            name: View(address, (batch,), self._integers)
            for name, address in (
                ("positions", state.positions), ("seq_lens", state.seq_lens), ("input_ids", state.ids),
            )
        }  # fmt: skip
        self._stream.begin_capture()
        try:
            contexts.execute(context, state)
            kernels.sample(
                sampling, logits=view, tokens=self._tokens, row_status=self._status, seed=request.seed,
                streams=streams, draws=draws, allowed=allowed, seen=seen, stream=self._stream.handle,
            )  # fmt: skip
            kernels.advance(
                tokens=self._tokens, finished=finished, vocabulary=vocabulary, row_status=self._status,
                draws=draws, seen=seen, stop_ids=stops, stream=self._stream.handle, **integers,
            )  # fmt: skip
        except BaseException:
            self._stream.abandon_capture()
            raise
        self._graph = self._stream.end_capture()
        self._context = context  # the graph uses its memory
        state.put(np.asarray(request.tokens), np.asarray(request.positions), (~self._ended).astype(np.int64))
        self._stream.synchronize()
        self._free = [
            _Slot(self._cuda.pinned((2 * self._pitch,), np.uint8), self._cuda.event()) for _ in range(SLOTS)
        ]
        self._flying: deque[_Slot] = deque()

    def next(self) -> IntArray:
        """The next token of every unfinished row, [B]."""
        if not self._flying:
            self._launch()
        if self._request.ahead and (self._remaining > 0).any():
            self._launch()
        slot = self._flying.popleft()
        slot.event.wait()
        tokens: npt.NDArray[np.int64] = (
            slot.host.array[: self._pitch].view(self._integers)[: self._batch].astype(np.int64)
        )
        status = slot.host.array[self._pitch :].view(np.int32)[: self._batch].copy()
        self._free.append(slot)
        running = ~self._told_ended
        bad = np.flatnonzero((status != 0) & running)
        if bad.size:
            row = int(bad[0])
            raise RunnerError(
                f"the model's logits of row {row} cannot be sampled from",
                got=ROW_STATUS[int(status[row])],
                hint="`dijiang-export validate` shows where the model goes wrong",
            )
        if self._request.stop_ids:
            stopped = np.isin(tokens, self._request.stop_ids) & running
            self._told_ended |= stopped
            self._ended |= stopped  # by `advance`
            self._remaining[stopped] = 0
        self._told_left -= running
        self._told_ended |= self._told_left <= 0
        return tokens

    def stop_row(self, row: int) -> None:
        """End a row now; see `decoding.Decoder`."""
        self._remaining[row] = 0
        self._told_ended[row] = True

    def close(self) -> None:
        """Wait until nothing of it runs any more."""
        self._stream.synchronize()
        self._flying.clear()

    def _launch(self) -> None:
        for row in np.flatnonzero((self._remaining <= 0) & ~self._ended):
            item = self._integers.itemsize
            self._stream.fill(self._finished + 4 * int(row), 1, 1)  # little-endian 1 in a zeroed int32
            self._stream.fill(self._state.seq_lens + item * int(row), 0, item)
            self._ended[row] = True
        self._stream.launch(self._graph)
        slot = self._free.pop()
        self._stream.download(slot.host.address, self._result.address, slot.host.size)
        self._stream.record(slot.event)
        self._flying.append(slot)
        self._remaining[self._remaining > 0] -= 1

    def _put(self, values: npt.NDArray[Any]) -> View:
        """A copy on the device."""
        array = np.ascontiguousarray(values)
        buffer = self._cuda.buffer(array.nbytes)
        self._buffers.append(buffer)
        self._stream.upload(buffer.address, array.ctypes.data, array.nbytes)
        self._stream.synchronize()
        return View(buffer.address, array.shape, array.dtype)


def _bits(mask: npt.NDArray[np.bool_], words: int) -> npt.NDArray[np.uint32]:
    """[B, V] as bitmasks uint32 [B, words]: bit i % 32 of word i // 32 is token i."""
    packed = np.packbits(mask, axis=1, bitorder="little")
    padded = np.zeros((mask.shape[0], 4 * words), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view("<u4")
