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
import logging
import threading
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dijiang_engines import io_names
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_engines.runners.checks import check_batch, check_call, check_layers, check_owner, check_rows
from dijiang_engines.runners.onnxruntime.cuda import (
    CAPTURABLE,
    GPU_LOCK,
    CudaGraphs,
    find_cuda_libraries,
    one_at_a_time,
    zero_device_memory,
)
from dijiang_engines.runners.onnxruntime.state import IntInput, OrtState, Slots, Step
from dijiang_engines.runners.ort_host import (
    Spinning,
    available_memory,
    container_threads,
    spinning_choice,
)

__all__ = ["CPU", "CUDA", "LOWERINGS", "OrtRunner", "OrtState", "available_memory", "container_threads"]

Prepack = Literal["auto", "none", "step", "all"]
Optimization = Literal["all", "extended", "basic", "none"]
Lowering = Literal["auto", "standard", "ort", "ort-step", "capture"]

CPU, CUDA = "onnxruntime-cpu", "onnxruntime-cuda"
_PROVIDERS = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
LOWERINGS = {
    "standard": ("prefill", "step"),
    "ort": ("prefill_ort", "step_ort"),
    "ort-step": ("prefill", "step_ort"),
    "capture": ("prefill", "step_capture"),
}
"""The prefill and the step graph that each lowering takes."""
_CUDA_ORDER = ("ort-step", "capture", "standard")
"""What "auto" takes on CUDA: the first that the bundle and ONNX Runtime have."""
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


class OrtRunner:
    """A bundle on ONNX Runtime.

    Args:
        bundle: an opened bundle.
        name: "onnxruntime-cpu" or "onnxruntime-cuda".
        threads: of one operator; None leaves it to ONNX Runtime, within the container's CPU quota.
        spinning: whether they wait busily for work: "on", "off", or "auto", ONNX Runtime's own way, which is
            on; None: what DIJIANG_SPINNING says, else "auto". Off is for cores that others use too.
        prepack: which sessions make a private, faster copy of the weights: "auto" is "step" if that
            fits into the memory that is free now, else "none".
        optimization: of the graph.
        device: index of the CUDA device.
        lowering: which of the bundle's graphs run, of those in LOWERINGS. "auto" is "standard" on the CPU;
            on CUDA a step that can be a CUDA graph, if the bundle has one (`to-onnx --variant`).
        cuda_graph: run steps as CUDA graphs, where step and machine allow it. None does so too, but does not
            log why it cannot. `cuda_graphs.enabled` and `.note` tell.

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
        if threads is not None and (isinstance(threads, bool) or threads < 1):
            raise UsageError("the number of threads must be at least 1", got=threads)
        self.spinning = spinning_choice(spinning)
        if (
            optimization not in _LEVELS
            or prepack not in ("auto", "none", "step", "all")
            or lowering not in ("auto", *LOWERINGS)
        ):
            raise UsageError(
                "unknown value of an ONNX Runtime option", got=f"{optimization}, {prepack}, {lowering}"
            )
        self.name = name
        self.bundle = bundle
        self.spec = bundle.spec
        self.all_logits = bundle.all_logits
        self._ort = onnxruntime_module()
        self._on_cpu = name == CPU
        self.alone = nullcontext() if self._on_cpu else GPU_LOCK
        """Held by every call that touches the GPU."""
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
        self._loading = threading.RLock()  # or two threads would load the same session twice
        self.lowering = self._choose_lowering(lowering)
        self._graphs = dict(zip(("prefill", "step"), LOWERINGS[self.lowering], strict=True))
        self.cuda_graphs = self._choose_graphs(cuda_graph)
        self._slots = Slots(self)

    # -- Runner ----------------------------------------------------------------------------------------

    @one_at_a_time
    def new_state(self, batch: int) -> OrtState:
        """A zeroed state for `batch` sequences."""
        check_batch(batch)
        return OrtState(self, int(batch))

    @one_at_a_time
    def prefill(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OrtState
    ) -> FloatArray:
        """Consume up to L tokens a row; see `Runner.prefill`."""
        check_owner(self, state, OrtState)
        ids, positions, seq_lens = check_call(self, input_ids, positions, seq_lens, state.batch)
        session = self._session("prefill")
        rows = ids.shape[1] if self.all_logits else 1
        logits = np.zeros((state.batch, rows, self.spec.vocab_size), np.float32)
        inputs = []
        for array in (ids, positions, seq_lens):
            value = self._int_input(array.shape)
            value.fill(array)
            inputs.append(value.value)
        output = self._ort.OrtValue.ortvalue_from_numpy(logits)
        options = self._ort.RunOptions()
        if self._on_cpu:  # give the piece's activations back instead of keeping the largest ever seen
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._on_opened_weights()
        self._call(session, self._bind(session, inputs, output, state.sets, state.front), options)
        self._on_opened_weights()
        state.front = 1 - state.front
        return logits

    @one_at_a_time
    def step(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: OrtState
    ) -> FloatArray:
        """Consume at most one token a row; see `Runner.step`."""
        check_owner(self, state, OrtState)
        arrays = check_call(self, input_ids, positions, seq_lens, state.batch, step=True)
        step = self._step_of(state)
        step.fill(list(arrays))
        self._on_opened_weights()
        logits = step.run(state.front)
        self._on_opened_weights()
        state.front = 1 - state.front
        return logits

    @one_at_a_time
    def export_state(self, state: OrtState) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] array per layer."""
        check_owner(self, state, OrtState)
        return [np.array(value.numpy(), np.float32) for value in state.sets[state.front]]

    @one_at_a_time
    def import_state(self, layers: list[FloatArray]) -> OrtState:
        """A state that holds copies of `layers`."""
        arrays = check_layers(self.spec, layers)
        state = self.new_state(arrays[0].shape[0])
        for value, array in zip(state.sets[0], arrays, strict=True):
            value.update_inplace(array)
        return state

    @one_at_a_time
    def reset_rows(self, state: OrtState, rows: Sequence[int]) -> None:
        """Zero these rows of the state in place; see `Runner.reset_rows`."""
        check_owner(self, state, OrtState)
        self._zero_rows(state.sets[state.front], check_rows(rows, state.batch))

    @one_at_a_time
    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Load the sessions now rather than on first use."""
        for name, wanted in (("prefill", prefill), ("step", step)):
            if wanted:
                self._session(name)

    def settings(self) -> dict[str, str | int | bool]:
        """How the runner was set up; 0 threads: ONNX Runtime chooses."""
        return {
            "threads": self._threads, "spinning": self.spinning, "prepack": self.prepack,
            "optimization": self._optimization, "lowering": self.lowering,
            "cuda_graph": self.cuda_graphs.enabled,
        }  # fmt: skip

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
            find_cuda_libraries(self._ort)

    def _choose_lowering(self, wanted: Lowering) -> str:
        known = self._has_linear_attention() if "step_ort" in self.bundle.graphs else False

        def usable(name: str) -> bool:
            here = all(graph in self.bundle.graphs for graph in LOWERINGS[name])
            return here and (known or not name.startswith("ort"))

        if wanted == "auto":
            order = ("standard",) if self._on_cpu else _CUDA_ORDER
            return next(name for name in order if usable(name))
        missing = [graph for graph in LOWERINGS[wanted] if graph not in self.bundle.graphs]
        if missing:
            raise RunnerError(
                f"the bundle {self.bundle.path} has no graph {missing[0]!r}",
                got=", ".join(self.bundle.graphs),
                hint=f"export it with `to-onnx --variant {missing[0].partition('_')[2]}`",
            )
        if not usable(wanted):
            raise RunnerError(
                f"the installed ONNX Runtime {self._ort.__version__} has no LinearAttention",
                hint="install a newer one, or take the standard graphs",
            )
        return wanted

    def _has_linear_attention(self) -> bool:
        state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        return any(
            (schema.domain, schema.name) == ("com.microsoft", "LinearAttention")
            for schema in state.get_all_operator_schema()
        )

    def _choose_graphs(self, wanted: bool | None) -> CudaGraphs:
        graphs = CudaGraphs(enabled=False, note="the CPU has none" if self._on_cpu else "not wanted")
        if self._on_cpu or wanted is False:
            return graphs
        if self._graphs["step"] in CAPTURABLE:
            return CudaGraphs(enabled=True)
        graphs.note = "the standard step is not made to be one: export with `--variant ort` or `capture`"
        if wanted:
            _log_no_graphs(graphs.note)
        return graphs

    def _step_of(self, state: OrtState) -> Step:
        """The state's step, ready to run from its current set."""
        slot = state.slot
        if slot.step is None or slot.step.session is not self._sessions.get("step"):
            slot.step = None  # of a session that was given up: let it go before the next one is loaded
            slot.step = Step(self, slot)
        why = slot.step.prepare(slot, state.front)
        if why is not None:  # go on without graphs, in a session that was never told of them
            self.cuda_graphs.turn_off(why)
            _log_no_graphs(why)
            slot.step = None
            self._sessions.pop("step", None)
            slot.step = Step(self, slot)
        return slot.step

    def _session(self, name: str) -> Any:
        """The session of one graph, loaded from the bundle that was opened.

        Raises:
            BundleError: the bundle was replaced meanwhile; nothing was loaded.
            RunnerError: ONNX Runtime refuses the graph.
        """
        with self._loading:
            if name not in self._sessions:
                file = self.bundle.graph_path(self._graphs[name]).name
                with self.bundle.opened.unchanged(file, WEIGHTS) as root:
                    session = self._load_or_plain(root / file, name)
                    self.bundle.opened.keep_open(WEIGHTS)
                self._sessions[name] = session
            return self._sessions[name]

    def _load_or_plain(self, path: Path, name: str) -> Any:
        """A session; without CUDA graphs if there is none with them."""
        graph = name == "step" and self.cuda_graphs.enabled
        try:
            return self._load(path, name, graph)
        except RunnerError as error:
            if not graph:
                raise
            session = self._load(path, name, False)  # if that fails, it was not the graphs
            self.cuda_graphs.turn_off(str(error.got))
            _log_no_graphs(str(error.got))
            return session

    def _on_opened_weights(self) -> None:
        """ONNX Runtime maps the weights: writing to their file would change what runs, at any time."""
        self.bundle.opened.check_kept(WEIGHTS)

    def _load(self, path: Path, name: str, cuda_graph: bool) -> Any:
        options = self._ort.SessionOptions()
        # Fatal errors only: all others are raised too, and its log prints a stranger's names as they are.
        options.log_severity_level = 4
        options.intra_op_num_threads = self._threads
        if self.spinning != "auto":
            for pool in ("intra", "inter"):
                options.add_session_config_entry(
                    f"session.{pool}_op.allow_spinning", "1" if self.spinning == "on" else "0"
                )
        level = f"ORT_{'ENABLE_' if self._optimization != 'none' else ''}{_LEVELS[self._optimization]}"
        options.graph_optimization_level = getattr(self._ort.GraphOptimizationLevel, level)
        if self.prepack != "all" and self.prepack != name:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if name == "prefill":
            options.enable_mem_pattern = False  # lengths vary: each pattern would keep its own block
        provider = self._provider(cuda_graph)
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

    def _provider(self, cuda_graph: bool) -> Any:
        if self._on_cpu:
            return _PROVIDERS[CPU]
        options = {
            "device_id": str(self._index),
            "arena_extend_strategy": "kSameAsRequested",
            # On by default, and then a float32 graph is not float32 any more.
            "use_tf32": "0" if self.bundle.dtype == "float32" else "1",
        }
        return (_PROVIDERS[CUDA], options | ({"enable_cuda_graph": "1"} if cuda_graph else {}))

    def _bind(self, session: Any, inputs: list[Any], logits: Any, sets: list[list[Any]], front: int) -> Any:
        binding = session.io_binding()
        for name, value in zip(
            (io_names.INPUT_IDS, io_names.POSITIONS, io_names.SEQ_LENS), inputs, strict=True
        ):
            binding.bind_ortvalue_input(name, value)
        for layer in range(self.spec.num_layers):
            binding.bind_ortvalue_input(io_names.past_state(layer), sets[front][layer])
            binding.bind_ortvalue_output(io_names.present_state(layer), sets[1 - front][layer])
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

    # -- tensors on the device -------------------------------------------------------------------------

    def _zeros(self, batch: int) -> Any:
        return self._from_numpy(np.zeros((batch, *self.spec.state_shape), np.float32))

    def _from_numpy(self, array: npt.NDArray[np.float32]) -> Any:
        """The array itself on the CPU (kept alive by the OrtValue), a copy on CUDA."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, self._index)

    def _int_input(self, shape: tuple[int, ...]) -> IntInput:
        return IntInput(self._ort, shape, self._device, self._index)

    def _zero_rows(self, layers: Iterable[Any], rows: Iterable[int]) -> None:
        """Zero rows of tensors [B, H, d, d] in place."""
        rows, layers = list(rows), list(layers)
        if not rows:
            return
        if self._device != "cpu":
            size = 4 * self.spec.num_heads * self.spec.head_dim**2
            spans = [(value.data_ptr() + row * size, size) for value in layers for row in rows]
            if zero_device_memory(spans, self._index):
                return
        for value in layers:
            array = np.array(value.numpy())
            array[rows] = 0
            value.update_inplace(array)


def _log_no_graphs(why: str) -> None:
    logging.getLogger(__name__).warning("steps run without CUDA graphs: %s", why)
