"""A state on the GPU, and TensorRT's execution contexts: shapes, addresses, running, recording.

All contexts share one block of activation memory, for everything runs on one stream. TensorRT wants an
ordinary run before work is recorded as a CUDA graph; that run has seq_lens 0 in all rows, which by the op
contract leaves the states untouched, so nothing has to be saved. A graph stays right only while its
context's shapes stay, hence one context for each batch size of steps, and for each recorded prefill
(prefills.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dijiang_engines import io_names
from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.engine import EngineFolder, PlanPlace
from dijiang_engines.nvidia.cuda import Cuda, Graph, Stream
from dijiang_engines.nvidia.tensorrt_library import TensorRT
from dijiang_engines.nvidia.tensorrt_versions import activation_bytes, context_without_memory, give_memory
from dijiang_engines.runners.base import IntArray
from dijiang_engines.runners.tensorrt.rtx import RtxContexts
from dijiang_engines.spec import ModelSpec

KEPT_CONTEXTS = 4
"""Contexts for steps that are kept, one for each batch size that was used last."""
ALIGNMENT = 256


@dataclass(frozen=True)
class Gpu:
    """Where an engine runs."""

    cuda: Cuda
    stream: Stream
    integers: np.dtype[Any]
    """`integers_of` the plans."""


def integers_of(tensorrt: TensorRT, plan: Any) -> np.dtype[Any]:
    """A plan's I, the type of its token ids, positions and seq_lens: int32 or int64."""
    kind: np.dtype[Any] = np.dtype(tensorrt.trt.nptype(plan.get_tensor_dtype(io_names.INPUT_IDS)))
    return kind


class TensorRTState:
    """The state of `batch` sequences on the GPU, and what a step of it reads and writes.

    Args:
        owner: the runner that made it.
        gpu: where it lies.
        spec: the model.
        batch: rows, B.

    Attributes:
        layers: device addresses of each layer's [B, H, d, d] float32.
        ids, positions, seq_lens: device addresses of I [B, 1], [B], [B].
        logits: device address of float32 [B, 1, V].
    """

    def __init__(self, owner: object, gpu: Gpu, spec: ModelSpec, batch: int) -> None:
        self.owner, self.batch = owner, batch
        self._stream, cuda = gpu.stream, gpu.cuda
        self.row_bytes = 4 * math.prod(spec.state_shape)
        self.layer_bytes = _aligned(batch * self.row_bytes)
        self.memory = cuda.buffer(spec.num_layers * self.layer_bytes)
        self.layers = [self.memory.address + i * self.layer_bytes for i in range(spec.num_layers)]
        item = gpu.integers.itemsize
        self.pitch = _aligned(batch * item)
        self._integers = cuda.buffer(3 * self.pitch)
        self.ids, self.positions, self.seq_lens = (self._integers.address + i * self.pitch for i in range(3))
        self._host = cuda.pinned((3, self.pitch // item), gpu.integers)
        self._logits = cuda.buffer(4 * batch * spec.vocab_size)
        self.logits = self._logits.address
        self.graph: tuple[Graph, Any] | None = None
        """A recorded step, and its context, which must live as long."""

    def zero(self, rows: Sequence[int] | None = None) -> None:
        """Zero all rows or some, in stream order."""
        if rows is None:
            self._stream.fill(self.memory.address, 0, self.memory.size)
            return
        for row in rows:
            self._stream.fill_rows(
                self.memory.address + row * self.row_bytes,
                self.layer_bytes, 0, self.row_bytes, len(self.layers),
            )  # fmt: skip

    def row(self, layer: int, row: int) -> int:
        """The device address of a row's [H, d, d] float32 in one layer."""
        return self.layers[layer] + row * self.row_bytes

    def put(self, ids: IntArray, positions: IntArray, seq_lens: IntArray) -> None:
        """Upload a step's integers; returns when the host array may change again."""
        for place, values in zip(self._host.array, (ids.reshape(-1), positions, seq_lens), strict=True):
            place[: self.batch] = values
        self._stream.upload(self._integers.address, self._host.address, self._host.size)

    def addresses(self, present: int | None = None) -> dict[str, int]:
        """What a step binds; `present` as for `state_addresses`."""
        bound = {
            io_names.INPUT_IDS: self.ids,
            io_names.POSITIONS: self.positions,
            io_names.SEQ_LENS: self.seq_lens,
            io_names.LOGITS: self.logits,
        }
        return bound | self.state_addresses(present)

    def state_addresses(self, present: int | None = None) -> dict[str, int]:
        """One buffer per layer, as past and as present.

        Args:
            present: device address of other memory, of the state's size and layout, for the present; None: in
                place.
        """
        bound = {}
        away = 0 if present is None else present - self.memory.address
        for layer, address in enumerate(self.layers):
            bound[io_names.past_state(layer)] = address
            bound[io_names.present_state(layer)] = address + away
        return bound


class Contexts:
    """The execution contexts of an engine's plans.

    Args:
        engine: the folder: model, sizes, and which plan and profile is for what.
        plans: file -> TensorRT's ICudaEngine.
        tensorrt: the loaded library.
        gpu: where they run.
        rtx: makes the contexts of TensorRT for RTX; None: TensorRT.
    """

    def __init__(
        self,
        engine: EngineFolder,
        plans: Mapping[str, Any],
        tensorrt: TensorRT,
        gpu: Gpu,
        rtx: RtxContexts | None = None,
    ) -> None:
        self.engine, self.gpu = engine, gpu
        self._plans, self._tensorrt, self._rtx = plans, tensorrt, rtx
        self._present = None if engine.made_for.graphs == "plugin" else gpu.cuda.buffer(_states_bytes(engine))
        """Where standard graphs write states: a runtime may write a state before it has read all of it, and
        may compute a part of it twice. The plugin's kernels are safe in place."""
        self._activations = gpu.cuda.buffer(max(activation_bytes(plan) for plan in plans.values()))
        self._prefill: Any = None
        self._steps: dict[int, Any] = {}

    @property
    def activation_bytes(self) -> int:
        """Of the memory that all contexts share."""
        return self._activations.size

    @property
    def step_batches(self) -> tuple[int, ...]:
        """Batch sizes that have a context for steps, the one used last standing last."""
        return tuple(self._steps)

    @property
    def scratch_bytes(self) -> int:
        """Of the memory that states are written to before they replace the old ones; 0: none."""
        return 0 if self._present is None else self._present.size

    def addresses(self, state: TensorRTState) -> dict[str, int]:
        """What a step of `state` binds."""
        return state.addresses(None if self._present is None else self._present.address)

    def execute(self, context: Any, state: TensorRTState) -> None:
        """Enqueue the work of a context that is bound to `state`, whose buffers then hold the new state.

        Raises:
            RunnerError: TensorRT refused.
        """
        if not context.execute_async_v3(self.gpu.stream.handle):
            raise self._tensorrt.failure("TensorRT could not run the engine")
        if self._present is not None:
            self.gpu.stream.copy(state.memory.address, self._present.address, state.memory.size)

    def can_record(self, context: Any) -> bool:
        """Whether a context's work can become a CUDA graph; TensorRT for RTX says so of each."""
        asked = getattr(context, "is_stream_capturable", None)
        return asked is None or bool(asked(self.gpu.stream.handle))

    def for_prefill(self) -> Any:
        """The context of prefills; its shapes and addresses are those of the last one."""
        if self._prefill is None:
            self._prefill = self.new_prefill()
        return self._prefill

    def new_prefill(self) -> Any:
        """Another context for prefills, which the caller gives shapes and addresses."""
        return self._make(self.engine.prefill, steps=False)

    def for_steps(self, batch: int) -> Any:
        """The context of steps of `batch` rows; its addresses are those of the last state it ran."""
        context = self._steps.pop(batch, None)
        if context is None:
            context = self._make(self.engine.step, steps=True)
            self.set_shapes(context, batch, 1)
            while len(self._steps) >= KEPT_CONTEXTS:
                self._steps.pop(next(iter(self._steps)))
        self._steps[batch] = context  # the last one used stands last
        return context

    def set_shapes(self, context: Any, batch: int, length: int) -> None:
        """Choose sizes for the next runs: `batch` rows of `length` tokens.

        Raises:
            RunnerError: the plan does not take them.
        """
        spec, profiles = self.engine.spec, self.engine.profiles
        state = (batch, *spec.state_shape)
        shapes = {
            io_names.INPUT_IDS: (batch, length),
            io_names.POSITIONS: (batch,),
            io_names.SEQ_LENS: (batch,),
        } | {io_names.past_state(layer): state for layer in range(spec.num_layers)}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise RunnerError(
                    "the engine was not built for this size",
                    got=f"{name} {list(shape)}",
                    expected=f"at most {profiles.max_batch} sequences of {profiles.max_length} tokens a call",
                    hint="build the engine with a larger --max-batch or --max-length",
                )

    def bind(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Name device addresses of inputs and outputs for the next runs.

        Raises:
            RunnerError: TensorRT refused.
        """
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._tensorrt.failure(f"TensorRT did not take the address of {name}")

    def bound_step(self, state: TensorRTState) -> Any:
        """The context for this batch size, bound to this state, after a run that changed nothing."""
        context = self.for_steps(state.batch)
        self.bind(context, self.addresses(state))
        self.run_empty(context, state)
        return context

    def run_empty(self, context: Any, state: TensorRTState) -> None:
        """A run of a context that is bound to `state`, which changes no state; waits for it."""
        zeros = np.zeros(state.batch, np.int64)
        state.put(zeros, zeros, zeros)
        self.execute(context, state)
        self.gpu.stream.synchronize()

    def record(self, context: Any, state: TensorRTState) -> Graph:
        """What `execute` does as a CUDA graph; the context has run with these shapes, and must live as long.

        Raises:
            RunnerError: it cannot be recorded.
        """
        stream = self.gpu.stream
        stream.begin_capture()
        try:
            self.execute(context, state)
        except BaseException:
            stream.abandon_capture()
            raise
        return stream.end_capture()

    def record_step(self, state: TensorRTState) -> tuple[Graph, Any] | None:
        """A step of this state as a CUDA graph, and its context, which must live as long; None if the runtime
        cannot have it recorded."""
        context = self.bound_step(state)
        return (self.record(context, state), context) if self.can_record(context) else None

    def step_of(self, state: TensorRTState, *, recorded: bool) -> Callable[[], None]:
        """A function that enqueues one step of `state`.

        Args:
            state: whose step.
            recorded: as a CUDA graph, which is made if there is none yet, and if it can be.
        """
        if state.graph is None and recorded:
            state.graph = self.record_step(state)
        if state.graph is not None:
            graph, stream = state.graph[0], self.gpu.stream
            return lambda: stream.launch(graph)
        context = self.for_steps(state.batch)
        self.bind(context, self.addresses(state))
        return lambda: self.execute(context, state)

    def _make(self, place: PlanPlace, *, steps: bool) -> Any:
        plan = self._plans[place.file]
        if self._rtx is None:
            context = context_without_memory(self._tensorrt.trt, plan)
        else:
            context = self._rtx.make(plan, steps=steps)
        if context is None:
            raise self._tensorrt.failure("TensorRT could not make an execution context")
        give_memory(context, self._activations.address, self._activations.size)
        if not context.set_optimization_profile_async(place.profile, self.gpu.stream.handle):
            raise self._tensorrt.failure("TensorRT could not choose the optimization profile")
        self.gpu.stream.synchronize()
        return context


def _states_bytes(engine: EngineFolder) -> int:
    """Of the largest state that the engine takes, as `TensorRTState` lays it out."""
    spec, batch = engine.spec, engine.profiles.max_batch
    return spec.num_layers * _aligned(4 * batch * math.prod(spec.state_shape))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
