"""The openvino package: loading it, and which of its devices are here."""

from __future__ import annotations

import importlib
from typing import Any

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.openvino.config import DEVICES


def openvino_module() -> Any:
    """The openvino package.

    It brings openvino-telemetry, which only its model converters call: they are never called here.

    Raises:
        RunnerError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
        raise RunnerError(
            "the Python package openvino is not installed" if missing else "openvino does not load",
            got=None if missing else str(error),
            hint="pip install 'dijiang-export[openvino]'",
        ) from error


def check_device(core: Any, name: str) -> None:
    """Whether OpenVINO finds what the runner `name` needs.

    Raises:
        RunnerError: it does not.
    """
    device = DEVICES[name]
    found = list(core.available_devices)
    if any(one == device or one.startswith(f"{device}.") for one in found):
        return
    here = [runner for runner, needed in DEVICES.items() if any(one.startswith(needed) for one in found)]
    raise RunnerError(
        f"OpenVINO finds no {device} on this machine",
        got=", ".join(found) or "no devices",
        expected=device,
        hint=f"--runner {here[0]}" if here else "`dijiang-export doctor` shows what works here",
    )


def failed(what: str, error: Exception) -> RunnerError:
    """The error for something that OpenVINO threw: the last lines of its text say most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("Exception from ", "FrontEnd API failed"))]
    text = " ".join(" ".join(kept or lines).split())
    hint = None
    if isinstance(error, MemoryError) or "alloc" in text.lower():
        hint = "not enough memory: try a smaller --prefill-tokens, or fewer prompts at once"
    return RunnerError(what, got=text[:300] or type(error).__name__, hint=hint)
