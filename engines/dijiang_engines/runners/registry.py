"""Which runners there are, and opening one by name."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

from dijiang_engines.bundle import Bundle
from dijiang_engines.errors import UsageError
from dijiang_engines.runners.base import Runner

RUNNERS = ("onnxruntime-cpu", "onnxruntime-cuda")
"""Names that `open_runner` knows, besides "auto"."""
ALIASES = {"onnxruntime": "onnxruntime-cpu", "cpu": "onnxruntime-cpu", "cuda": "onnxruntime-cuda"}


def open_runner(bundle: Bundle, name: str = "auto", **options: Any) -> Runner:
    """Load a bundle into a runtime.

    Args:
        bundle: an opened bundle.
        name: one of RUNNERS or ALIASES; "auto" takes CUDA if the installed ONNX Runtime and this machine
            have it, else the CPU.
        options: `threads`, `prepack`, `optimization`, `device`; None stands for a runner's default.

    Raises:
        UsageError: there is no runner of that name.
        RunnerError: the runtime is absent, or cannot run this bundle.
    """
    wanted = ALIASES.get(name, name)
    if wanted == "auto":
        wanted = _best()
    if wanted not in RUNNERS:
        raise UsageError(f"there is no runner {name!r}", expected=", ".join(("auto", *RUNNERS)))
    from dijiang_engines.runners.ort import OrtRunner

    return OrtRunner(bundle, wanted, **{key: value for key, value in options.items() if value is not None})


def _best() -> str:
    from dijiang_engines.runners.ort import onnxruntime_module

    offered = onnxruntime_module().get_available_providers()
    if "CUDAExecutionProvider" in offered and cuda_devices() > 0:
        return "onnxruntime-cuda"
    return "onnxruntime-cpu"


def cuda_devices() -> int:
    """How many CUDA devices the driver shows; 0 without a driver."""
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
