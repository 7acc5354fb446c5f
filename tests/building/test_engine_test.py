"""`make engine-test` without a GPU: what it says where it cannot run, and what it does around its parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.fakes.tensorrt import FakeMachine
from support.fakes.tensorrt_rtx import FakeRtx
from support.makers.engine_folders import Exported
from support.paths import ROOT

from dijiang_engines.formats.engine import open_engine

SCRIPT = ROOT / "tests/gpu/engine_test.py"
NEEDS_A_GPU = ["device_and_host", "stops", "greedy_text", "times", "layers"]
"""Checks of engine.py that run kernels."""


def engine_test(machine: FakeMachine, work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--work", str(work), *options], env=os.environ | machine.environment,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def plain(text: str, *, lines: int) -> bool:
    return "Traceback" not in text and len(text.splitlines()) <= lines


def hide(machine: FakeMachine, package: str) -> None:
    """As if it were not installed, even where it is."""
    error = f"raise ModuleNotFoundError('No module named {package}', name={package!r})\n"
    (machine.site / package.replace(".", "/") / "__init__.py").write_text(error)


@pytest.mark.parametrize(
    ("settings", "hidden", "words"),
    [
        ({}, "tensorrt", "the Python package tensorrt is not installed"),
        ({}, "cuda.bindings.runtime", "cuda-bindings is not installed"),
        ({"gpus": 0}, None, "there is no NVIDIA GPU here"),
        ({"tensorrt": "10.2.0"}, None, "this version of TensorRT is not supported (10.2.0)"),
    ],
)
def test_one_sentence_where_it_cannot_run(
    settings: dict[str, object], hidden: str | None, words: str, tmp_path: Path
) -> None:
    machine = FakeMachine(tmp_path / "machine", **settings)
    if hidden is not None:
        hide(machine, hidden)
    done = engine_test(machine, tmp_path / "work")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("engine-test needs TensorRT and an NVIDIA GPU: ")
    assert words in done.stderr and "hint: " in done.stderr and plain(done.stderr, lines=2)
    assert not (tmp_path / "work").exists()


def test_a_python_that_does_not_run(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine")
    done = engine_test(machine, tmp_path / "work", "--engine-python", str(tmp_path / "none"))
    assert done.returncode == 1 and "cannot run" in done.stderr and plain(done.stderr, lines=1)
    (tmp_path / "crashes").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "crashes").chmod(0o755)
    done = engine_test(machine, tmp_path / "work", "--engine-python", str(tmp_path / "crashes"))
    assert done.returncode == 1 and "ended its process" in done.stderr and plain(done.stderr, lines=1)


def test_everything_around_the_gpu(tmp_path: Path) -> None:
    """Export, build, validate and the checks that need no kernel, on a machine without a GPU."""
    machine = FakeMachine(tmp_path / "machine", tensorrt="10.13.3")
    greedy = tmp_path / "greedy.json"
    greedy.write_text("[]")
    work = tmp_path / "work"
    options = ["--dtypes", "float32", "--layouts", "two", "--greedy", str(greedy)]
    done = engine_test(machine, work, *options, "--skip", *NEEDS_A_GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (work / "summary.txt").read_text()
    assert summary in done.stdout
    assert re.search(r"^GPU: NVIDIA Test, sm_90, 80\.0 GiB; driver \w+", summary, re.MULTILINE)
    assert "TensorRT 10.13.3" in summary and "CUDA: driver's 12.8, runtime 12.6" in summary
    assert "plugin: CUDA 12.6, headers of TensorRT 10.13.3" in summary
    assert str(tmp_path) not in summary and str(ROOT) not in summary  # it is to be pasted
    found = re.findall(r"^(ok|FAIL|not run) +(\S.*?)  +[\d.]+ s", summary, re.MULTILINE)
    assert found == [
        ("ok", "export float32"), ("ok", "build float32 two"), ("ok", "validate float32 two"),
        ("ok", "check float32 two"),
    ]  # fmt: skip
    assert "\nall right\n" in summary
    assert (work / "float32-two.html").is_file() and (work / "float32-two.json").is_file()
    log = (work / "check-float32-two.log").read_text()
    assert "batches side by side" in log and "states apart" in log


def test_a_failed_part_fails_it(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine", builder="fails:no tactic for this node")
    (tmp_path / "greedy.json").write_text("[]")
    options = ["--dtypes", "float32", "--layouts", "one", "--greedy", str(tmp_path / "greedy.json")]
    done = engine_test(machine, tmp_path / "work", *options)
    assert done.returncode == 1 and plain(done.stderr, lines=0)
    summary = (tmp_path / "work/summary.txt").read_text()
    assert re.search(r"^FAIL +build float32 one .*could not build", summary, re.MULTILINE), summary
    assert re.search(r"^not run +validate float32 one .*needs the engine", summary, re.MULTILINE)
    assert re.search(r"^not run +check float32 one", summary, re.MULTILINE)
    assert "not all right: 3 of 4 parts" in summary
    assert "no tactic for this node" in done.stdout  # the log's last lines


def test_steps_are_built_as_asked_for(tmp_path: Path, exported: Exported) -> None:
    """Of float16 in layout two, nothing else. The fake machine's plugin has no kernels, and it is said."""
    machine = FakeMachine(tmp_path / "machine")
    (tmp_path / "greedy.json").write_text("[]")
    for dtype in ("float32", "float16"):
        (tmp_path / f"tiny-stdlib-{dtype}.bundle").symlink_to(exported(dtype=dtype)[0])
    options = ["--bundles", str(tmp_path), "--greedy", str(tmp_path / "greedy.json"), "--step", "auto"]
    done = engine_test(machine, tmp_path / "work", *options, "--skip", *NEEDS_A_GPU)
    found = re.findall(r"^(?:ok|FAIL|not run) +(build \S.*?)  +[\d.]+ s", done.stdout, re.MULTILINE)
    assert found == [
        "build float32 one", "build float32 two", "build float16 one", "build float16 two auto",
    ], done.stdout  # fmt: skip
    plans = open_engine(tmp_path / "work/float16-two-auto.engine").manifest["made_with"]["plans"]
    assert "is not a library of these kernels" in plans[1]["plugin_step"]["left"]


def test_make_runs_it(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "engine-test", "ENGINE_PYTHON=/opt/py", "ENGINE_TEST=--dtypes float16"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = done.stdout.replace("\\\n", " ")
    assert re.search(r"engine_test\.py\s+--engine-python \"/opt/py\" .*--dtypes float16", command), command


def test_tensorrt_for_rtx(tmp_path: Path, exported: Exported) -> None:
    """The same parts from the standard graphs, with nothing compiled; and a GPU that it does not run on."""
    machine = FakeRtx(tmp_path / "machine")
    (machine.site / "tensorrt").mkdir()
    (tmp_path / "greedy.json").write_text("[]")
    options = ["--dtypes", "float32", "--layouts", "two", "--greedy", str(tmp_path / "greedy.json")]
    options += ["--runtime", "tensorrt-rtx", "--graphs", "standard", "--bundles", str(tmp_path)]
    (tmp_path / "tiny-stdlib-float32.bundle").symlink_to(exported()[0])
    done = engine_test(machine, tmp_path / "work", *options, "--skip", *NEEDS_A_GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "work/summary.txt").read_text()
    assert "TensorRT for RTX 1.7.1" in summary and "plugin: no engine was built" in summary
    found = re.findall(r"^(ok|FAIL|not run) +(\S.*?)  +[\d.]+ s", summary, re.MULTILINE)
    assert found == [
        ("ok", "build float32 two standard"), ("ok", "validate float32 two standard"),
        ("ok", "check float32 two standard"),
    ]  # fmt: skip
    assert [call["capabilities"] for call in machine.calls] == [[89], [89]]
    assert "kernels are kept" in (tmp_path / "work/check-float32-two-standard.log").read_text()
    hopper = FakeRtx(tmp_path / "hopper", capability=[9, 0])
    done = engine_test(hopper, tmp_path / "work", "--runtime", "tensorrt-rtx")
    assert done.returncode == 1 and "TensorRT for RTX does not run on this GPU" in done.stderr
