"""Which runners there are, and opening one by name."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.formats.open import Model
from dijiang_engines.runners.base import Runner

RUNNERS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt")
"""Names that `open_runner` knows, besides "auto"."""
ALIASES = {
    "onnxruntime": "onnxruntime-cpu", "cpu": "onnxruntime-cpu", "cuda": "onnxruntime-cuda", "trt": "tensorrt",
}  # fmt: skip
_ORT = ("threads", "spinning", "prepack", "optimization", "lowering")
OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "onnxruntime-cpu": _ORT,
        "onnxruntime-cuda": (*_ORT, "device", "cuda_graph"),
        "tensorrt": ("device", "cuda_graph"),
    }
)
"""Which options each runner knows."""


def open_runner(model: Model, name: str = "auto", **options: Any) -> Runner:
    """Load a bundle or an engine into a runtime.

    Args:
        model: an opened bundle or engine.
        name: one of RUNNERS or ALIASES. "auto" takes TensorRT for an engine; for a bundle CUDA if the
            installed ONNX Runtime and this machine have it, else the CPU.
        options: None stands for a runner's default; OPTIONS says which runner knows which.

    Raises:
        UsageError: there is no runner of that name, or it does not know an option.
        RunnerError: the runtime is absent, or cannot run this bundle.
    """
    wanted = ALIASES.get(name, name)
    if wanted != "auto" and wanted not in RUNNERS:
        raise UsageError(f"there is no runner {name!r}", expected=", ".join(("auto", *RUNNERS)))
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(model, EngineFolder):
        if wanted not in ("auto", "tensorrt"):
            raise UsageError(
                "an engine runs on TensorRT only", got=name, hint="give the bundle that it was built from"
            )
        check_options("tensorrt", given)
        from dijiang_engines.runners.tensorrt.runner import TensorRTRunner

        return TensorRTRunner(model, **given)
    if wanted == "tensorrt":
        raise UsageError(
            "TensorRT runs engines, and this is a bundle",
            got=model.path,
            hint=f"build one: dijiang-export build-engine {model.path} -o ENGINE",
        )
    chosen = _best() if wanted == "auto" else wanted
    check_options(chosen, given)
    from dijiang_engines.runners.onnxruntime.runner import OrtRunner

    return OrtRunner(model, chosen, **given)


def check_options(runner: str, given: Mapping[str, Any]) -> None:
    """Every option that was given is one that this runner knows.

    Raises:
        UsageError: one is another runner's, or nobody's.
    """
    for option in given:
        if option in OPTIONS[runner]:
            continue
        known = [name for name, options in OPTIONS.items() if option in options]
        if not known:
            every = dict.fromkeys(name for options in OPTIONS.values() for name in options)
            raise UsageError(f"no runner has an option {option!r}", expected=", ".join(every))
        raise UsageError(
            f"the runner {runner} has no option {option!r}",
            expected=", ".join(OPTIONS[runner]),
            hint=f"it is one of {' and '.join(known)}: leave it out, or choose another --runner",
        )


def _best() -> str:
    from dijiang_engines.runners.onnxruntime.runner import onnxruntime_module

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
