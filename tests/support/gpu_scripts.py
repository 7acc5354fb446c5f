"""Loads a script of tests/gpu as a module."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from support.paths import GPU_SCRIPTS


def load(name: str) -> Any:
    """The module tests/gpu/<name>.py, run anew; its neighbours can be imported by it."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU_SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
