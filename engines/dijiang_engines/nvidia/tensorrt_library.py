"""The TensorRT of this process, or its TensorRT for RTX, with the plugin in it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dijiang_engines.errors import PluginError, RunnerError
from dijiang_engines.machine import package_versions
from dijiang_engines.nvidia.tensorrt_versions import (
    RUNTIMES,
    TENSORRT,
    Dialect,
    Runtime,
    capabilities_text,
    capability_text,
    dialect_of,
    library_version,
)  # fmt: skip
from dijiang_engines.op_contract import OP_NAME
from dijiang_engines.plugin.cache import (
    KERNELS,
    BuiltPlugin,
    find_kernels_library,
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


def installed_runtimes() -> list[str]:
    """Names of those in RUNTIMES whose Python module is there, the preferred one first; imports none."""
    return [name for name, runtime in RUNTIMES.items() if any(map(_is_there, runtime.modules))]


def _is_there(module: str) -> bool:
    return sys.modules.get(module) is not None or importlib.util.find_spec(module) is not None


def tensorrt_module(runtime: str = TENSORRT) -> Any:
    """The Python module of a runtime.

    Args:
        runtime: a key of RUNTIMES.

    Raises:
        RunnerError: it is not installed, does not load, or its wheels are of different versions.
    """
    product = RUNTIMES[runtime]
    name = next(filter(_is_there, product.modules), product.modules[0])
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library that it opens by itself
        check_wheels(product)
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise RunnerError(
            product.absent if missing else f"{name} does not load",
            got=None if missing else str(error),
            hint=product.get,
        ) from error
    if not hasattr(module, "__version__"):  # any folder of that name on the path can be imported
        raise RunnerError(
            f"what Python finds as {name} is not {product.title}",
            got=", ".join(getattr(module, "__path__", ())) or None,
            hint=product.get,
        )
    check_wheels(product)
    return module


def check_wheels(product: Runtime) -> None:
    """The wheels that a runtime comes as are of one version, as far as they are installed as wheels.

    Raises:
        RunnerError: they are not.
    """
    found = package_versions(product.packages)
    if len(set(found.values())) > 1:
        raise RunnerError(
            f"the wheels of {product.title} are of different versions",
            got=", ".join(f"{name} {version}" for name, version in found.items()),
            expected="one version",
            hint=f"pip install {' '.join(f'{name}=={max(found.values())}' for name in product.packages)}",
        )


def tensorrt_version(trt: Any, runtime: str = TENSORRT) -> str:
    """Version of the loaded library, which may be another than that of the Python bindings."""
    major = str(trt.__version__).split(".")[0]
    for name in RUNTIMES[runtime].libraries:
        with suppress(OSError, AttributeError):
            return library_version(int(ctypes.CDLL(name.format(major=major)).getInferLibVersion()))
    return ".".join(str(trt.__version__).split(".")[:3])


class TensorRT:
    """TensorRT or TensorRT for RTX, its log, and the plugin.

    Args:
        compute_capability: of the GPU, as 10 * major + minor: the plugin must run there.
        runtime: which of RUNTIMES.
        with_plugin: False: plans of standard graphs, which need none.

    Attributes:
        trt: the Python module.
        product: what it is.
        version: of the library.
        dialect: what this version needs.
        plugin: the build that the plugin came from; None without one.
        plugin_library: its library; None without one.
        messages: TensorRT's last errors and warnings.

    Raises:
        RunnerError: it is absent, of an unsupported version, or not for this GPU.
        PluginError: the plugin is not built, stale or damaged, or does not load.
    """

    def __init__(self, compute_capability: int, runtime: str = TENSORRT, *, with_plugin: bool = True) -> None:
        self.product = RUNTIMES[runtime]
        self.trt: Any = tensorrt_module(runtime)
        self.version = tensorrt_version(self.trt, runtime)
        self.dialect: Dialect = dialect_of(self.version, runtime)
        self._capability = compute_capability
        check_capability(self.dialect, compute_capability)
        self.messages: list[str] = []
        self.logger = make_logger(self.trt, self.messages)
        self.plugin: BuiltPlugin | None = None
        self.plugin_library: Path | None = None
        if with_plugin:
            major = self.dialect.plugin_major(self.version)
            self.plugin_library, self.plugin = find_plugin(major, (compute_capability,))
            load_plugin(self.trt, self.plugin_library, runtime)

    @property
    def title(self) -> str:
        """Name and version, for people."""
        return f"{self.product.title} {self.version}"

    @property
    def kernels_library(self) -> Path | None:
        """The kernels for the decode loop's sampling: those that were built together with the plugin, without
        it those in the cache, if there are any for this GPU."""
        if self.plugin is not None:
            return self.plugin.library(KERNELS)
        with suppress(PluginError):
            return find_kernels_library(self._capability)
        return None

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
            raise self.failure(f"{self.title} cannot load {path}")
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


def check_capability(dialect: Dialect, compute_capability: int) -> None:
    """A runtime that is for some GPUs only.

    Raises:
        RunnerError: not for this one.
    """
    if dialect.capabilities is not None and compute_capability not in dialect.capabilities:
        raise RunnerError(
            f"{RUNTIMES[dialect.runtime].title} does not run on this GPU",
            got=f"compute capability {capability_text(compute_capability)}",
            expected=capabilities_text(dialect.capabilities),
            hint="TensorRT itself does: build the engine with --runtime tensorrt",
        )


def find_plugin(major: int, capabilities: Sequence[int]) -> tuple[Path, BuiltPlugin]:
    """The plugin's library for TensorRT `major` and the build that it belongs to.

    Args:
        major: of the TensorRT whose headers it was compiled with.
        capabilities: the GPUs that it must run on, each as 10 * major + minor.

    Raises:
        PluginError: there is none that fits; says how to make one.
    """
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        library = find_tensorrt_library(major, capabilities)
        return library, read_manifest(library.parent)
    built = read_manifest(Path(folder))
    if not built.is_current() or not all(runs_on(built.architectures, number) for number in capabilities):
        raise PluginError(
            f"the plugin in {folder} does not fit this program and this GPU",
            got=f"version {built.version}, sources {built.sources[:12]}, {', '.join(built.architectures)} on "
            f"{built.machine}",
            expected="made from this version's sources, for "
            + ", ".join(f"sm_{number}" for number in capabilities)
            + f" on {platform.machine()}",
            hint=f"unset {ENVIRONMENT}, or build it again: dijiang-export build-plugin --output {folder}",
        )
    return built.library(tensorrt_name(major)), built


def load_plugin(trt: Any, library: Path, runtime: str = TENSORRT) -> None:
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
            got=f"{library.name}, {RUNTIMES[runtime].title} {tensorrt_version(trt, runtime)}",
            hint="it was compiled for another version: `dijiang-export build-plugin` with this one's headers",
        )


def make_logger(trt: Any, messages: list[str], tell: Callable[[str, str], None] | None = None) -> Any:
    """A logger that keeps errors and warnings, and prints only if DIJIANG_TENSORRT_LOG asks for it.

    Args:
        trt: the runtime's module.
        messages: gets the last errors and warnings.
        tell: also told everything: "error", "warning" or "", and the text.
    """
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
            kind = names.get(severity, "")
            if kind:
                messages.append(f"{kind}: {text}")
                del messages[:-KEPT_MESSAGES]
            if wanted == "verbose" or (wanted and kind):
                print(f"tensorrt {kind or 'info'}: {printable(text)}", file=sys.stderr, flush=True)
            elif tell is not None:
                tell(kind, text)

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
