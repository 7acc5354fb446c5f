"""ONNX Runtime's provider for TensorRT for RTX: a package of its own, whose library has to be registered.

NVIDIA's onnxruntime-ep-nv-tensorrt-rtx-cu13 brings the library and TensorRT for RTX with it, and goes with
the ordinary onnxruntime (1.24 and newer). A session is not given the provider's name but one of its devices.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.onnxruntime.providers import PROVIDERS, RTX

MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
GET = f"pip install 'onnxruntime>=1.24' {PACKAGE}"
_DRIVER = "it needs NVIDIA's driver for CUDA 13 (580 or newer): `dijiang-export doctor` shows what is here"
_registering = threading.Lock()


def rtx_device(ort: Any, index: int = 0) -> Any:
    """The provider's device, after its library was registered with this process's ONNX Runtime.

    Args:
        ort: the onnxruntime package.
        index: which of the GPUs that the provider runs on.

    Returns:
        An OrtEpDevice, for `SessionOptions.add_provider_for_devices`.

    Raises:
        RunnerError: the package is missing, ONNX Runtime is too old, the library does not load, or it finds
            no such GPU.
    """
    name = PROVIDERS[RTX]
    with _registering:
        devices = _devices(ort, name)
        if not devices:
            _register(ort, name)
            devices = _devices(ort, name)
    if not devices:
        raise RunnerError(f"{name} finds no GPU that it runs on", expected="an RTX GPU", hint=_DRIVER)
    if not 0 <= index < len(devices):
        raise RunnerError("there is no such GPU", got=f"GPU {index} of {len(devices)} that {name} runs on")
    return devices[index]


def _register(ort: Any, name: str) -> None:
    if not hasattr(ort, "register_execution_provider_library"):
        raise RunnerError(
            "this ONNX Runtime takes no providers from other packages",
            got=ort.__version__, expected="1.24 or newer", hint=GET,
        )  # fmt: skip
    try:
        package = importlib.import_module(MODULE)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULE
        raise RunnerError(
            f"the Python package {MODULE} is not installed" if missing else f"{MODULE} does not load",
            got=None if missing else str(error),
            hint=GET,
        ) from error
    try:
        ort.register_execution_provider_library(name, package.get_library_path())
    except Exception as error:
        words = " ".join(str(error).split())
        if "already registered" in words:
            return
        raise RunnerError(f"the library of {name} does not load", got=words[:300], hint=_DRIVER) from error


def _devices(ort: Any, name: str) -> list[Any]:
    if not hasattr(ort, "get_ep_devices"):
        return []
    return [device for device in ort.get_ep_devices() if device.ep_name == name]
