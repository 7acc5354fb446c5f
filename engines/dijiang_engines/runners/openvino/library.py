"""The openvino package: loading it, and which of its devices are here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.openvino.config import DEVICES


def openvino_module() -> Any:
    """The openvino package.

    Importing it would tell Google Analytics (openvino/tools/ovc/__init__.py of 2026.4.1, through the package
    openvino-telemetry, which it depends on) and keep an identifier in ~/intel, unasked. Without that package
    it does neither; so it is imported as if that package were absent.

    Raises:
        RunnerError: it is not installed, or does not load.
    """
    try:
        with _without("openvino_telemetry"):
            return importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "openvino"
        raise RunnerError(
            "the Python package openvino is not installed" if missing else "openvino does not load",
            got=None if missing else str(error),
            hint="pip install 'dijiang-export[openvino]'",
        ) from error


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Imports of `package` fail in the block, if it has not been imported yet."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # which Python takes for "there is none"
    try:
        yield
    finally:
        del sys.modules[package]


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
