"""What this project uses of TensorRT for RTX is in its real bindings, with the arguments that it gives.

`make bindings` fetches the wheels, builder included; no GPU is needed, and nothing runs on one. What the
builder is told, tests/building/test_rtx_builds.py shows with the builder itself.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT, TESTS
from support.tensorrt_wheels import FOLDER, REQUIRED, unpack, version_of, wheels, without

from dijiang_engines.nvidia.tensorrt_versions import TENSORRT_RTX, dialect_of

ENGINES = ROOT / "engines"
WHEELS = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
MISSING = without(*WHEELS)
pytestmark = pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=MISSING or "")

MUTATIONS = [
    ("runners/tensorrt/rtx.py", "plan.create_execution_context(config)", "plan.create_execution_context(1)"),
    ("runners/tensorrt/rtx.py", "config.cuda_graph_strategy =", "config.cuda_graphs_strategy ="),
    ("runners/tensorrt/rtx.py", '"EAGER", "LAZY"', '"EAGER", "LATER"'),
    ("runners/tensorrt/rtx.py", "Strategy.USER_MANAGED)", "Strategy.USER_MANAGED, 1)"),
    ("runners/tensorrt/kernel_cache.py", "config.create_runtime_cache()", "config.create_cache()"),
    ("runners/tensorrt/kernel_cache.py", "_cache.deserialize(blob)", "_cache.deserialize(1)"),
    ("runners/tensorrt/kernel_cache.py", "_cache.serialize()", "_cache.serialise()"),
    ("runners/tensorrt/contexts.py", '"is_stream_capturable"', '"is_capturable"'),
    ("building/ahead.py", "trt.BuilderFlag.TF32", "trt.BuilderFlag.TF33"),
]  # fmt: skip


@pytest.fixture(scope="module")
def site() -> Path:
    assert MISSING is None, MISSING
    paths = [wheels(name)[-1] for name in WHEELS]
    return unpack(FOLDER / f"rtx-{version_of(paths[0])}", *paths)


def probe(site: Path, engines: Path, folder: Path) -> dict[str, Any]:
    command = [sys.executable, TESTS / "support/probes/rtx_bindings.py", site, folder / "out.json"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join((str(engines), str(TESTS)))},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (folder / "out.json").exists(), done.stdout
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_everything_that_is_used_exists(site: Path, tmp_path: Path) -> None:
    found = probe(site, ENGINES, tmp_path)
    assert found["failures"] == {}
    assert len(found["used"]) > 30
    assert dialect_of(found["version"], TENSORRT_RTX).name == "RTX"


@pytest.mark.parametrize(("file", "old", "new"), MUTATIONS)
def test_a_wrong_name_is_seen(file: str, old: str, new: str, site: Path, tmp_path: Path) -> None:
    """The test above can fail: with one name changed, it does."""
    shutil.copytree(ENGINES, tmp_path / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "engines/dijiang_engines" / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r} any more: choose another mutation"
    path.write_text(text.replace(old, new))
    assert probe(site, tmp_path / "engines", tmp_path)["failures"]
