"""ONNX Runtime behind the Runner protocol, on the CPU and on CUDA.

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

import importlib
import io
import math
import os
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dijiang_engines import io_names
from dijiang_engines.bundle import Bundle
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.checks import check_call

Prepack = Literal["auto", "none", "step", "all"]
Optimization = Literal["all", "extended", "basic", "none"]

CPU, CUDA = "onnxruntime-cpu", "onnxruntime-cuda"
_PROVIDERS = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
_LEVELS = {"all": "ALL", "extended": "EXTENDED", "basic": "BASIC", "none": "DISABLE_ALL"}


def onnxruntime_module() -> Any:
    """The onnxruntime package.

    Raises:
        RunnerError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        raise RunnerError(
            "the Python package onnxruntime is not installed" if missing else "onnxruntime does not load",
            got=None if missing else str(error),
            hint="pip install 'dijiang-export[cpu]', or [gpu] for CUDA; never both",
        ) from error


def _find_cuda_libraries(ort: Any) -> None:
    """Load the CUDA and cuDNN libraries that pip installed, which no library path names; keep quiet.

    What is missing all the same is reported when a session cannot be made. ONNX Runtime from 1.30 on
    warns at each CUDA session that no plugin provides CUDA, which it has built in.
    """
    ort.set_default_logger_severity(3)
    preload = getattr(ort, "preload_dlls", None)  # since 1.21
    if preload is not None:
        with suppress(Exception), redirect_stdout(io.StringIO()):
            preload()


class OrtState:
    """The state of `batch` sequences: two sets of device tensors and the bindings that swap them."""

    def __init__(self, owner: OrtRunner, batch: int) -> None:
        self.owner = owner
        self.batch = batch
        self.front = 0
        """Which set holds the current state."""
        self.sets = [[owner._zeros(batch) for _ in range(owner.spec.num_layers)] for _ in range(2)]
        self.step: _Step | None = None


class _Step:
    """A step's inputs, logits and its two bindings (reading set 0, reading set 1)."""

    def __init__(self, runner: OrtRunner, state: OrtState) -> None:
        batch = state.batch
        self.inputs = [runner._int_input(shape) for shape in ((batch, 1), (batch,), (batch,))]
        self.logits = np.zeros((batch, 1, runner.spec.vocab_size), np.float32)
        logits = runner._ort.OrtValue.ortvalue_from_numpy(self.logits)
        session = runner._session("step")
        self.bindings = [
            runner._bind(session, [i.value for i in self.inputs], logits, state, front) for front in range(2)
        ]


class _IntInput:
    """An integer input that is refilled for each call."""

    def __init__(self, ort: Any, shape: tuple[int, ...], device: str, index: int) -> None:
        self._array = np.zeros(shape, np.int64)
        self._on_host = device == "cpu"
        # On the CPU the OrtValue is the array itself; it keeps a reference to it.
        self.value = ort.OrtValue.ortvalue_from_numpy(self._array, device, index)

    def fill(self, values: IntArray) -> None:
        if self._on_host:
            self._array[...] = values
        else:
            self.value.update_inplace(np.ascontiguousarray(values))


class OrtRunner:
    """A bundle on ONNX Runtime.

    Args:
        bundle: an opened bundle.
        name: "onnxruntime-cpu" or "onnxruntime-cuda".
        threads: of one operator; None leaves it to ONNX Runtime, within the container's CPU quota.
        prepack: which sessions make a private, faster copy of the weights: "auto" is "step" if that
            fits into the memory that is free now, else "none".
        optimization: of the graph.
        device: index of the CUDA device.

    Raises:
        RunnerError: ONNX Runtime is absent, lacks the provider, or refuses the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str = CPU,
        *,
        threads: int | None = None,
        prepack: Prepack = "auto",
        optimization: Optimization = "all",
        device: int = 0,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError("the number of threads must be at least 1", got=threads)
        if optimization not in _LEVELS or prepack not in ("auto", "none", "step", "all"):
            raise UsageError("unknown value of an ONNX Runtime option", got=f"{optimization}, {prepack}")
        self.name = name
        self.bundle = bundle
        self.spec = bundle.spec
        self.all_logits = bundle.all_logits
        self._ort = onnxruntime_module()
        self._on_cpu = name == CPU
        self._device, self._index = ("cpu", 0) if self._on_cpu else ("cuda", device)
        self._threads = container_threads() if threads is None else threads
        self._optimization = optimization
        self._check_provider()
        if self._on_cpu and bundle.dtype == "bfloat16":
            raise RunnerError(
                "ONNX Runtime has no bfloat16 matrix product on the CPU",
                got="a bfloat16 bundle",
                hint="export the checkpoint with `--dtype float32`, or use --runner onnxruntime-cuda",
            )
        if prepack == "auto":
            prepack = "step" if bundle.files["weights.data"].bytes < 0.6 * available_memory() else "none"
        self.prepack: Prepack = prepack
        self._sessions: dict[str, Any] = {}

    # -- Runner ----------------------------------------------------------------------------------------

    def new_state(self, batch: int) -> OrtState:
        """A zeroed state for `batch` sequences."""
        if batch < 1:
            raise UsageError("a state needs at least one sequence", got=batch)
        return OrtState(self, batch)

    def prefill(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OrtState
    ) -> FloatArray:
        """Consume up to L tokens a row; see `Runner.prefill`."""
        ids, positions, seq_lens = check_call(self, input_ids, positions, seq_lens, state.batch)
        self._check_owner(state)
        rows = ids.shape[1] if self.all_logits else 1
        logits = np.zeros((state.batch, rows, self.spec.vocab_size), np.float32)
        inputs = []
        for array in (ids, positions, seq_lens):
            value = self._int_input(array.shape)
            value.fill(array)
            inputs.append(value.value)
        session = self._session("prefill")
        output = self._ort.OrtValue.ortvalue_from_numpy(logits)
        options = self._ort.RunOptions()
        if self._on_cpu:  # give the piece's activations back instead of keeping the largest ever seen
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._call(session, self._bind(session, inputs, output, state, state.front), options)
        state.front = 1 - state.front
        return logits

    def step(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OrtState
    ) -> FloatArray:
        """Consume at most one token a row; see `Runner.step`."""
        arrays = check_call(self, input_ids, positions, seq_lens, state.batch)
        if arrays[0].shape[1] != 1:
            raise UsageError("a step takes one token a row", got=f"input_ids {list(arrays[0].shape)}")
        self._check_owner(state)
        if state.step is None:
            state.step = _Step(self, state)
        for target, array in zip(state.step.inputs, arrays, strict=True):
            target.fill(array)
        self._call(self._session("step"), state.step.bindings[state.front], None)
        state.front = 1 - state.front
        return np.array(state.step.logits)  # the next step writes into the same place

    def export_state(self, state: OrtState) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] array per layer."""
        self._check_owner(state)
        return [np.array(value.numpy(), np.float32) for value in state.sets[state.front]]

    def import_state(self, layers: list[FloatArray]) -> OrtState:
        """A state that holds copies of `layers`."""
        shapes = {layer.shape[1:] for layer in layers}
        batches = {layer.shape[0] for layer in layers}
        if len(layers) != self.spec.num_layers or shapes != {self.spec.state_shape} or len(batches) != 1:
            raise RunnerError(
                "the state to import has another shape than the model's",
                got=f"{len(layers)} layers of {sorted(layer.shape for layer in layers)[:2]}",
                expected=f"{self.spec.num_layers} layers of {['B', *self.spec.state_shape]}",
            )
        state = self.new_state(batches.pop())
        state.sets[0] = [self._from_numpy(np.array(layer, np.float32, order="C")) for layer in layers]
        return state

    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Load the sessions now rather than on first use."""
        for name, wanted in (("prefill", prefill), ("step", step)):
            if wanted:
                self._session(name)

    # -- ONNX Runtime ----------------------------------------------------------------------------------

    def _check_provider(self) -> None:
        provider = _PROVIDERS[self.name]
        offered = self._ort.get_available_providers()
        if provider not in offered:
            raise RunnerError(
                f"the installed ONNX Runtime {self._ort.__version__} has no {provider}",
                got=", ".join(offered),
                hint="replace it: pip uninstall onnxruntime && pip install 'dijiang-export[gpu]'",
            )
        if not self._on_cpu:
            _find_cuda_libraries(self._ort)

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            self._sessions[name] = self._load(self.bundle.graph_path(name), name)
        return self._sessions[name]

    def _load(self, path: Path, name: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors only: what matters is raised, and stderr is the user's
        options.intra_op_num_threads = self._threads
        level = f"ORT_{'ENABLE_' if self._optimization != 'none' else ''}{_LEVELS[self._optimization]}"
        options.graph_optimization_level = getattr(self._ort.GraphOptimizationLevel, level)
        if self.prepack != "all" and self.prepack != name:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if name == "prefill":
            options.enable_mem_pattern = False  # lengths vary: each pattern would keep its own block
        provider: Any = _PROVIDERS[self.name]
        if not self._on_cpu:
            provider = (
                provider,
                {
                    "device_id": str(self._index),
                    "arena_extend_strategy": "kSameAsRequested",
                    # On by default, and then a float32 graph is not float32 any more.
                    "use_tf32": "0" if self.bundle.dtype == "float32" else "1",
                },
            )
        try:
            session = self._ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:
            raise self._failed(f"ONNX Runtime cannot load {path}", error) from error
        if session.get_providers()[0] != _PROVIDERS[self.name]:
            raise RunnerError(  # it only warns, and goes on on the CPU
                "ONNX Runtime cannot use CUDA here",
                got=", ".join(session.get_providers()),
                hint="`dijiang-export doctor` shows which libraries are missing",
            )
        return session

    def _bind(self, session: Any, inputs: list[Any], logits: Any, state: OrtState, front: int) -> Any:
        binding = session.io_binding()
        for name, value in zip(
            (io_names.INPUT_IDS, io_names.POSITIONS, io_names.SEQ_LENS), inputs, strict=True
        ):
            binding.bind_ortvalue_input(name, value)
        for layer in range(self.spec.num_layers):
            binding.bind_ortvalue_input(io_names.past_state(layer), state.sets[front][layer])
            binding.bind_ortvalue_output(io_names.present_state(layer), state.sets[1 - front][layer])
        binding.bind_ortvalue_output(io_names.LOGITS, logits)
        return binding

    def _call(self, session: Any, binding: Any, options: Any) -> None:
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            raise self._failed("ONNX Runtime failed while running the graph", error) from error

    def _failed(self, what: str, error: Exception) -> RunnerError:
        text = " ".join(str(error).split())
        hint = None
        if "alloc" in text.lower() or "memory" in text.lower():
            hint = (
                "not enough memory: try --prepack none, a smaller --prefill-tokens, or fewer prompts at once"
            )
        return RunnerError(what, got=text[:300], hint=hint)

    def _check_owner(self, state: OrtState) -> None:
        if state.owner is not self:
            raise RunnerError(
                "a state belongs to the runner that made it",
                hint="carry it over with export_state and import_state",
            )

    # -- tensors on the device -------------------------------------------------------------------------

    def _zeros(self, batch: int) -> Any:
        return self._from_numpy(np.zeros((batch, *self.spec.state_shape), np.float32))

    def _from_numpy(self, array: npt.NDArray[np.float32]) -> Any:
        """The array itself on the CPU (kept alive by the OrtValue), a copy on CUDA."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, self._index)

    def _int_input(self, shape: tuple[int, ...]) -> _IntInput:
        return _IntInput(self._ort, shape, self._device, self._index)


def container_threads() -> int:
    """Threads that the container's CPU quota allows, or 0 (ONNX Runtime chooses) if there is no quota.

    ONNX Runtime counts cores and does not see quotas; more spinning threads than a quota allows make
    every step wait for the scheduler.
    """
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed) if allowed < cores else 0


def available_memory() -> float:
    """Bytes that can be had without swapping, within the container's limit; infinity if unknown."""
    amounts = [math.inf]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        amounts.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(amounts)
