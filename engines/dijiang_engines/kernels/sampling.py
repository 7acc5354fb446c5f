"""Choosing tokens and counting on, on the GPU: plugins/include/dijiang/sampling.h."""

from __future__ import annotations

import ctypes
from dataclasses import asdict
from typing import Any

from dijiang_engines.kernels import abi
from dijiang_engines.kernels.device_arrays import DeviceArray, device_array
from dijiang_engines.kernels.library import Device, Library, device_argument
from dijiang_engines.sampling import SamplingOptions


class SamplingKernels(Library):
    """What a decode loop needs beside the model. See `dijiang_engines.kernels.attention`."""

    def sample_plan(self, batch: int, vocabulary: int, device: Device | None = None) -> str:
        """One line that says how `sample` cuts the work.

        Args:
            batch: B.
            vocabulary: V.
            device: None for the current one; given, no GPU is needed, and a row has at most eight blocks.

        Raises:
            KernelError: an argument is out of range.
        """
        text = ctypes.create_string_buffer(1024)
        self.call("dijiang_sample_plan", batch, vocabulary, device_argument(device), text, len(text))
        return text.value.decode()

    def sample(
        self,
        options: SamplingOptions,
        *,
        logits: Any,
        tokens: Any,
        row_status: Any,
        seed: int = 0,
        streams: Any = None,
        draws: Any = None,
        allowed: Any = None,
        seen: Any = None,
        row_options: Any = None,
        stream: int = 0,
    ) -> None:
        """Enqueue the choice of one token per row: what `sampling.sample` does, on the GPU.

        Both choose the same tokens but where rounding decides; the header says how close that is.

        Args:
            options: for all rows.
            logits: float32 [B, V], dense along V.
            tokens: int32 or int64 [B], written; -1 where row_status is not 0.
            row_status: int32 [B], written: 0, or an index of `abi.ROW_STATUS`.
            seed: of the random numbers, as `sampling.uniform`'s.
            streams: uint64 or int64 [B], as `sampling.uniform`'s; None: row r draws from stream r.
            draws: int64 [B], `index` of `sampling.uniform`; needed unless greedy.
            allowed: uint32 or int32 [B, ceil(V/32)], or [ceil(V/32)] for all rows: bit i % 32 of word
                i // 32 says that token i may be chosen. None: all may.
            seen: uint32 or int32 [B, ceil(V/32)]: tokens that the repetition penalty applies to.
            row_options: dijiang_sampling_options [B] (an address, or an array of any type), in place of
                `options` and `seed`.
            stream: where to.

        Raises:
            KernelError: an array is wrong, or CUDA refused.
        """
        array = device_array("logits", logits)
        batch, vocabulary = array.size(0), array.size(1)
        array.require(["float32"], [batch, vocabulary], 1)
        words = (vocabulary + 31) // 32
        chosen = device_array("tokens", tokens)
        chosen.require(list(abi.INTEGERS), [batch])
        fields = abi.SampleBuffersStruct(
            logits=array.pointer,
            logits_row_stride=array.stride(0),
            tokens=chosen.pointer,
            integers=_integers(chosen),
            row_status=_vector("row_status", row_status, ["int32"], batch),
            streams=_vector("streams", streams, ["uint64"], batch),
            draws=_vector("draws", draws, ["int64"], batch),
            row_options=device_array("row_options", row_options).pointer,
            batch=batch,
            vocabulary=vocabulary,
        )
        fields.allowed, fields.allowed_row_stride = _bitmask("allowed", allowed, batch, words, shared=True)
        fields.seen, fields.seen_row_stride = _bitmask("seen", seen, batch, words)
        choice = abi.SamplingOptionsStruct(**asdict(options), seed=seed % 2**64)
        self.call("dijiang_sample", ctypes.byref(choice), ctypes.byref(fields), stream)

    def advance(
        self,
        *,
        tokens: Any,
        finished: Any,
        vocabulary: int,
        row_status: Any = None,
        positions: Any = None,
        seq_lens: Any = None,
        draws: Any = None,
        input_ids: Any = None,
        history: Any = None,
        history_lens: Any = None,
        seen: Any = None,
        stop_ids: Any = None,
        active: Any = None,
        pad_id: int = 0,
        stream: int = 0,
    ) -> None:
        """Enqueue what a decode loop counts between two steps; see dijiang_advance_buffers.

        I is int32 or int64, the same for all arrays that say I.

        Args:
            tokens: I [B], of `sample`.
            finished: int32 [B], 0 or 1, updated: rows that have ended.
            vocabulary: V.
            row_status: int32 [B], of `sample`; None: all went well.
            positions: I [B], raised by seq_lens.
            seq_lens: I [B], then 1, or 0 for finished rows.
            draws: int64 [B], raised by one in rows that took a token.
            input_ids: I [B] or [B, 1], written: the token, pad_id in finished rows. May be `tokens`.
            history: I [B, most], dense along its last axis: takes each token. A row that is full finishes.
            history_lens: int32 [B], updated: how many tokens history has; needed with it.
            seen: uint32 or int32 [B, ceil(V/32)], takes each token.
            stop_ids: int32 [n]: tokens that finish a row.
            active: int32 [1], written: how many rows go on.
            pad_id: see input_ids.
            stream: where to.

        Raises:
            KernelError: an array is wrong, or CUDA refused.
        """
        chosen = device_array("tokens", tokens)
        batch = chosen.size(0)
        chosen.require(list(abi.INTEGERS), [batch])
        kind = [str(chosen.dtype)]
        past = device_array("history", history)
        if history is not None:
            past.require(kind, [batch, past.size(1)], 1)
        stops = device_array("stop_ids", stop_ids)
        if stop_ids is not None:
            stops.require(["int32"], [stops.size(0)])
        ids = device_array("input_ids", input_ids)
        if ids.known:
            ids.require(kind, [batch, 1] if len(ids.shape) == 2 else [batch])
        fields = abi.AdvanceBuffersStruct(
            tokens=chosen.pointer,
            integers=_integers(chosen),
            row_status=_vector("row_status", row_status, ["int32"], batch),
            positions=_vector("positions", positions, kind, batch),
            seq_lens=_vector("seq_lens", seq_lens, kind, batch),
            draws=_vector("draws", draws, ["int64"], batch),
            input_ids=ids.pointer,
            history=past.pointer,
            history_lens=_vector("history_lens", history_lens, ["int32"], batch),
            history_row_stride=past.stride(0),
            history_max=past.shape[1] if past.known else 0,
            finished=_vector("finished", finished, ["int32"], batch),
            stop_ids=stops.pointer,
            stop_count=stops.shape[0] if stops.known else 0,
            active=_vector("active", active, ["int32"], 1),
            batch=batch,
            vocabulary=vocabulary,
            pad_id=pad_id,
        )
        fields.seen, fields.seen_row_stride = _bitmask("seen", seen, batch, (vocabulary + 31) // 32)
        self.call("dijiang_advance", ctypes.byref(fields), stream)


def _vector(name: str, value: Any, dtypes: list[str], size: int) -> int:
    array = device_array(name, value)
    array.require(dtypes, [size])
    return array.pointer


def _integers(array: DeviceArray) -> int:
    return abi.INTEGERS[str(array.dtype)]


def _bitmask(name: str, value: Any, batch: int, words: int, *, shared: bool = False) -> tuple[int, int]:
    """Address and row stride; a stride of 0 is one row for all if `shared`, else dense."""
    array = device_array(name, value)
    if not array.known:
        return array.pointer, 0
    if shared and len(array.shape) == 1:
        array.require(["uint32"], [words])
        return array.pointer, 0
    array.require(["uint32"], [batch, words], 1)
    return array.pointer, array.stride(0)
