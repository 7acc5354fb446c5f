"""TensorRT for RTX as tensorrt.py has TensorRT: a builder that needs no GPU, a runtime with more settings.

The builder notes what it was asked for; its plan names the bundle's standard graph, which the runtime runs
with ONNX Runtime on cuda.py's memory. It refuses what the real one refuses: GPUs that a plan is not for,
other versions' plans, sizes outside the profile; and states of standard graphs that are bound in place. A
cache of kernels is a list of the shapes that were run. Proves orchestration only: names and arguments are
compared with the real bindings in tests/nvidia/test_rtx_bindings.py, what the real builder makes in
tests/building/test_rtx_builds.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from support.fakes import cuda as fake_cuda
from support.fakes.polygraphy import _Network
from support.fakes.tensorrt import (
    LAYER_TYPES,
    MAGIC,
    FakeMachine,
    _Context,
    _Engine,
    _enumeration,
    _registered,
)

VERSION = "1.7.1"
CAPABILITIES = (75, 80, 86, 89, 120, 121)
HEADERS = "11.1.0"
"""That the plugin was compiled with."""


class FakeRtx(FakeMachine):
    """A machine with TensorRT for RTX alone, by default with a GPU of compute capability 8.9."""

    modules = {  # noqa: RUF012 - as the class above has it
        "tensorrt_rtx_bindings": "support.fakes.tensorrt_rtx.rtx_module",
        "tensorrt_rtx_libs": None,
        "cuda": None,
        "cuda.bindings": None,
        "cuda.bindings.runtime": "support.fakes.cuda.runtime_module",
    }

    def __init__(self, folder: Path, **settings: Any) -> None:
        usual = {"capability": [8, 9], "gpu": "NVIDIA RTX Test", "driver": 13000, "capturable": True}
        super().__init__(folder, **({"tensorrt": VERSION} | usual | settings))
        (self.site / "tensorrt_rtx_libs/libtensorrt_rtx.so.1").write_text("a library")

    def build_plugin(self, **changes: Any) -> None:
        """For the open headers of TensorRT 11, whatever RTX's own version is."""
        settings, self.settings = self.settings, self.settings | {"tensorrt": HEADERS}
        super().build_plugin(**({"architectures": ["sm_86", "sm_89", "compute_89"]} | changes))
        self.settings = settings


def rtx_module() -> ModuleType:
    """What `import tensorrt_rtx_bindings` gives."""
    trt: Any = ModuleType("tensorrt_rtx_bindings")
    trt.__version__ = fake_cuda.settings()["tensorrt"] + ".116"
    trt.DataType = _enumeration("DataType", ["FLOAT", "HALF", "INT32", "INT64", "BF16"])
    trt.LayerType = _enumeration("LayerType", [*LAYER_TYPES, "PLUGIN_V3"])
    trt.BuilderFlag = _enumeration("BuilderFlag", ["TF32"])
    trt.ComputeCapability = _enumeration("ComputeCapability", [f"SM{number}" for number in CAPABILITIES])
    trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
    trt.ExecutionContextAllocationStrategy = _enumeration("Strategy", ["STATIC", "USER_MANAGED"])
    trt.CudaGraphStrategy = _enumeration("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    trt.DynamicShapesKernelSpecializationStrategy = _enumeration("Specialization", ["LAZY", "EAGER", "NONE"])
    trt.nptype = lambda kind: {"INT32": np.int32, "INT64": np.int64, "FLOAT": np.float32}[kind.text]

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    trt.ILogger = ILogger
    trt.IProgressMonitor = type("IProgressMonitor", (), {})
    trt.Runtime = lambda logger: _RtxRuntime(trt, logger)
    trt.Builder = lambda logger: _Builder(trt, logger)
    trt.OnnxParser = lambda network, logger: _Parser(trt, network, logger)
    creators = [SimpleNamespace(name="DijiangAttention")]
    trt.get_plugin_registry = lambda: SimpleNamespace(all_creators=creators if _registered(11) else [])
    return trt  # type: ignore[no-any-return]


# -- building ------------------------------------------------------------------------------------------


class _Builder:
    def __init__(self, trt: Any, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Any:
        return _Parsed(flags)

    def create_builder_config(self) -> Any:
        return _Config(self.trt)

    def create_optimization_profile(self) -> Any:
        return _Profile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        """The plan; None, and words for the logger, if it could not be made."""
        if fake_cuda.settings()["builder"].startswith("fails:"):
            self.logger.log(self.trt.ILogger.ERROR, fake_cuda.settings()["builder"].partition(":")[2])
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        call = {
            "onnx": network.path, "flags": sorted(config.flags), "level": config.builder_optimization_level,
            "profiles": config.profiles, "capabilities": config.capabilities,
            "inputs": {tensor.name: list(tensor.shape) for tensor in network.inputs},
            "links": _links(),
        }  # fmt: skip
        with open(fake_cuda.settings()["calls"], "a", encoding="utf-8") as file:
            file.write(json.dumps(call) + "\n")
        facts = {
            "tensorrt": fake_cuda.settings()["tensorrt"], "capabilities": config.capabilities,
            "graph": network.path.replace(".trt.onnx", ".onnx"), "profiles": config.profiles, "preview": [],
            "plugin": network.path.endswith(".trt.onnx"),
            "tensors": {tensor.name: list(tensor.shape) for tensor in network.inputs + network.outputs},
        }  # fmt: skip
        return MAGIC + json.dumps(facts).encode()


def _links() -> dict[str, str]:
    """What the loader's path has of links, and where they lead."""
    folders = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    paths = [path for folder in folders if Path(folder).is_dir() for path in Path(folder).iterdir()]
    return {path.name: path.resolve().name for path in paths if path.is_symlink()}


class _Parsed:
    """A network before and after it was parsed into."""

    def __init__(self, flags: int) -> None:
        assert flags == 1, "always strongly typed"
        self.path = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["parsed"], name)


class _Parser:
    def __init__(self, trt: Any, network: Any, logger: Any) -> None:
        self.trt, self.network, self.logger = trt, network, logger
        self.errors: list[Any] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        return self.errors[index]

    def parse_from_file(self, path: str) -> bool:
        """FAKE_GPU's "builder": dies:NODE, or node:NODE for one that it does not take."""
        kind, _, node = fake_cuda.settings()["builder"].partition(":")
        self.network.path, self.network.parsed = path, _Network(self.trt, path, True)
        self.logger.log(self.trt.ILogger.VERBOSE, "Parsing node: /first [Shape]")
        if kind == "dies":
            self.logger.log(self.trt.ILogger.VERBOSE, f"Parsing node: {node}")
            print("terminate called without an active exception", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGABRT)
        if kind == "node":
            name, _, operator = node.partition(" ")
            self.errors = [
                SimpleNamespace(
                    node_name=lambda: name, node_operator=lambda: operator,
                    desc=lambda: "Assertion failed: it does not fit\n: in importer.cpp",
                )
            ]  # fmt: skip
        return not self.errors


class _Config:
    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.flags = {"TF32"}
        self.builder_optimization_level, self.progress_monitor = 3, None
        self.profiles: list[Any] = []
        self.num_compute_capabilities = 0
        self.chosen: dict[int, int] = {}

    @property
    def capabilities(self) -> list[int]:
        assert sorted(self.chosen) == list(range(self.num_compute_capabilities))
        return [self.chosen[index] for index in sorted(self.chosen)]

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag.text)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def set_compute_capability(self, kind: Any, index: int) -> bool:
        self.chosen[index] = int(kind.text[2:])
        return index < self.num_compute_capabilities


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self.shapes[name] = [list(least), list(best), list(most)]


# -- running -------------------------------------------------------------------------------------------


class _RtxRuntime:
    def __init__(self, trt: Any, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        """An engine; None, and words for the logger, if it is not for this version and GPU."""
        error, data, now = self.trt.ILogger.ERROR, bytes(plan), fake_cuda.settings()
        if not data.startswith(MAGIC):
            self.logger.log(error, "Error Code 1: Serialization (magicTag)")
            return None
        facts = json.loads(data[len(MAGIC) :])
        major, minor = now["capability"]
        if facts["tensorrt"] != now["tensorrt"] or 10 * major + minor not in facts["capabilities"]:
            self.logger.log(error, "Error Code 6: the engine is not compatible with this version and GPU")
            return None
        if facts["plugin"] and not _registered(11):
            self.logger.log(error, "Error Code 4: could not find plugin: DijiangAttention version: 1")
            return None
        return _RtxEngine(self.trt, self.logger, facts)


class _RtxEngine(_Engine):
    def __init__(self, trt: Any, logger: Any, facts: dict[str, Any]) -> None:
        super().__init__(trt, logger, facts)
        self.version, self.integers = (11, 1), "INT64"
        self.device_memory_size_v2 = self.device_memory_size

    def create_runtime_config(self) -> Any:
        return _RuntimeConfig()

    def create_execution_context(self, config: Any) -> Any:
        assert config.allocation is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return _RtxContext(self, config)


class _RuntimeConfig:
    def __init__(self) -> None:
        self.allocation: Any = None
        self.cache: Any = None
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> Any:
        return _RuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class _RuntimeCache:
    """Kernels are the shapes that they were compiled for; those of another driver's are refused."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.compiled = 0
        """How many it had to compile."""

    def serialize(self) -> bytes:
        return json.dumps(
            {"driver": fake_cuda.settings()["driver"], "kernels": sorted(self.kernels)}
        ).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            data = json.loads(blob)
            if data["driver"] != fake_cuda.settings()["driver"]:
                return False
        except (ValueError, KeyError):
            return False
        self.kernels = set(data["kernels"])
        return True

    def need(self, kernel: str) -> None:
        self.compiled += kernel not in self.kernels
        self.kernels.add(kernel)


class _RtxContext(_Context):
    def __init__(self, engine: Any, config: Any) -> None:
        super().__init__(engine)
        self.config = config

    def is_stream_capturable(self, stream: int) -> bool:
        fake_cuda.DEVICE.stream(stream)
        return bool(fake_cuda.settings()["capturable"])

    def execute_async_v3(self, handle: int) -> bool:
        if not self.engine.facts["plugin"]:
            for name, address in self.addresses.items():
                past = name.replace("present", "past_key_values")
                assert past == name or self.addresses[past] != address, f"{name} is written in place"
        self.config.cache.need(json.dumps([self.profile, self.shapes["input_ids"]]))
        stream = fake_cuda.DEVICE.stream(handle)
        assert stream.recording is None or self.is_stream_capturable(handle)
        return super().execute_async_v3(handle)
