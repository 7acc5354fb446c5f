"""TensorRT behind the Runner protocol.

One stream, on which everything runs in order. All execution contexts therefore share one block of activation
memory. Each state has one buffer per layer, bound as both past and present (the kernels are safe in
place), so the memory of a state is its size and never grows.

A step is recorded once per state as a CUDA graph. TensorRT wants an ordinary run before a capture; that run
has seq_lens 0 in all rows, which by the op contract leaves the states untouched, so nothing has to be saved.
A graph stays right only while its context's shapes stay, hence one context for each batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines import io_names
from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.engine import EngineFolder, PlanPlace
from dijiang_engines.nvidia.cuda import Buffer, Cuda, Graph, Pinned
from dijiang_engines.nvidia.tensorrt_library import TensorRT
from dijiang_engines.nvidia.tensorrt_versions import activation_bytes, context_without_memory, give_memory
from dijiang_engines.runners.base import MAX_POSITIONS, FloatArray, IntArray
from dijiang_engines.runners.checks import (
    check_batch,
    check_call,
    check_decoding,
    check_layers,
    check_owner,
    check_rows,
)
from dijiang_engines.runners.decoding import DecodeRequest
from dijiang_engines.runners.tensorrt.checks import check_made_for, check_tensors

NAME = "tensorrt"
KEPT_CONTEXTS = 4
"""Contexts for steps that are kept, one for each batch size that was used last."""
ALIGNMENT = 256
KERNEL_POSITIONS = 2**24
"""Most tokens that the kernels turn by the right angle: they hold a position as float32, which is exact up
to there (plugins/kernels/common.cuh, `rotary_turn`)."""


class TensorRTState:
    """The state of `batch` sequences on the GPU, and what a step of it reads and writes.

    Attributes:
        layers: device addresses of each layer's [B, H, d, d] float32.
        ids, positions, seq_lens: device addresses of I [B, 1], [B], [B].
        logits: device address of float32 [B, 1, V].
    """

    def __init__(self, owner: TensorRTRunner, batch: int) -> None:
        self.owner, self.batch = owner, batch
        spec, cuda = owner.spec, owner.cuda
        self.row_bytes = 4 * math.prod(spec.state_shape)
        self.layer_bytes = _aligned(batch * self.row_bytes)
        self.memory = cuda.buffer(spec.num_layers * self.layer_bytes)
        self.layers = [self.memory.address + i * self.layer_bytes for i in range(spec.num_layers)]
        item = owner.integers.itemsize
        self.pitch = _aligned(batch * item)
        self._integers = cuda.buffer(3 * self.pitch)
        self.ids, self.positions, self.seq_lens = (self._integers.address + i * self.pitch for i in range(3))
        self._host = cuda.pinned((3, self.pitch // item), owner.integers)
        self._logits = cuda.buffer(4 * batch * spec.vocab_size)
        self.logits = self._logits.address
        self.graph: tuple[Graph, Any] | None = None
        """A recorded step, and its context, which must live as long."""

    def zero(self, rows: Sequence[int] | None = None) -> None:
        """Zero all rows or some, in stream order."""
        stream = self.owner.stream
        if rows is None:
            stream.fill(self.memory.address, 0, self.memory.size)
            return
        for row in rows:
            stream.fill_rows(
                self.memory.address + row * self.row_bytes,
                self.layer_bytes, 0, self.row_bytes, len(self.layers),
            )  # fmt: skip

    def put(self, ids: IntArray, positions: IntArray, seq_lens: IntArray) -> None:
        """Upload a step's integers; returns when the host array may change again."""
        stream = self.owner.stream
        for place, values in zip(self._host.array, (ids.reshape(-1), positions, seq_lens), strict=True):
            place[: self.batch] = values
        stream.upload(self._integers.address, self._host.address, self._host.size)

    def addresses(self) -> dict[str, int]:
        """What a step binds."""
        bound = {
            io_names.INPUT_IDS: self.ids,
            io_names.POSITIONS: self.positions,
            io_names.SEQ_LENS: self.seq_lens,
            io_names.LOGITS: self.logits,
        }
        return bound | self.state_addresses()

    def state_addresses(self) -> dict[str, int]:
        """One buffer per layer, as past and as present."""
        bound = {}
        for layer, address in enumerate(self.layers):
            bound[io_names.past_state(layer)] = bound[io_names.present_state(layer)] = address
        return bound


class TensorRTRunner:
    """An engine folder on TensorRT. Not for several threads at once; several runners may be.

    Args:
        engine: an opened engine.
        device: index of the GPU.
        cuda_graph: record steps; without it every step is enqueued layer by layer.

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
        self.cuda = Cuda(device)
        self.max_batch = engine.profiles.max_batch
        self.max_length = engine.profiles.max_length
        """Tokens of each row that one call of the engine takes; longer prefills are cut."""
        self.max_positions = KERNEL_POSITIONS if self.spec.rotary_dim else MAX_POSITIONS
        self.uses_graphs = cuda_graph
        facts = self.cuda.facts()
        self.tensorrt = TensorRT(facts.compute_capability)
        check_made_for(engine, self.tensorrt, facts.name, facts.compute_capability)
        free = self.cuda.memory()[0]
        self._engines = {name: self._load_plan(name) for name in engine.plans}
        for place in (engine.prefill, engine.step):
            check_tensors(engine, place, self._engines[place.file])
        self._weight_bytes = free - self.cuda.memory()[0]
        first = self._engines[engine.prefill.file]
        self.integers: np.dtype[Any] = np.dtype(
            self.tensorrt.trt.nptype(first.get_tensor_dtype(io_names.INPUT_IDS))
        )
        self.stream = self.cuda.stream()
        size = max(activation_bytes(e) for e in self._engines.values())
        self._activations = self.cuda.buffer(size)
        self._prefill_context: Any = None
        self._step_contexts: dict[int, Any] = {}
        self._scratch: dict[str, Buffer] = {}
        self._staging: dict[str, Pinned] = {}
        self._kernels: Any = None

    # -- Runner ----------------------------------------------------------------------------------------

    def new_state(self, batch: int) -> TensorRTState:
        """A zeroed state for `batch` sequences."""
        check_batch(batch)
        if batch > self.max_batch:
            raise RunnerError(
                "the engine was not built for so many sequences at once",
                got=batch, expected=f"at most {self.max_batch}",
                hint=f"fewer at once (--batch {self.max_batch}), or build with --max-batch {batch}",
            )  # fmt: skip
        self.cuda.activate()
        state = TensorRTState(self, batch)
        state.zero()
        return state

    def reset_rows(self, state: TensorRTState, rows: Sequence[int]) -> None:
        """Zero these rows of the state in place."""
        check_owner(self, state, TensorRTState)
        state.zero(check_rows(rows, state.batch))

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
        self.cuda.activate()
        run = self._step_runner(state)
        state.put(ids, starts, lens)
        run()
        return self._read_logits(state.logits, state.batch, 1)

    def export_state(self, state: TensorRTState) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] array per layer."""
        check_owner(self, state, TensorRTState)
        layers = []
        for address in state.layers:
            array = np.empty((state.batch, *self.spec.state_shape), np.float32)
            self.stream.download(array.ctypes.data, address, array.nbytes)
            layers.append(array)
        self.stream.synchronize()
        return layers

    def import_state(self, layers: list[FloatArray]) -> TensorRTState:
        """A state that holds copies of `layers`."""
        arrays = check_layers(self.spec, layers)
        state = self.new_state(arrays[0].shape[0])
        for address, array in zip(state.layers, arrays, strict=True):
            self.stream.upload(address, array.ctypes.data, array.nbytes)
            self.stream.synchronize()
        return state

    # -- beside the protocol -----------------------------------------------------------------------------

    def start_decoding(self, state: TensorRTState, request: DecodeRequest) -> Any:
        """Choose tokens on the GPU from here on; see `decoding.Decoder`."""
        from dijiang_engines.kernels.attention import load_kernels
        from dijiang_engines.runners.tensorrt.decoder import TensorRTDecoder

        check_owner(self, state, TensorRTState)
        check_decoding(self, request, state.batch)
        if self._kernels is None:
            self._kernels = load_kernels(self.tensorrt.kernels_library)
        return TensorRTDecoder(self, state, request, self._kernels)

    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Make the contexts now rather than on first use."""
        self.cuda.activate()
        if prefill:
            self._context_for_prefill()
        if step:
            self._context_for_steps(1)

    def step_gpu_seconds(self, batch: int, position: int, calls: int) -> list[float]:
        """GPU time of `calls` steps, each measured by CUDA events around it."""
        state = self.new_state(batch)
        run = self._step_runner(state)
        ones = np.ones(batch, np.int64)
        before, after = self.cuda.event(timing=True), self.cuda.event(timing=True)
        seconds = []
        for index in range(calls + 3):
            state.put(np.full(batch, index % self.spec.vocab_size), ones * (position + index), ones)
            self.stream.synchronize()
            self.stream.record(before)
            run()
            self.stream.record(after)
            after.wait()
            seconds.append(after.seconds_since(before))
        return seconds[3:]

    def memory(self) -> dict[str, int]:
        """Device bytes: what loading the plans took, activations, and one sequence's state."""
        return {
            "plans": self._weight_bytes,
            "activations": self._activations.size,
            "state_per_sequence": self.spec.state_bytes,
        }

    def settings(self) -> dict[str, str | int | bool]:
        """How the runner was set up."""
        return {"cuda_graph": self.uses_graphs}

    def execute(self, context: Any) -> None:
        """Enqueue a context's work.

        Raises:
            RunnerError: TensorRT refused.
        """
        if not context.execute_async_v3(self.stream.handle):
            raise self.tensorrt.failure("TensorRT could not run the engine")

    def bound_step_context(self, state: TensorRTState) -> Any:
        """The context for this batch size, bound to this state, after a run that changed nothing."""
        context = self._context_for_steps(state.batch)
        self._bind(context, state.addresses())
        zeros = np.zeros(state.batch, np.int64)
        state.put(zeros, zeros, zeros)
        self.execute(context)
        self.stream.synchronize()
        return context

    # -- pieces ------------------------------------------------------------------------------------------

    def _load_plan(self, name: str) -> Any:
        with self.engine.opened.unchanged(*self.engine.plans) as root:
            self.engine.verified_plan(name)
            return self.tensorrt.load_plan(root / name)

    def _step_runner(self, state: TensorRTState) -> Any:
        """A function that enqueues one step of `state`."""
        if state.graph is None and self.uses_graphs:
            context = self.bound_step_context(state)
            self.stream.begin_capture()
            try:
                self.execute(context)
            except BaseException:
                self.stream.abandon_capture()
                raise
            state.graph = self.stream.end_capture(), context
        if state.graph is not None:
            graph = state.graph[0]
            return lambda: self.stream.launch(graph)
        context = self._context_for_steps(state.batch)
        self._bind(context, state.addresses())
        return lambda: self.execute(context)

    def _prefill_piece(
        self, ids: IntArray, positions: IntArray, seq_lens: IntArray, state: TensorRTState
    ) -> FloatArray:
        self.cuda.activate()
        batch, length = ids.shape
        context = self._context_for_prefill()
        state.put(ids[:, :1], positions, seq_lens)
        tokens = self._upload_ids(ids)
        rows = length if self.all_logits else 1
        logits = self._grow("logits", 4 * batch * rows * self.spec.vocab_size)
        self._set_shapes(context, batch, length)
        self._bind(
            context,
            {
                io_names.INPUT_IDS: tokens,
                io_names.POSITIONS: state.positions,
                io_names.SEQ_LENS: state.seq_lens,
                io_names.LOGITS: logits,
            }
            | state.state_addresses(),
        )
        self.execute(context)
        return self._read_logits(logits, batch, rows)

    def _upload_ids(self, ids: IntArray) -> int:
        size = ids.size * self.integers.itemsize
        staging = self._staging.get("ids")
        if staging is None or staging.size < size:
            staging = self._staging["ids"] = self.cuda.pinned((ids.size,), self.integers)
        staging.array[: ids.size] = ids.reshape(-1)
        address = self._grow("ids", size)
        self.stream.upload(address, staging.address, size)
        return address

    def _read_logits(self, address: int, batch: int, rows: int) -> FloatArray:
        """[batch, rows, V] on the host; waits for the stream."""
        shape = (batch, rows, self.spec.vocab_size)
        count = math.prod(shape)
        if rows > 1:  # too much to keep page-locked
            result = np.empty(shape, np.float32)
            self.stream.download(result.ctypes.data, address, result.nbytes)
            self.stream.synchronize()
            return result
        staging = self._staging.get("logits")
        if staging is None or staging.array.size < count:
            staging = self._staging["logits"] = self.cuda.pinned((count,), np.float32)
        self.stream.download(staging.address, address, 4 * count)
        self.stream.synchronize()
        found: npt.NDArray[np.float32] = staging.array[:count].reshape(shape).copy()
        return found

    def _grow(self, name: str, size: int) -> int:
        buffer = self._scratch.get(name)
        if buffer is None or buffer.size < size:
            self.stream.synchronize()  # what uses the old one
            self._scratch.pop(name, None)
            buffer = self._scratch[name] = self.cuda.buffer(size)
        return buffer.address

    def _context_for_prefill(self) -> Any:
        if self._prefill_context is None:
            self._prefill_context = self._make_context(self.engine.prefill)
        return self._prefill_context

    def _context_for_steps(self, batch: int) -> Any:
        context = self._step_contexts.pop(batch, None)
        if context is None:
            context = self._make_context(self.engine.step)
            self._set_shapes(context, batch, 1)
            while len(self._step_contexts) >= KEPT_CONTEXTS:
                self._step_contexts.pop(next(iter(self._step_contexts)))
        self._step_contexts[batch] = context  # the last one used stands last
        return context

    def _make_context(self, place: PlanPlace) -> Any:
        context = context_without_memory(self.tensorrt.trt, self._engines[place.file])
        if context is None:
            raise self.tensorrt.failure("TensorRT could not make an execution context")
        give_memory(context, self._activations.address, self._activations.size)
        if not context.set_optimization_profile_async(place.profile, self.stream.handle):
            raise self.tensorrt.failure("TensorRT could not choose the optimization profile")
        self.stream.synchronize()
        return context

    def _set_shapes(self, context: Any, batch: int, length: int) -> None:
        state = (batch, *self.spec.state_shape)
        shapes = {
            io_names.INPUT_IDS: (batch, length),
            io_names.POSITIONS: (batch,),
            io_names.SEQ_LENS: (batch,),
        } | {io_names.past_state(layer): state for layer in range(self.spec.num_layers)}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise RunnerError(
                    "the engine was not built for this size",
                    got=f"{name} {list(shape)}",
                    expected=f"at most {self.max_batch} sequences of {self.max_length} tokens a call",
                    hint="build the engine with a larger --max-batch or --max-length",
                )

    def _bind(self, context: Any, addresses: dict[str, int]) -> None:
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self.tensorrt.failure(f"TensorRT did not take the address of {name}")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
