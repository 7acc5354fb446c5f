"""OpenVINO's runner, or a skip: `pytest.importorskip` would import the package, which reports that."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import Runner, open_runner


def openvino_runner(folder: Path, **options: Any) -> Runner:
    """On the CPU, with one thread unless `options` say otherwise."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    return open_runner(open_bundle(folder), "openvino-cpu", **({"threads": 1} | options))
