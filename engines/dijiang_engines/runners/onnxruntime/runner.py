"""ONNX Runtime behind the Runner protocol, on the CPU, on CUDA and on TensorRT for RTX.

Two sessions, each loaded when it is first needed. The state is double-buffered: every call reads one set
of tensors and writes the other, and then the two change roles. Binding one buffer as both past and present
would be safe only if every reader of the past came before the writer by data dependency, which a graph
optimiser may change; a second set of buffers is cheap. What a step needs is bound once per state, so that
a token costs one call and no allocation; on CUDA the state never leaves the device.

Memory (docs/decisions/0008-onnxruntime-sessions.md): prepacking gives each session a private copy of the
weights, and without it both map the same file pages. A prefill gains some tens of milliseconds from it and
pays for them when it is loaded; steps gain more, above all with several sequences at once. So by default
only `step` prepacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.machine import Spinning
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.checks import (
    check_batch,
    check_call,
    check_copy,
    check_layers,
    check_owner,
    check_row_layers,
    check_rows,
)
from dijiang_engines.runners.onnxruntime.config import (
    Lowering,
    Optimization,
    OrtOptions,
    Prepack,
    resolve,
)
from dijiang_engines.runners.onnxruntime.cuda import GPU_LOCK, choose_graphs, one_at_a_time
from dijiang_engines.runners.onnxruntime.providers import CPU
from dijiang_engines.runners.onnxruntime.sessions import (
    Sessions,
    Tensors,
    bind,
    check_provider,
    onnxruntime_module,
)
from dijiang_engines.runners.onnxruntime.state import OrtState, Slots

SHRINK_ARENA = ("memory.enable_memory_arena_shrinkage", "cpu:0")
"""The option of a run that gives its activations back instead of keeping the largest ever seen."""


class OrtRunner:
    """A bundle on ONNX Runtime.

    Args:
        bundle: an opened bundle.
        name: "onnxruntime-cpu", "onnxruntime-cuda" or "onnxruntime-rtx".
        threads: of one operator; None leaves it to ONNX Runtime, within the container's CPU quota.
        spinning: whether they wait busily for work: "on", "off", or "auto", ONNX Runtime's own way, which is
            on; None: what DIJIANG_SPINNING says, else "auto". Off is for cores that others use too.
        prepack: which sessions make a private, faster copy of the weights: "auto" is "step", or "all" of
            quantised weights, if that fits into the memory that is free now, else "none". "wide" is "all",
            and a prefill's quantised weights become float32 (`widened`): eight bytes a weight more.
        optimization: of the graph.
        device: index of the GPU.
        lowering: which of the bundle's graphs run, of those in LOWERINGS. "auto" is "standard" on the CPU;
            on CUDA a step that can be a CUDA graph, if the bundle has one (`to-onnx --variant`).
        cuda_graph: run steps as CUDA graphs, where step and machine allow it. None does so too, but does not
            log why it cannot. `cuda_graphs.enabled` and `.note` tell.

    Attributes:
        config: the options in force.
        cuda_graphs: whether steps are CUDA graphs.
        sessions: what is loaded.
        alone: held by every call that touches the GPU.

    Raises:
        UsageError: an unknown value of an option.
        RunnerError: ONNX Runtime is absent, lacks the provider, or refuses the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str = CPU,
        *,
        threads: int | None = None,
        spinning: Spinning | None = None,
        prepack: Prepack = "auto",
        optimization: Optimization = "all",
        device: int = 0,
        lowering: Lowering = "auto",
        cuda_graph: bool | None = None,
    ) -> None:
        options = OrtOptions(threads, spinning, prepack, optimization, device, lowering, cuda_graph)
        self.name = name
        self.bundle = bundle
        self.spec = bundle.spec
        self.all_logits = bundle.all_logits
        self._ort = onnxruntime_module()
        check_provider(self._ort, name)
        self.config = resolve(options, bundle, name, self._ort.__version__)
        on_cpu = self.config.on_cpu
        self.alone: AbstractContextManager[Any] = nullcontext() if on_cpu else GPU_LOCK
        self.cuda_graphs = choose_graphs(self.config.graph("step"), on_cpu=on_cpu, wanted=cuda_graph)
        self.sessions = Sessions(bundle, self.config, self.cuda_graphs)
        self.tensors = Tensors(self.spec, self.config.tensors_on, self.config.device)
        self.slots = Slots(self.sessions, self.tensors)

    # -- Runner ----------------------------------------------------------------------------------------

    @one_at_a_time
    def new_state(self, batch: int) -> OrtState:
        """A zeroed state for `batch` sequences."""
        check_batch(self, batch)
        return OrtState(self, self.slots, int(batch))

    @one_at_a_time
    def prefill(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OrtState
    ) -> FloatArray:
        """Consume up to L tokens a row; see `Runner.prefill`."""
        check_owner(self, state, OrtState)
        arrays = check_call(self, input_ids, positions, seq_lens, state.batch)
        session = self.sessions.get("prefill")
        length = arrays[0].shape[1]
        inputs = self.tensors.int_inputs(state.batch, length)
        for target, array in zip(inputs, arrays, strict=True):
            target.fill(array)
        rows = length if self.all_logits else 1
        logits = np.zeros((state.batch, rows, self.spec.vocab_size), np.float32)
        output = self._ort.OrtValue.ortvalue_from_numpy(logits)  # on the host, wherever the graph runs
        binding = bind(session, [given.value for given in inputs], output, state.past, state.present)
        options = self.sessions.run_options(*SHRINK_ARENA) if self.config.on_cpu else self._ort.RunOptions()
        self.sessions.run(session, binding, options)
        state.swap()
        return logits

    @one_at_a_time
    def step(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OrtState
    ) -> FloatArray:
        """Consume at most one token a row; see `Runner.step`."""
        check_owner(self, state, OrtState)
        arrays = check_call(self, input_ids, positions, seq_lens, state.batch, step=True)
        step = state.ready_step()
        step.fill(arrays)
        logits = step.run(state.front)
        state.swap()
        return logits

    @one_at_a_time
    def export_state(self, state: OrtState) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] array per layer."""
        check_owner(self, state, OrtState)
        return [np.array(value.numpy(), np.float32) for value in state.past]

    @one_at_a_time
    def import_state(self, layers: list[FloatArray]) -> OrtState:
        """A state that holds copies of `layers`."""
        arrays = check_layers(self.spec, layers)
        state = self.new_state(arrays[0].shape[0])
        for value, array in zip(state.past, arrays, strict=True):
            value.update_inplace(array)
        return state

    @one_at_a_time
    def reset_rows(self, state: OrtState, rows: Sequence[int]) -> None:
        """Zero these rows of the state in place; see `Runner.reset_rows`."""
        check_owner(self, state, OrtState)
        self.tensors.zero_rows(state.past, check_rows(rows, state.batch))

    @one_at_a_time
    def get_rows(self, state: OrtState, rows: Sequence[int]) -> list[FloatArray]:
        """Copies of these rows on the host; see `Runner.get_rows`."""
        check_owner(self, state, OrtState)
        return self.tensors.get_rows(state.past, check_rows(rows, state.batch))

    @one_at_a_time
    def put_rows(self, state: OrtState, rows: Sequence[int], layers: list[FloatArray]) -> None:
        """Copy `layers` into these rows; see `Runner.put_rows`."""
        check_owner(self, state, OrtState)
        found, arrays = check_row_layers(self.spec, rows, state.batch, layers)
        self.tensors.put_rows(state.past, found, arrays)

    @one_at_a_time
    def copy_rows(
        self, source: OrtState, rows: Sequence[int], target: OrtState, places: Sequence[int]
    ) -> None:
        """Copy rows into rows of another state; see `Runner.copy_rows`."""
        pairs = check_copy(self, OrtState, source, rows, target, places)
        if pairs:
            found, ends = zip(*pairs, strict=True)
            self.tensors.put_rows(target.past, ends, self.tensors.get_rows(source.past, found))

    # -- beside the protocol -----------------------------------------------------------------------------

    @one_at_a_time
    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Load the sessions now rather than on first use."""
        if prefill:
            self.sessions.get("prefill")
        if step:
            self.sessions.get("step")

    def settings(self) -> dict[str, str | int | bool]:
        """How the runner was set up; 0 threads: ONNX Runtime chooses."""
        config = self.config
        return {
            "threads": config.threads, "spinning": config.spinning, "prepack": config.prepack,
            "optimization": config.optimization, "lowering": config.lowering,
            "cuda_graph": self.cuda_graphs.enabled,
        }  # fmt: skip
