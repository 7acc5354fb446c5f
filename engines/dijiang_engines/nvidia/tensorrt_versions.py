"""What differs between the TensorRT versions that are supported, in one table.

Everything else in this package is written once. There are two products, TensorRT and TensorRT for RTX: what
is known of each before it is loaded is a `Runtime`, what its versions do differently a `Dialect`. The facts
come from NvInfer.h of NVIDIA/TensorRT at release/8.6, v10.3.0, v10.13.3, v10.16 and v11.1, from running
8.6.0, and from the wheels of TensorRT for RTX 1.7.1; docs/engines.md lists them with what was tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.engine import RUNTIMES as NAMES


@dataclass(frozen=True)
class Runtime:
    """One of the products that build and run plans, as far as it is known before it is loaded."""

    name: str
    """As for `build-engine --runtime`."""
    title: str
    """For people."""
    modules: tuple[str, ...]
    """Python modules that it may come as; the first that is there."""
    libraries: tuple[str, ...]
    """The shared library, {major} standing for its version; whichever the process has loaded."""
    packages: tuple[str, ...]
    """Distributions that must be of one version, bindings first; none: it comes in other ways too."""
    libraries_module: str | None
    """The Python module whose folder has the libraries."""
    supported: str
    unsupported_hint: str
    absent: str
    """What is said where it is not installed."""
    get: str
    """What to do to have it."""


TENSORRT, TENSORRT_RTX = NAMES
RUNTIMES: Mapping[str, Runtime] = MappingProxyType(
    {
        TENSORRT: Runtime(
            TENSORRT, "TensorRT", ("tensorrt",), ("libnvinfer.so.{major}", "libnvinfer_lean.so.{major}"),
            (), None,
            "8.6, or 10.3 and newer",
            "9.x and 10.0 to 10.2 lack the plugin interface that both sides of this range have",
            "the Python package tensorrt is not installed",
            "on a Jetson: apt-get install python3-libnvinfer; elsewhere: pip install tensorrt",
        ),
        TENSORRT_RTX: Runtime(
            TENSORRT_RTX, "TensorRT for RTX", ("tensorrt_rtx_bindings", "tensorrt_rtx"),
            ("libtensorrt_rtx.so.{major}",), ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
            "tensorrt_rtx_libs",
            "1.7 and newer, of major version 1",
            "pip install --upgrade 'dijiang-export[rtx]'",
            "the Python package tensorrt_rtx_bindings is not installed",
            "pip install 'dijiang-export[rtx]'",
        ),
    }
)  # fmt: skip
"""By name, the one that is taken first where both are installed standing first."""


@dataclass(frozen=True)
class Dialect:
    """One range of versions of one runtime."""

    name: str
    strongly_typed: bool
    """Types are the network's (10 and newer). Otherwise the builder chooses, within flags and constraints."""
    dtypes: tuple[str, ...]
    """Of bundles that it can run."""
    plugin_interface: str
    tactic_sources: tuple[str, ...] | None
    """None: TensorRT's choice."""
    preview_features: tuple[str, ...] | None
    progress_monitor: bool
    """The builder can say how far it is, and be stopped."""
    stream_reader: bool
    """A plan can be read in pieces instead of as one block of host memory."""
    runtime: str = TENSORRT
    """A key of RUNTIMES."""
    ahead_of_time: bool = False
    """The builder needs no GPU: it measures nothing, makes one plan for several GPUs, and needs no plugin."""
    capabilities: tuple[int, ...] | None = None
    """GPUs that it builds for and runs on, as 10 * major + minor; None: it says itself."""
    headers_major: int | None = None
    """Of the open headers that the plugin is compiled with for it; None: its own major version's."""
    parser_opens: str | None = None
    """A library that the ONNX parser opens by this name when it meets a plugin, and without which it ends the
    process. The package has the library under `Runtime.libraries`' name alone."""
    cuda: int | None = None
    """CUDA's major version that it was made with, which the driver must know; None: it says itself."""

    def plugin_major(self, version: str) -> int:
        """The major version of TensorRT whose plugin library serves this runtime of `version`."""
        return self.headers_major or int(version.split(".")[0])


_TABLE: tuple[tuple[tuple[int, int], tuple[int, int], Dialect], ...] = (
    (
        (8, 6),
        (9, 0),
        Dialect(
            "8.6",
            strongly_typed=False,
            dtypes=("float32", "float16"),
            plugin_interface="IPluginV2DynamicExt",
            # Without cuBLAS and with the newer shape code switched off, dynamic batches do not build
            # ("Could not find any implementation for node ForeignNode"). Sharing lets several contexts use
            # the generation profile, one for each batch size.
            tactic_sources=("CUBLAS", "CUBLAS_LT"),
            preview_features=("FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806"),
            progress_monitor=False,
            stream_reader=False,
        ),
    ),
    (
        (10, 3),
        (99, 0),
        Dialect(
            "10 and 11",
            strongly_typed=True,
            dtypes=("float32", "float16", "bfloat16"),
            plugin_interface="IPluginV3",
            tactic_sources=None,
            preview_features=None,
            progress_monitor=True,
            stream_reader=True,
        ),
    ),
    (
        (1, 7),
        (2, 0),
        Dialect(
            "RTX",
            runtime=TENSORRT_RTX,
            strongly_typed=True,
            dtypes=("float32", "float16", "bfloat16"),
            plugin_interface="IPluginV3",
            tactic_sources=None,
            preview_features=None,
            progress_monitor=True,
            stream_reader=False,
            ahead_of_time=True,
            # What the builder of 1.7.1 takes for these graphs. It knows 7.5 too, and finds no kernels for it.
            capabilities=(80, 86, 89, 120, 121),
            headers_major=11,
            parser_opens="libtensorrt_rtx.so",
            cuda=13,
        ),
    ),
)


def capabilities_of(runtime: str) -> frozenset[int]:
    """GPUs that some version of a runtime names, as 10 * major + minor; none: it says itself."""
    rows = [dialect for _, _, dialect in _TABLE if dialect.runtime == runtime]
    return frozenset(number for dialect in rows for number in dialect.capabilities or ())


def dialect_of(version: str, runtime: str = TENSORRT) -> Dialect:
    """The row for a version such as "10.3.0" of a runtime.

    Raises:
        RunnerError: it is not supported.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    for first, end, dialect in _TABLE:
        if dialect.runtime == runtime and first <= numbers < end:
            return dialect
    product = RUNTIMES[runtime]
    raise RunnerError(
        f"this version of {product.title} is not supported",
        got=version,
        expected=product.supported,
        hint=product.unsupported_hint,
    )


def capability_text(capability: int) -> str:
    """86 as "8.6", 120 as "12.0"."""
    return f"{capability // 10}.{capability % 10}"


def capabilities_text(capabilities: Iterable[int]) -> str:
    """As "8.6, 12.0"."""
    return ", ".join(map(capability_text, capabilities))


def parse_capability(text: str, dialect: Dialect) -> int:
    """ "8.6" as 86: a GPU that a plan can be built for.

    Raises:
        UsageError: it is no compute capability, or none of this runtime's.
    """
    title = RUNTIMES[dialect.runtime].title
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text.strip(), re.ASCII)
    known = dialect.capabilities or ()
    if match is None:
        raise UsageError("--compute-capability is not one", got=text[:80], expected=capabilities_text(known))
    number = 10 * int(match[1]) + int(match[2])
    if number not in known:
        hint = None
        if number in (90, 100, 103):
            hint = "for data-centre GPUs: --runtime tensorrt, on a machine with that GPU"
        elif number in (87, 101, 110):
            hint = "for a Jetson: --runtime tensorrt, on the board"
        raise UsageError(
            f"{title} does not build for this compute capability",
            got=capability_text(number), expected=capabilities_text(known), hint=hint,
        )  # fmt: skip
    return number


def library_version(number: int) -> str:
    """getInferLibVersion()'s number as text: 8600 is 8.6.0, 101303 is 10.13.3, and 10701 1.7.1 of RTX."""
    unit = 1000 if number < 10000 else 10000
    return f"{number // unit}.{number % unit // 100}.{number % 100}"


def activation_bytes(engine: Any) -> int:
    """Device memory that an execution context needs for activations, over all profiles."""
    size = getattr(engine, "device_memory_size_v2", None)  # 10.1: 64 bits
    return int(engine.device_memory_size if size is None else size)


def context_without_memory(trt: Any, engine: Any) -> Any:
    """An execution context whose activations go where `give_memory` says, or None if it cannot be made."""
    strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)  # 10.0
    if strategies is None:
        return engine.create_execution_context_without_device_memory()
    return engine.create_execution_context(strategies.USER_MANAGED)


def give_memory(context: Any, address: int, size: int) -> None:
    """Let a context use device memory that may be shared with others, as long as they do not run together."""
    if hasattr(context, "set_device_memory"):  # 10.1
        context.set_device_memory(address, size)
    else:
        context.device_memory = address
