"""The TensorRT of this process, with the plugin in it."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dijiang_engines.errors import PluginError, RunnerError
from dijiang_engines.nvidia.tensorrt_versions import Dialect, dialect_of, library_version
from dijiang_engines.op_contract import OP_NAME
from dijiang_engines.plugin.cache import (
    KERNELS,
    BuiltPlugin,
    find_tensorrt_library,
    read_manifest,
    runs_on,
    tensorrt_name,
)  # fmt: skip
from dijiang_engines.plugin.elf import check_machine
from dijiang_engines.printable import printable

ENVIRONMENT = "DIJIANG_PLUGIN"
"""Names a folder that `build-plugin --output` filled, to use instead of the cache."""
KEPT_MESSAGES = 50
_BLOCK = 64 << 20


def tensorrt_module() -> Any:
    """The package tensorrt.

    Raises:
        RunnerError: it is not installed, or does not load.
    """
    hint = "on a Jetson: apt-get install python3-libnvinfer; elsewhere: pip install tensorrt"
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: a library that it opens by itself
        missing = isinstance(error, ModuleNotFoundError) and error.name == "tensorrt"
        raise RunnerError(
            "the Python package tensorrt is not installed" if missing else "tensorrt does not load",
            got=None if missing else str(error),
            hint=hint,
        ) from error
    if not hasattr(module, "__version__"):  # any folder of that name on the path can be imported
        raise RunnerError(
            "what Python finds as tensorrt is not TensorRT",
            got=", ".join(getattr(module, "__path__", ())) or None,
            hint=hint,
        )
    return module


def tensorrt_version(trt: Any) -> str:
    """Version of the loaded library, which may be another than that of the Python bindings."""
    major = str(trt.__version__).split(".")[0]
    for name in (f"libnvinfer.so.{major}", f"libnvinfer_lean.so.{major}"):
        with suppress(OSError, AttributeError):
            return library_version(int(ctypes.CDLL(name).getInferLibVersion()))
    return ".".join(str(trt.__version__).split(".")[:3])


class TensorRT:
    """TensorRT, its log, and the plugin.

    Args:
        compute_capability: of the GPU, as 10 * major + minor: the plugin must run there.

    Attributes:
        trt: the Python module.
        version: of the library.
        dialect: what this version needs.
        plugin: the build that the plugin came from.
        messages: TensorRT's last errors and warnings.

    Raises:
        RunnerError: TensorRT is absent or of an unsupported version.
        PluginError: the plugin is not built, stale or damaged, or does not load.
    """

    def __init__(self, compute_capability: int) -> None:
        self.trt: Any = tensorrt_module()
        self.version = tensorrt_version(self.trt)
        self.dialect: Dialect = dialect_of(self.version)
        self.messages: list[str] = []
        self.logger = _make_logger(self.trt, self.messages)
        self.plugin_library, self.plugin = find_plugin(int(self.version.split(".")[0]), compute_capability)
        load_plugin(self.trt, self.plugin_library)

    @property
    def kernels_library(self) -> Path:
        """The kernels that were built together with the plugin: the decode loop's sampling."""
        return self.plugin.library(KERNELS)

    def load_plan(self, path: Path) -> Any:
        """Deserialize a plan whose hash and origin have been checked.

        Raises:
            RunnerError: TensorRT does not accept it.
        """
        runtime = self.trt.Runtime(self.logger)
        del self.messages[:]
        if path.stat().st_size == 0:  # which cannot be mapped
            self.messages.append("error: Serialization: the plan is empty")
            engine = None
        elif self.dialect.stream_reader and hasattr(self.trt, "IStreamReader"):
            engine = _from_stream(self.trt, runtime, path)
        else:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failure(f"TensorRT {self.version} cannot load {path}")
        return engine

    def failure(self, what: str) -> RunnerError:
        """An error with TensorRT's own last words."""
        return failure(what, self.messages)


def failure(what: str, messages: list[str]) -> RunnerError:
    """An error with TensorRT's own last words, and a hint for those that are known."""
    errors = [text for text in messages if text.startswith("error")] or messages
    words = " ".join(" | ".join(errors[-3:]).split())[:500]
    hint = "TensorRT's log says more: set DIJIANG_TENSORRT_LOG=verbose"
    if "OutOfMemory" in words or "out of memory" in words.lower() or "Cuda Runtime (2)" in words:
        hint = (
            "the GPU is out of memory: a smaller --max-batch, --max-length or --workspace, or a smaller model"
        )
    elif "serialization" in words.lower() or "magic" in words.lower() or "version tag" in words.lower():
        hint = "the plan is damaged or of another TensorRT: build the engine again"
    elif "Plugin" in words or "plugin" in words:
        hint = "the plugin does not fit: `dijiang-export build-plugin`, then build the engine again"
    return RunnerError(what, got=words or None, hint=hint)


def find_plugin(major: int, compute_capability: int) -> tuple[Path, BuiltPlugin]:
    """The plugin's library for TensorRT `major` and the build that it belongs to.

    Raises:
        PluginError: there is none that fits; says how to make one.
    """
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        library = find_tensorrt_library(major, compute_capability)
        return library, read_manifest(library.parent)
    built = read_manifest(Path(folder))
    if not built.is_current() or not runs_on(built.architectures, compute_capability):
        raise PluginError(
            f"the plugin in {folder} does not fit this program and this GPU",
            got=f"version {built.version}, sources {built.sources[:12]}, {', '.join(built.architectures)} on "
            f"{built.machine}",
            expected=f"made from this version's sources, for sm_{compute_capability} on {platform.machine()}",
            hint=f"unset {ENVIRONMENT}, or build it again: dijiang-export build-plugin --output {folder}",
        )
    return built.library(tensorrt_name(major)), built


def load_plugin(trt: Any, library: Path) -> None:
    """Open the plugin's library, which registers itself with the TensorRT that is loaded.

    Raises:
        PluginError: it is for another kind of processor, does not load, or does not register.
    """
    check_machine(library, PluginError, "dijiang-export build-plugin")
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise PluginError(
            f"cannot load the plugin {library}", got=error, hint="dijiang-export build-plugin --force"
        ) from error
    registry = trt.get_plugin_registry()
    creators = list(getattr(registry, "plugin_creator_list", ()))  # V2
    creators += list(getattr(registry, "all_creators", ()))  # 10: V2 and V3
    if not any(getattr(creator, "name", "") == OP_NAME for creator in creators):
        raise PluginError(
            "the plugin was opened, but did not register itself with this TensorRT",
            got=f"{library.name}, TensorRT {tensorrt_version(trt)}",
            hint="it was compiled for another version: `dijiang-export build-plugin` with this one's headers",
        )


def _make_logger(trt: Any, messages: list[str]) -> Any:
    """Keeps errors and warnings; prints them only if DIJIANG_TENSORRT_LOG asks for it."""
    wanted = os.environ.get("DIJIANG_TENSORRT_LOG", "")
    names = {
        trt.ILogger.INTERNAL_ERROR: "error",
        trt.ILogger.ERROR: "error",
        trt.ILogger.WARNING: "warning",
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            kind = names.get(severity)
            if kind is not None:
                messages.append(f"{kind}: {text}")
                del messages[:-KEPT_MESSAGES]
            if wanted == "verbose" or (wanted and kind is not None):
                import sys

                print(f"tensorrt {kind or 'info'}: {printable(text)}", file=sys.stderr, flush=True)

    return Logger()


def _from_stream(trt: Any, runtime: Any, path: Path) -> Any:
    """Let TensorRT 10 read the plan in blocks, so that the host never holds all of it."""

    class Reader(trt.IStreamReader):  # type: ignore[misc]
        def __init__(self, read: Callable[[int], bytes]) -> None:
            trt.IStreamReader.__init__(self)
            self._read = read

        def read(self, size: int) -> bytes:
            return self._read(min(size, _BLOCK) if size > 0 else 0)

    with path.open("rb") as file:
        return runtime.deserialize_cuda_engine(Reader(file.read))
