"""The parts of TensorRT that engines need and a machine around them, without a GPU.

The builder (polygraphy.py) builds nothing: its plan names the bundle's standard graph and what was asked
for. The runtime here runs that graph with ONNX Runtime on cuda.py's memory, and refuses what TensorRT
refuses: other versions' plans, sizes outside the profile, contexts that lack memory, addresses or shapes. So
numbers are right only if everything was bound as it must be. Everything here proves orchestration only: the
product's own code and ONNX Runtime stand on the other side, no TensorRT, no kernel and no speed.

What a version has and lacks follows NvInfer.h of release/8.6, v10.3.0, v10.13.3, v10.16 and v11.1.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.fakes import cuda as fake_cuda
from support.paths import TESTS

MAGIC = b"FAKEPLAN"
_MODULES = {
    "tensorrt": "support.fakes.tensorrt.tensorrt_module",
    "polygraphy": None,
    "polygraphy.logger": "support.fakes.polygraphy.logger_module",
    "polygraphy.backend": None,
    "polygraphy.backend.trt": "support.fakes.polygraphy.backend_module",
    "cuda": None,
    "cuda.bindings": None,
    "cuda.bindings.runtime": "support.fakes.cuda.runtime_module",
}
"""Module -> what makes it."""
LAYER_TYPES = [
    "ACTIVATION", "CAST", "CONSTANT", "ELEMENTWISE", "GATHER", "MATRIX_MULTIPLY", "NORMALIZATION",
    "PLUGIN_V2", "SHUFFLE", "SOFTMAX", "UNARY",
]  # fmt: skip
_PREVIEW = {
    8: [
        "FASTER_DYNAMIC_SHAPES_0805",
        "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",
        "PROFILE_SHARING_0806",
    ],
    10: ["PROFILE_SHARING_0806", "ALIASED_PLUGIN_IO_10_03"],
    11: ["ALIASED_PLUGIN_IO_10_03", "RUNTIME_ACTIVATION_RESIZE_10_10"],
}


def numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# -- the machine ---------------------------------------------------------------------------------------


class FakeMachine:
    """A folder with the fake packages, a plugin "built" for them, and what the builder was asked for."""

    modules = _MODULES

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.site = folder / "site"
        for name, maker in self.modules.items():
            path = self.site.joinpath(*name.split("."))
            path.mkdir(parents=True, exist_ok=True)
            text = f"import sys, {(maker or '').rpartition('.')[0]}\nsys.modules[__name__] = {maker}()\n"
            (path / "__init__.py").write_text(text if maker else "")
        self.calls_file = folder / "calls.jsonl"
        self.settings: dict[str, Any] = {"tensorrt": "8.6.0", "calls": str(self.calls_file)} | settings
        self.plugin = folder / "plugins" / "built"
        self.build_plugin()

    def build_plugin(self, **changes: Any) -> None:
        """A build of the plugin as `build-plugin` leaves it: any library that can be opened stands for it."""
        from importlib.util import find_spec

        from dijiang_engines.plugin import cache as plugin_cache
        from dijiang_engines.version import __version__

        version = self.settings["tensorrt"]
        shutil.rmtree(self.plugin, ignore_errors=True)
        self.plugin.mkdir(parents=True)
        spec = find_spec("numpy.random._bounded_integers")
        assert spec is not None and spec.origin is not None
        libraries = [plugin_cache.KERNELS, plugin_cache.tensorrt_name(numbers(version)[0])]
        for name in libraries:
            shutil.copyfile(spec.origin, self.plugin / name)
        facts = {
            "sources": plugin_cache.source_hash(), "version": __version__, "cuda": "12.6",
            "architectures": ["sm_87", "sm_90", "compute_90"], "tensorrt": version,
            "machine": os.uname().machine, "made": "2026-01-01T00:00:00+00:00",
        }  # fmt: skip
        plugin_cache.write_manifest(self.plugin, facts | changes, libraries)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be on this machine."""
        given = os.environ.get("PYTHONPATH")
        return {
            "FAKE_GPU": json.dumps(self.settings),
            "DIJIANG_PLUGIN": str(self.plugin),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "PYTHONPATH": os.pathsep.join((str(self.site), str(TESTS), *([given] if given else []))),
        }

    def enter(self, patch: pytest.MonkeyPatch, **settings: Any) -> FakeMachine:
        """Put this process on it, until `patch` is undone."""
        self.settings |= settings
        for name, value in self.environment.items():
            if name != "PYTHONPATH":  # the builder's process gets sys.path
                patch.setenv(name, value)
        patch.syspath_prepend(str(self.site))
        tops = {name.split(".")[0] for name in self.modules}
        for name in [n for n in sys.modules if n.split(".")[0] in tops]:
            patch.delitem(sys.modules, name)
        for name in self.modules:  # monkeypatch then takes away what is imported from here on
            patch.setitem(sys.modules, name, ModuleType(name))
            del sys.modules[name]
        patch.setattr(fake_cuda, "DEVICE", fake_cuda.Device())
        return self

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What the builder was asked for, one entry for each plan."""
        if not self.calls_file.exists():
            return []
        return [json.loads(line) for line in self.calls_file.read_text().splitlines()]


# -- tensorrt ------------------------------------------------------------------------------------------


def _enumeration(name: str, members: list[str]) -> Any:
    """Members print as TensorRT's do; one of another version is an AttributeError."""

    class Member:
        def __init__(self, text: str) -> None:
            self.text = text

        def __repr__(self) -> str:
            return f"{name}.{self.text}"

    return SimpleNamespace(**{text: Member(text) for text in members})


def tensorrt_module() -> ModuleType:
    """What `import tensorrt` gives, of the version that FAKE_GPU says."""
    version = fake_cuda.settings()["tensorrt"]
    major, minor = numbers(version)
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.DataType = _enumeration(
        "DataType", ["FLOAT", "HALF", "INT32", "INT64", "BF16"][: 3 if major < 10 else 5]
    )
    trt.LayerType = _enumeration("LayerType", LAYER_TYPES + (["PLUGIN_V3"] if major >= 10 else []))
    trt.MemoryPoolType = _enumeration("MemoryPoolType", ["WORKSPACE"])
    trt.TacticSource = _enumeration("TacticSource", ["CUBLAS", "CUBLAS_LT", "CUDNN"])
    trt.PreviewFeature = _enumeration("PreviewFeature", _PREVIEW[major])
    trt.nptype = lambda kind: {"INT32": np.int32, "INT64": np.int64, "FLOAT": np.float32}[kind.text]

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, text: str) -> None:
            raise NotImplementedError

    trt.ILogger = ILogger
    trt.Runtime = lambda logger: _Runtime(trt, logger)
    trt.get_plugin_registry = lambda: _registry(major)
    if major >= 10:
        trt.ExecutionContextAllocationStrategy = _enumeration("Strategy", ["STATIC", "USER_MANAGED"])
        trt.IProgressMonitor = type("IProgressMonitor", (), {})
        if (major, minor) >= (10, 7):
            trt.IStreamReader = type("IStreamReader", (), {})
    return trt  # type: ignore[no-any-return]


def _registered(major: int) -> bool:
    """The plugin registers itself once its library was opened, unless it was made for another TensorRT."""
    opened = f"libdijiang_tensorrt_{major}.so" in Path("/proc/self/maps").read_text()
    return bool(fake_cuda.settings()["registers"]) and opened


def _registry(major: int) -> Any:
    creators = [SimpleNamespace(name="DijiangAttention")] if _registered(major) else []
    if major < 10:
        return SimpleNamespace(plugin_creator_list=creators)
    return SimpleNamespace(plugin_creator_list=[], all_creators=creators)


class _Runtime:
    def __init__(self, trt: Any, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        """An engine; None, and words for the logger, if it is not one of this version."""
        error = self.trt.ILogger.ERROR
        if hasattr(plan, "read"):
            blocks = []
            while block := plan.read(1 << 30):
                blocks.append(block)
            data = b"".join(blocks)
        else:
            data = bytes(plan)
        if not data.startswith(MAGIC):
            self.logger.log(error, "1: [runtime.cpp::parsePlan::314] Error Code 1: Serialization (magicTag)")
            return None
        try:
            facts = json.loads(data[len(MAGIC) :])
        except ValueError:
            self.logger.log(error, "1: [dispatch] Error Code 1: Serialization (Serialized data is truncated)")
            return None
        if facts["tensorrt"] != self.trt.__version__:
            self.logger.log(error, "6: The engine plan file is not compatible with this version of TensorRT")
            return None
        if not _registered(numbers(self.trt.__version__)[0]):
            self.logger.log(error, "4: getPluginCreator could not find plugin: DijiangAttention version: 1")
            return None
        return _Engine(self.trt, self.logger, facts)


class _Engine:
    device_memory_size = 4096

    def __init__(self, trt: Any, logger: Any, facts: dict[str, Any]) -> None:
        self.trt, self.logger, self.facts = trt, logger, facts
        self.version = numbers(facts["tensorrt"])
        self.integers = "INT32" if self.version < (10, 0) else "INT64"
        self.users: dict[int, int] = {}
        if self.version >= (10, 1):
            self.device_memory_size_v2 = self.device_memory_size

    @property
    def num_io_tensors(self) -> int:
        return len(self.facts["tensors"])

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.facts["tensors"])[index])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.facts["tensors"][name])

    def get_tensor_dtype(self, name: str) -> Any:
        state = "recurrent_state" in name or name == "logits"
        return getattr(self.trt.DataType, "FLOAT" if state else self.integers)

    def create_execution_context_without_device_memory(self) -> Any:
        assert self.version < (11, 0), "11 has no such method"
        if self.facts.get("broken"):  # as 8.6 does with some float16 plans
            return None
        return _context(self)

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return _context(self)


def _context(engine: _Engine) -> Any:
    return (_OldContext if engine.version < (10, 1) else _Context)(engine)


class _BaseContext:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def __del__(self) -> None:
        if self.profile is not None:
            self.engine.users[self.profile] -= 1

    def _refuse(self, text: str) -> bool:
        self.engine.logger.log(self.engine.trt.ILogger.ERROR, text)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        fake_cuda.DEVICE.stream(stream)
        if not 0 <= index < len(self.engine.facts["profiles"]):
            return self._refuse("3: profileIndex is out of range")
        users = self.engine.users
        shared = self.engine.version >= (10, 0) or "PROFILE_SHARING_0806" in self.engine.facts["preview"]
        if users.get(index) and not shared:
            return self._refuse(f"3: profile {index} has been chosen for another IExecutionContext")
        users[index] = users.get(index, 0) + 1
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, most = self.engine.facts["profiles"][self.profile][name]
        if not all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True)):
            return self._refuse(f"3: {name} {list(shape)} is outside of profile {self.profile}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.facts["tensors"]:
            return self._refuse(f"3: no tensor {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        facts = self.engine.facts
        if self.memory is None or self.memory[1] < self.engine.device_memory_size:
            return self._refuse("3: the context has no device memory")
        fake_cuda.DEVICE.check(*self.memory)
        if set(self.shapes) != set(facts["profiles"][0]) or set(self.addresses) != set(facts["tensors"]):
            return self._refuse("3: not all shapes and addresses were given")
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory

        def work() -> None:
            assert self.shapes == shapes, "a recorded run's context has got other shapes"
            fake_cuda.DEVICE.check(*memory)
            _run(facts, self.engine.integers, shapes, addresses)

        fake_cuda.DEVICE.stream(handle).enqueue(work)
        return True


class _Context(_BaseContext):
    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address, size


class _OldContext(_BaseContext):
    @property
    def device_memory(self) -> None:
        raise AttributeError("write only")

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        self.memory = address, self.engine.device_memory_size


@cache
def _session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(
    facts: dict[str, Any], integers: str, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]
) -> None:
    """Run the standard graph between the addresses, inputs read before anything is written (in place)."""
    device = fake_cuda.DEVICE
    feeds = {}
    for name, shape in shapes.items():
        number = np.dtype(np.float32) if "recurrent_state" in name else np.dtype(integers.lower())
        value = device.read(addresses[name], shape, number)
        feeds[name] = value if number.kind == "f" else value.astype(np.int64)
    session = _session(facts["graph"])
    names = [output.name for output in session.get_outputs()]
    for name, value in zip(names, session.run(names, feeds), strict=True):
        device.write(addresses[name], value)
