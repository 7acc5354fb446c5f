"""TensorRT and TensorRT for RTX behind the Runner protocol.

One stream, on which everything runs in order. Each state has one buffer per layer, bound as both past and
present (the plugin's kernels are safe in place; contexts.py says what happens without them), so the memory of
a state is its size and never grows. A step is recorded once per state as a CUDA graph (contexts.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from dijiang_engines import io_names
from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.nvidia.cuda import Cuda, DeviceFacts
from dijiang_engines.runners.base import MAX_POSITIONS, FloatArray, IntArray
from dijiang_engines.runners.checks import (
    check_batch,
    check_call,
    check_copy,
    check_decoding,
    check_layers,
    check_owner,
    check_row_layers,
    check_rows,
)
from dijiang_engines.runners.decoding import Decoder, DecodeRequest
from dijiang_engines.runners.tensorrt import cublaslt
from dijiang_engines.runners.tensorrt.checks import check_tensors, open_runtime
from dijiang_engines.runners.tensorrt.contexts import Contexts, Gpu, TensorRTState, integers_of
from dijiang_engines.runners.tensorrt.kernel_cache import KernelCache
from dijiang_engines.runners.tensorrt.rtx import RtxContexts
from dijiang_engines.runners.tensorrt.transfers import Transfers
from dijiang_engines.runners.tensorrt.validated import is_validated, not_validated, remember_validation

NAME = "tensorrt"
KERNEL_POSITIONS = 2**24
"""Most tokens that the kernels turn by the right angle: they hold a position as float32, which is exact up
to there (plugins/kernels/attention/rotary.cuh, `rotary_turn`)."""


class TensorRTRunner:
    """An engine folder on TensorRT. Not for several threads at once; several runners may be.

    Args:
        engine: an opened engine.
        device: index of the GPU.
        cuda_graph: record steps; without it every step is enqueued layer by layer.

    Attributes:
        tensorrt: the loaded runtime.
        rtx: how TensorRT for RTX makes contexts; None with TensorRT.
        gpu: where it runs.
        contexts: of its plans.

    Raises:
        RunnerError: TensorRT or the GPU is missing or another than the engine was made for, or memory is
            short.
        PluginError: the plugin is missing or does not load.
    """

    def __init__(self, engine: EngineFolder, *, device: int = 0, cuda_graph: bool = True) -> None:
        self.name = NAME
        self.engine = engine
        self.spec = engine.spec
        self.all_logits = engine.all_logits
        self.max_batch = engine.profiles.max_batch
        self.max_length = engine.profiles.max_length
        """Tokens of each row that one call of the engine takes; longer prefills are cut."""
        self.max_positions = KERNEL_POSITIONS if self.spec.rotary_dim else MAX_POSITIONS
        self.uses_graphs = cuda_graph
        cuda = Cuda(device)
        facts = cuda.facts()
        self._facts = facts
        self.tensorrt = open_runtime(engine, facts)
        self.rtx = self._rtx(facts)
        free = cuda.memory()[0]
        plans = {name: self._load_plan(name) for name in engine.plans}
        if cublaslt.is_wanted(engine):  # after TensorRT, which may have brought one, and before any call
            cublaslt.load_from_wheels()
        for place in (engine.prefill, engine.step):
            check_tensors(engine, place, plans[place.file])
        self._weight_bytes = free - cuda.memory()[0]
        integers = integers_of(self.tensorrt, plans[engine.prefill.file])
        self.gpu = Gpu(cuda, cuda.stream(), integers)
        self.contexts = Contexts(engine, plans, self.tensorrt, self.gpu, self.rtx)
        self._transfers = Transfers(self.gpu, self.spec.vocab_size)
        self._kernels: Any = None

    # -- Runner ----------------------------------------------------------------------------------------

    def new_state(self, batch: int) -> TensorRTState:
        """A zeroed state for `batch` sequences."""
        check_batch(self, batch)
        self.gpu.cuda.activate()
        state = TensorRTState(self, self.gpu, self.spec, batch)
        state.zero()
        return state

    def reset_rows(self, state: TensorRTState, rows: Sequence[int]) -> None:
        """Zero these rows of the state in place."""
        check_owner(self, state, TensorRTState)
        state.zero(check_rows(rows, state.batch))

    def get_rows(self, state: TensorRTState, rows: Sequence[int]) -> list[FloatArray]:
        """Copies of these rows on the host; see `Runner.get_rows`."""
        check_owner(self, state, TensorRTState)
        found = check_rows(rows, state.batch)
        layers = [np.empty((len(found), *self.spec.state_shape), np.float32) for _ in state.layers]
        for layer, array in enumerate(layers):
            for index, row in enumerate(found):
                place = array.ctypes.data + index * state.row_bytes
                self.gpu.stream.download(place, state.row(layer, row), state.row_bytes)
        self.gpu.stream.synchronize()
        return layers

    def put_rows(self, state: TensorRTState, rows: Sequence[int], layers: list[FloatArray]) -> None:
        """Copy `layers` into these rows; see `Runner.put_rows`."""
        check_owner(self, state, TensorRTState)
        found, arrays = check_row_layers(self.spec, rows, state.batch, layers)
        for layer, array in enumerate(arrays):
            for index, row in enumerate(found):
                place = array.ctypes.data + index * state.row_bytes
                self.gpu.stream.upload(state.row(layer, row), place, state.row_bytes)
        self.gpu.stream.synchronize()  # the arrays are the caller's

    def copy_rows(
        self, source: TensorRTState, rows: Sequence[int], target: TensorRTState, places: Sequence[int]
    ) -> None:
        """Copy rows on the GPU, in stream order; see `Runner.copy_rows`."""
        for row, place in check_copy(self, TensorRTState, source, rows, target, places):
            for layer in range(self.spec.num_layers):
                self.gpu.stream.copy(target.row(layer, place), source.row(layer, row), source.row_bytes)

    def prefill(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: TensorRTState
    ) -> FloatArray:
        """Consume up to L tokens a row, in pieces of at most `max_length`; see `Runner.prefill`."""
        check_owner(self, state, TensorRTState)
        ids, starts, lens = check_call(self, input_ids, positions, seq_lens, state.batch)
        length = ids.shape[1]
        pieces = []
        result = None
        for start in range(0, length, self.max_length):
            part = ids[:, start : start + self.max_length]
            left = np.clip(lens - start, 0, part.shape[1])
            logits = self._prefill_piece(part, starts + np.minimum(lens, start), left, state)
            if self.all_logits:
                pieces.append(logits)
            elif result is None:
                result = logits
            else:  # a row's logits are those of the piece that holds its last token
                result[left > 0] = logits[left > 0]
        return np.concatenate(pieces, axis=1) if result is None else result

    def step(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: TensorRTState
    ) -> FloatArray:
        """`prefill` for L = 1, through the generation profile or plan."""
        check_owner(self, state, TensorRTState)
        ids, starts, lens = check_call(self, input_ids, positions, seq_lens, state.batch, step=True)
        self.gpu.cuda.activate()
        run = self.contexts.step_of(state, recorded=self.uses_graphs)
        state.put(ids, starts, lens)
        run()
        return self._transfers.read_logits(state.logits, state.batch, 1)

    def export_state(self, state: TensorRTState) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] array per layer."""
        check_owner(self, state, TensorRTState)
        layers = []
        for address in state.layers:
            array = np.empty((state.batch, *self.spec.state_shape), np.float32)
            self.gpu.stream.download(array.ctypes.data, address, array.nbytes)
            layers.append(array)
        self.gpu.stream.synchronize()
        return layers

    def import_state(self, layers: list[FloatArray]) -> TensorRTState:
        """A state that holds copies of `layers`."""
        arrays = check_layers(self.spec, layers)
        state = self.new_state(arrays[0].shape[0])
        for address, array in zip(state.layers, arrays, strict=True):
            self.gpu.stream.upload(address, array.ctypes.data, array.nbytes)
            self.gpu.stream.synchronize()
        return state

    # -- beside the protocol -----------------------------------------------------------------------------

    def start_decoding(self, state: TensorRTState, request: DecodeRequest) -> Decoder | None:
        """Choose tokens on the GPU from here on; see `decoding.Decoder`.

        None without the kernels' library, which only engines without the plugin can do without, and if the
        runtime does not let a step be recorded.
        """
        from dijiang_engines.kernels.attention import load_kernels
        from dijiang_engines.runners.tensorrt.decoder import TensorRTDecoder

        check_owner(self, state, TensorRTState)
        check_decoding(self, request, state.batch)
        library = self.tensorrt.kernels_library if self._kernels is None else None
        if self._kernels is None and library is not None:
            self._kernels = load_kernels(library)
        if self._kernels is None or not self.contexts.can_record(self.contexts.bound_step(state)):
            return None
        return TensorRTDecoder(self.contexts, state, request, self._kernels)

    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Make the contexts now rather than on first use."""
        self.gpu.cuda.activate()
        if prefill:
            self.contexts.for_prefill()
        if step:
            self.contexts.for_steps(1)
        if self.rtx is not None:
            self.rtx.cache.save()

    def notes(self) -> list[str]:
        """What whoever runs the engine should know."""
        found = [] if is_validated(self.engine, self._facts) else [not_validated(self.engine)]
        if self.rtx is not None and self.rtx.cache.note is not None:
            found.append(self.rtx.cache.note)
        library = self.tensorrt.kernels_library
        if library is not None and cublaslt.is_wanted(self.engine):
            slow = cublaslt.missing(library)
            found += [] if slow is None else [slow]
        return found

    def remember_validation(self) -> None:
        """The recorded cases passed here: `notes` need not ask for that any more."""
        remember_validation(self.engine, self._facts)

    def step_gpu_seconds(self, batch: int, position: int, calls: int) -> list[float]:
        """GPU time of `calls` steps, each measured by CUDA events around it."""
        state = self.new_state(batch)
        run = self.contexts.step_of(state, recorded=self.uses_graphs)
        ones = np.ones(batch, np.int64)
        before, after = self.gpu.cuda.event(timing=True), self.gpu.cuda.event(timing=True)
        seconds = []
        for index in range(calls + 3):
            state.put(np.full(batch, index % self.spec.vocab_size), ones * (position + index), ones)
            self.gpu.stream.synchronize()
            self.gpu.stream.record(before)
            run()
            self.gpu.stream.record(after)
            after.wait()
            seconds.append(after.seconds_since(before))
        return seconds[3:]

    def memory(self) -> dict[str, int]:
        """Device bytes: what loading the plans took, activations, and one sequence's state."""
        return {
            "plans": self._weight_bytes,
            "activations": self.contexts.activation_bytes,
            "state_per_sequence": self.spec.state_bytes,
        } | ({"state_scratch": self.contexts.scratch_bytes} if self.contexts.scratch_bytes else {})

    def settings(self) -> dict[str, str | int | bool]:
        """How the runner was set up."""
        return {"cuda_graph": self.uses_graphs} | (self.rtx.settings() if self.rtx is not None else {})

    # -- pieces ------------------------------------------------------------------------------------------

    def _rtx(self, facts: DeviceFacts) -> RtxContexts | None:
        """How TensorRT for RTX makes contexts; its kernels are written to their file when the runner goes."""
        if not self.tensorrt.dialect.ahead_of_time:
            return None
        cache = KernelCache(self.engine, self.tensorrt.version, facts)
        weakref.finalize(self, cache.save)
        return RtxContexts(self.tensorrt, cache)

    def _load_plan(self, name: str) -> Any:
        with self.engine.opened.unchanged(*self.engine.plans) as root:
            self.engine.verified_plan(name)
            return self.tensorrt.load_plan(root / name)

    def _prefill_piece(
        self, ids: IntArray, positions: IntArray, seq_lens: IntArray, state: TensorRTState
    ) -> FloatArray:
        self.gpu.cuda.activate()
        batch, length = ids.shape
        context = self.contexts.for_prefill()
        state.put(ids[:, :1], positions, seq_lens)
        rows = length if self.all_logits else 1
        tokens, logits = self._transfers.upload_ids(ids), self._transfers.logits(batch, rows)
        self.contexts.set_shapes(context, batch, length)
        bound = self.contexts.addresses(state) | {io_names.INPUT_IDS: tokens, io_names.LOGITS: logits}
        self.contexts.bind(context, bound)
        self.contexts.execute(context, state)
        return self._transfers.read_logits(logits, batch, rows)
