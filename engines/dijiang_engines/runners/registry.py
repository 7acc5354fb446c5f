"""Which runners there are, what each runs and knows, and opening one by name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.formats.open import Model
from dijiang_engines.runners.base import Runner

Open = Callable[..., Runner]
"""(model, name, **options) -> a runner; imports what the runtime needs."""


@dataclass(frozen=True)
class Entry:
    """What the table below says of a runner."""

    runs: type[Bundle] | type[EngineFolder]
    options: tuple[str, ...]
    """Those that it knows."""
    open: Open


def _onnxruntime(model: Bundle, name: str, **options: Any) -> Runner:
    from dijiang_engines.runners.onnxruntime.runner import OrtRunner

    return OrtRunner(model, name, **options)


def _openvino(model: Bundle, name: str, **options: Any) -> Runner:
    from dijiang_engines.runners.openvino.runner import OvRunner

    return OvRunner(model, name, **options)


def _tensorrt(model: EngineFolder, name: str, **options: Any) -> Runner:
    from dijiang_engines.runners.tensorrt.runner import TensorRTRunner

    return TensorRTRunner(model, **options)


_ORT = ("threads", "spinning", "prepack", "optimization", "lowering")
_GPU = ("device", "cuda_graph")
TABLE: Mapping[str, Entry] = MappingProxyType(
    {
        "onnxruntime-cpu": Entry(Bundle, _ORT, _onnxruntime),
        "onnxruntime-cuda": Entry(Bundle, (*_ORT, *_GPU), _onnxruntime),
        "onnxruntime-rtx": Entry(Bundle, ("device",), _onnxruntime),
        "openvino-cpu": Entry(Bundle, ("threads", "fixed_batches"), _openvino),
        "openvino-gpu": Entry(Bundle, ("fixed_batches",), _openvino),
        "tensorrt": Entry(EngineFolder, _GPU, _tensorrt),
    }
)
"""Every runner there is. A new runtime is a line here and a folder beside: see `dijiang_engines.runners`."""
RUNNERS = tuple(TABLE)
"""Names that `open_runner` knows, besides "auto"."""
OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({n: entry.options for n, entry in TABLE.items()})
"""Which options each runner knows."""
ALIASES = {
    "onnxruntime": "onnxruntime-cpu", "cpu": "onnxruntime-cpu", "cuda": "onnxruntime-cuda", "trt": "tensorrt",
    "openvino": "openvino-cpu",
}  # fmt: skip


def open_runner(model: Model, name: str = "auto", **options: Any) -> Runner:
    """Load a bundle or an engine into a runtime.

    Args:
        model: an opened bundle or engine.
        name: one of RUNNERS or ALIASES. "auto" takes TensorRT for an engine; for a bundle CUDA if the
            installed ONNX Runtime and this machine have it, else the CPU: with ONNX Runtime, or with OpenVINO
            where that alone is installed, or alone can run the bundle.
        options: None stands for a runner's default; OPTIONS says which runner knows which.

    Raises:
        UsageError: there is no runner of that name, it does not run such a model, or it does not know an
            option.
        RunnerError: the runtime is absent, or cannot run this bundle.
    """
    wanted = ALIASES.get(name, name)
    if wanted != "auto" and wanted not in TABLE:
        raise UsageError(f"there is no runner {name!r}", expected=", ".join(("auto", *RUNNERS)))
    if wanted == "auto":
        wanted = _best(model)
    entry = TABLE[wanted]
    if not isinstance(model, entry.runs):
        raise _other_kind(model, name)
    given = {key: value for key, value in options.items() if value is not None}
    check_options(wanted, given)
    return entry.open(model, wanted, **given)


def _other_kind(model: Model, name: str) -> UsageError:
    """The error for a model that the runner `name` does not run."""
    if isinstance(model, EngineFolder):
        return UsageError(
            "an engine runs on TensorRT only", got=name, hint="give the bundle that it was built from"
        )
    return UsageError(
        "TensorRT runs engines, and this is a bundle",
        got=model.path,
        hint=f"build one: dijiang-export build-engine {model.path} -o ENGINE",
    )


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
        others = " and ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise UsageError(
            f"the runner {runner} has no option {option!r}",
            expected=", ".join(OPTIONS[runner]),
            hint=f"it is one of {others}: leave it out, or choose another --runner",
        )


def _best(model: Model) -> str:
    if isinstance(model, EngineFolder):
        return "tensorrt"
    from dijiang_engines.runners.onnxruntime.providers import CPU, CUDA, PROVIDERS
    from dijiang_engines.runners.onnxruntime.sessions import onnxruntime_module
    from dijiang_engines.runners.openvino.config import CPU as OPENVINO

    try:
        offered = onnxruntime_module().get_available_providers()
    except RunnerError:
        if find_spec("openvino") is not None:
            return OPENVINO
        raise
    if PROVIDERS[CUDA] in offered and cuda_devices() > 0:
        return CUDA
    return OPENVINO if model.dtype == "bfloat16" and find_spec("openvino") is not None else CPU


def cuda_devices() -> int:
    """How many CUDA devices the driver shows; 0 without a driver."""
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
