"""What differs between the TensorRT versions that are supported, in one table.

Everything else in this package is written once. The facts come from NvInfer.h of NVIDIA/TensorRT at
release/8.6, v10.3.0, v10.13.3, v10.16 and v11.1, and from running 8.6.0; docs/engines.md lists them with what
was tested.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dijiang_engines.errors import RunnerError

SUPPORTED = "8.6, or 10.3 and newer"


@dataclass(frozen=True)
class Dialect:
    """One range of versions."""

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
)


def dialect_of(version: str) -> Dialect:
    """The row for a version such as "10.3.0".

    Raises:
        RunnerError: it is not supported.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    for first, end, dialect in _TABLE:
        if first <= numbers < end:
            return dialect
    raise RunnerError(
        "this version of TensorRT is not supported",
        got=version,
        expected=SUPPORTED,
        hint="9.x and 10.0 to 10.2 lack the plugin interface that both sides of this range have",
    )


def library_version(number: int) -> str:
    """getInferLibVersion()'s number as text: 8600 is 8.6.0, 101303 is 10.13.3."""
    major = number // 10000 if number >= 100000 else number // 1000
    minor = number % 10000 // 100 if number >= 100000 else number % 1000 // 100
    return f"{major}.{minor}.{number % 100}"


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
