"""A bundle's two sessions, what their runs are bound to, and tensors where they run."""

from __future__ import annotations

import ctypes
import importlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines import io_names
from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.formats.safe_files import LIMITS
from dijiang_engines.runners.base import IntArray
from dijiang_engines.runners.onnxruntime.config import OPTIMIZATIONS, GraphName, OrtConfig
from dijiang_engines.runners.onnxruntime.cuda import CudaGraphs, find_cuda_libraries, zero_device_memory
from dijiang_engines.runners.onnxruntime.providers import CPU, CUDA, PROVIDERS, RTX
from dijiang_engines.runners.onnxruntime.rtx import rtx_device
from dijiang_engines.runners.onnxruntime.widened import widen
from dijiang_engines.spec import ModelSpec


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


def check_provider(ort: Any, name: str) -> None:
    """Whether the installed ONNX Runtime was made with what the runner `name` needs; finds CUDA's libraries.

    Raises:
        RunnerError: it was not.
    """
    if name == RTX:
        rtx_device(ort)
        return
    provider = PROVIDERS[name]
    offered = ort.get_available_providers()
    if provider not in offered:
        raise RunnerError(
            f"the installed ONNX Runtime {ort.__version__} has no {provider}",
            got=", ".join(offered),
            hint="replace it: pip uninstall onnxruntime && pip install 'dijiang-export[gpu]'",
        )
    if name == CUDA:
        find_cuda_libraries(ort)


class Sessions:
    """The sessions "prefill" and "step" of one bundle, each loaded when it is first asked for.

    Args:
        bundle: an opened bundle.
        config: how it runs.
        graphs: whether steps are CUDA graphs; turned off if there is no session for them.
    """

    def __init__(self, bundle: Bundle, config: OrtConfig, graphs: CudaGraphs) -> None:
        self.bundle, self.config, self.graphs = bundle, config, graphs
        self.ort = onnxruntime_module()
        self._loaded: dict[str, Any] = {}
        self._wide: dict[str, Any] = {}
        self._loading = threading.RLock()  # or two threads would load the same session twice

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the sessions that are there."""
        return tuple(self._loaded)

    def get(self, name: GraphName) -> Any:
        """The session of one graph, loaded from the bundle that was opened.

        Raises:
            BundleError: the bundle was replaced meanwhile; nothing was loaded.
            RunnerError: ONNX Runtime refuses the graph.
        """
        with self._loading:
            if name not in self._loaded:
                file = self.bundle.graph_path(self.config.graph(name)).name
                with self.bundle.opened.unchanged(file, WEIGHTS) as root:
                    session = self._load_or_plain(root / file, name)
                    self.bundle.opened.keep_open(WEIGHTS)
                self._loaded[name] = session
            return self._loaded[name]

    def holds(self, name: GraphName, session: Any) -> bool:
        """Whether `session` is the one that is loaded, and was not given up."""
        return self._loaded.get(name) is session

    def give_up(self, name: GraphName) -> None:
        """Forget a session; the next `get` loads another."""
        self._loaded.pop(name, None)

    def check_weights(self) -> None:
        """ONNX Runtime maps the weights: writing to their file would change what runs, at any time.

        Raises:
            BundleError: somebody wrote to it.
        """
        self.bundle.opened.check_kept(WEIGHTS)

    def run(self, session: Any, binding: Any, options: Any) -> None:
        """One run on what is bound; the weights are what was opened, before it and after.

        Raises:
            BundleError: the weights were changed.
            RunnerError: ONNX Runtime failed.
        """
        self.check_weights()
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            raise _failed("ONNX Runtime failed while running the graph", error) from error
        self.check_weights()

    def run_options(self, entry: str, value: str) -> Any:
        """Options of a run with one entry."""
        options = self.ort.RunOptions()
        options.add_run_config_entry(entry, value)
        return options

    def provider(self, cuda_graph: bool) -> Any:
        """What ONNX Runtime takes as a provider: a name, or a name with options."""
        if self.config.on_cpu:
            return PROVIDERS[CPU]
        options = {
            "device_id": str(self.config.device),
            "arena_extend_strategy": "kSameAsRequested",
            # On by default, and then a float32 graph is not float32 any more.
            "use_tf32": "0" if self.config.float32 else "1",
        }
        return (PROVIDERS[CUDA], options | ({"enable_cuda_graph": "1"} if cuda_graph else {}))

    def _load_or_plain(self, path: Path, name: GraphName) -> Any:
        """A session; without CUDA graphs if there is none with them."""
        graph = name == "step" and self.graphs.enabled
        try:
            return self.load(path, name, graph)
        except RunnerError as error:
            if not graph:
                raise
            session = self.load(path, name, False)  # if that fails, it was not the graphs
            self.graphs.turn_off(str(error.got))
            return session

    def load(self, path: Path, name: GraphName, cuda_graph: bool) -> Any:
        """A new session.

        Args:
            path: the graph.
            name: what it is for.
            cuda_graph: its runs become CUDA graphs.

        Raises:
            RunnerError: ONNX Runtime refuses the graph, or the provider does not work here.
        """
        options = self._options(name)
        model: str | bytes = str(path)
        if self.config.widens(name):
            model = self._widen(path, options)
        try:
            if self.config.name == RTX:
                options.add_provider_for_devices([rtx_device(self.ort, self.config.device)], {})
                session = self.ort.InferenceSession(model, options)
            else:
                provider = self.provider(cuda_graph)
                session = self.ort.InferenceSession(model, options, providers=[provider])
        except Exception as error:
            raise _failed(f"ONNX Runtime cannot load {path}", error) from error
        if session.get_providers()[0] != PROVIDERS[self.config.name]:
            raise RunnerError(  # it only warns, and goes on on the CPU
                f"ONNX Runtime cannot use {'CUDA' if self.config.name == CUDA else 'TensorRT for RTX'} here",
                got=", ".join(session.get_providers()),
                hint="`dijiang-export doctor` shows which libraries are missing",
            )
        return session

    def _widen(self, path: Path, options: Any) -> bytes:
        """The graph with float32 in the place of quantised weights, which `options` get."""
        quantisation = self.bundle.quantisation
        assert quantisation is not None, "`resolve` refuses others"
        data = np.memmap(path.parent / WEIGHTS, np.uint8, "r")
        wide = widen(self.bundle.opened.read(path.name, LIMITS["graph"]), quantisation.stored, data, WEIGHTS)
        for name, array in wide.arrays.items():
            # A session refers to both as long as it lives; its options do not keep them alive.
            self._wide[name] = self.ort.OrtValue.ortvalue_from_numpy(array)
            options.add_initializer(name, self._wide[name])
        # A model in memory has no folder of its own. (onnxruntime_session_options_config_keys.h, v1.32.0)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        return wide.model

    def _options(self, name: GraphName) -> Any:
        config, options = self.config, self.ort.SessionOptions()
        # Fatal errors only: all others are raised too, and its log prints a stranger's names as they are.
        options.log_severity_level = 4
        options.intra_op_num_threads = config.threads
        if config.spinning != "auto":
            for pool in ("intra", "inter"):
                options.add_session_config_entry(
                    f"session.{pool}_op.allow_spinning", "1" if config.spinning == "on" else "0"
                )
        options.graph_optimization_level = getattr(
            self.ort.GraphOptimizationLevel, OPTIMIZATIONS[config.optimization]
        )
        if not config.prepacks(name):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if name == "prefill":
            options.enable_mem_pattern = False  # lengths vary: each pattern would keep its own block
        return options


def bind(session: Any, inputs: Sequence[Any], logits: Any, past: list[Any], present: list[Any]) -> Any:
    """A binding of OrtValues to a session.

    Args:
        session: of a prefill or a step graph.
        inputs: token ids [B, L], positions [B] and seq_lens [B], int64.
        logits: [B, 1 or L, V] float32, written.
        past: one [B, H, d, d] float32 per layer, read.
        present: the same, written; other memory than `past`.
    """
    binding = session.io_binding()
    for name, value in zip((io_names.INPUT_IDS, io_names.POSITIONS, io_names.SEQ_LENS), inputs, strict=True):
        binding.bind_ortvalue_input(name, value)
    for layer, (old, new) in enumerate(zip(past, present, strict=True)):
        binding.bind_ortvalue_input(io_names.past_state(layer), old)
        binding.bind_ortvalue_output(io_names.present_state(layer), new)
    binding.bind_ortvalue_output(io_names.LOGITS, logits)
    return binding


def _failed(what: str, error: Exception) -> RunnerError:
    text = " ".join(str(error).split())
    hint = None
    if "alloc" in text.lower() or "memory" in text.lower():
        hint = "not enough memory: try --prepack none, a smaller --prefill-tokens, or fewer prompts at once"
    return RunnerError(what, got=text[:300], hint=hint)


class IntInput:
    """An integer input that is refilled for each call; its address stays."""

    def __init__(self, ort: Any, shape: tuple[int, ...], device: str, index: int) -> None:
        self._array = np.zeros(shape, np.int64)
        self._on_host = device == "cpu"
        # On the CPU the OrtValue is the array itself; it keeps a reference to it.
        self.value = ort.OrtValue.ortvalue_from_numpy(self._array, device, index)

    def fill(self, values: IntArray) -> None:
        """Put `values` there; what is there already is not copied again."""
        if self._on_host:
            self._array[...] = values
        elif not np.array_equal(self._array, values):
            self._array[...] = values
            self.value.update_inplace(self._array)


class Tensors:
    """Makes OrtValues where a runner's sessions run.

    Args:
        spec: the model, for the shape of states.
        device: "cpu" or "cuda".
        index: of the CUDA device.
    """

    def __init__(self, spec: ModelSpec, device: str, index: int) -> None:
        self.spec, self.device, self.index = spec, device, index
        self._ort = onnxruntime_module()

    def state(self, batch: int) -> list[Any]:
        """Zeroed tensors [B, H, d, d] float32, one per layer."""
        shape = (batch, *self.spec.state_shape)
        return [self.from_numpy(np.zeros(shape, np.float32)) for _ in range(self.spec.num_layers)]

    def from_numpy(self, array: npt.NDArray[np.float32]) -> Any:
        """The array itself on the CPU (kept alive by the OrtValue), a copy on CUDA."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, self.index)

    def int_inputs(self, batch: int, length: int) -> list[IntInput]:
        """Token ids [B, L], positions [B] and seq_lens [B]."""
        return [
            IntInput(self._ort, shape, self.device, self.index)
            for shape in ((batch, length), (batch,), (batch,))
        ]

    def zero_rows(self, layers: Iterable[Any], rows: Iterable[int]) -> None:
        """Zero rows of tensors [B, H, d, d] in place."""
        rows, layers = list(rows), list(layers)
        if not rows:
            return
        if self.device != "cpu":
            size = 4 * self.spec.num_heads * self.spec.head_dim**2
            spans = [(value.data_ptr() + row * size, size) for value in layers for row in rows]
            if zero_device_memory(spans, self.index):
                return
        for value in layers:
            with self._edited(value) as array:
                array[rows] = 0

    def get_rows(self, layers: Iterable[Any], rows: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """Copies of rows of tensors [B, H, d, d], on the host."""
        return [self._read(value)[list(rows)] for value in layers]

    def put_rows(
        self, layers: Iterable[Any], rows: Sequence[int], arrays: Iterable[npt.NDArray[np.float32]]
    ) -> None:
        """Copy arrays [n, H, d, d] into rows of tensors."""
        for value, array in zip(layers, arrays, strict=True):
            with self._edited(value) as target:
                target[list(rows)] = array

    def _read(self, value: Any) -> npt.NDArray[np.float32]:
        """A tensor's numbers: on the CPU themselves, from the GPU a copy."""
        if self.device != "cpu":
            return np.asarray(value.numpy(), np.float32)
        # `numpy()` copies, and a state of many rows is large.
        count = math.prod(shape := value.shape())
        numbers = (ctypes.c_float * count).from_address(value.data_ptr())
        found: npt.NDArray[np.float32] = np.frombuffer(numbers, np.float32).reshape(shape)
        return found

    @contextmanager
    def _edited(self, value: Any) -> Iterator[npt.NDArray[np.float32]]:
        """An array whose changes are the tensor's after the block."""
        if self.device == "cpu":
            yield self._read(value)
            return
        array = np.array(value.numpy())
        yield array
        value.update_inplace(array)
