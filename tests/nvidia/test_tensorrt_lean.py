"""A real TensorRT library without a GPU: its version, log and plugin registry, as the engines ask for them.

The lean runtime is what `make bindings` fetches; the plugin itself in its registry is
tests/nvidia/test_tensorrt_registry.py's, which needs TensorRT's headers too.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import TESTS
from support.tensorrt_wheels import FOLDER, REQUIRED, unpack, version_of, wheels, without

WHEELS = ("tensorrt_lean_cu13_bindings", "tensorrt_lean_cu13_libs")
MISSING = without(*WHEELS)


@pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=MISSING or "")
def test_version_log_and_registry() -> None:
    assert MISSING is None, MISSING
    paths = [wheels(name)[-1] for name in WHEELS]
    version = version_of(paths[0])
    site = unpack(FOLDER / f"lean-{version}", *paths)
    spec = importlib.util.find_spec("numpy.random._bounded_integers")  # any library that opens
    assert spec is not None and spec.origin is not None
    done = subprocess.run(
        [sys.executable, TESTS / "support/probes/lean.py", site, spec.origin],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == ".".join(version.split(".")[:3])
    assert found["dialect"] == "10 and 11"
    assert found["plugin"][0] == "the plugin was opened, but did not register itself with this TensorRT"
    assert f"TensorRT {found['version']}" in found["plugin"][1]
    if not Path("/dev/nvidia0").exists():
        assert any("CUDA initialization failure" in text for text in found["messages"])
        assert all(text.startswith("error: ") for text in found["messages"])
