"""cuBLASLt for the plugin's products of many rows, which finds only what the process has or the linker knows.

NVIDIA's wheels put it where neither is: TensorRT 8.6 brings it along, TensorRT 10 and newer do not.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dijiang_engines.errors import KernelError
from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.kernels.linear import LinearKernels

ENVIRONMENT = "DIJIANG_CUBLASLT"
"""Names the library, or says `none` (plugins/kernels/linear/many/cublaslt.cpp)."""
NAMES = ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so.11")
"""As the plugin looks for it, in that order."""
WHEELS = ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12", "nvidia-cublas-cu11")


def is_wanted(engine: EngineFolder) -> bool:
    """Does the plugin multiply where the engine reads prompts?"""
    plans = engine.manifest.get("made_with", {}).get("plans", [])
    found: dict[str, Any] = next((plan for plan in plans if plan.get("file") == engine.prefill.file), {})
    return bool((found.get("plugin_products") or {}).get("launches"))


def load_from_wheels() -> Path | None:
    """Load a wheel's library into the process if there is none without; the file that was loaded.

    Only before the plugin looks for it, which it does once: it takes what the process has before what the
    linker knows, and so does this.
    """
    if os.environ.get(ENVIRONMENT) or any(_loads(name, os.RTLD_NOLOAD) for name in NAMES):
        return None
    if any(map(_loads, NAMES)):
        return None
    return next((path for path in _in_wheels() if _loads(str(path))), None)


def missing(library: Path) -> str | None:
    """What to tell whoever runs an engine with such products and without the library; None: it is there.

    Args:
        library: of the kernels.
    """
    try:
        LinearKernels(library).library()
    except KernelError as error:
        return (
            f"prompts are read several times slower than they could be: {error.sentence()}; install CUDA's "
            f"cuBLAS (pip install nvidia-cublas), or let {ENVIRONMENT} name its libcublasLt"
        )
    return None


def _loads(name: str, flags: int = 0) -> bool:
    """Into the process, where it stays."""
    with suppress(OSError):
        ctypes.CDLL(name, mode=os.RTLD_NOW | flags)
        return True
    return False


def _in_wheels() -> Iterator[Path]:
    """Of the newest version first."""
    found = []
    for name in WHEELS:
        with suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(name) or ():
                if match := re.fullmatch(r"libcublasLt\.so\.(\d+)", file.name):
                    found.append((int(match[1]), Path(str(file.locate()))))
    return (path for _, path in sorted(found, reverse=True))
