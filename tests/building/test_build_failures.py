"""build-engine where it cannot work: what is missing, too little memory, failures, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import tensorrt as fake_tensorrt
from support.fakes.tensorrt import FakeMachine
from support.makers.engine_folders import build, visible
from support.makers.toy_bundle import make_bundle

from dijiang_engines.building.lock import only_builder
from dijiang_engines.building.memory import HOST_BASE, check_memory, estimate_memory
from dijiang_engines.building.recipes import load_recipe
from dijiang_engines.errors import (
    OutputError,
    PluginError,
    RunnerError,
    ValidationMismatch,
)  # fmt: skip
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.nvidia.cuda import DeviceFacts

Export = Callable[..., tuple[Path, Any]]


@pytest.fixture
def bundle(exported: Export) -> Path:
    return exported()[0]


# The machine


def run(
    machine: FakeMachine | None, *arguments: object, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which importing any of `without` fails."""
    block = f"import sys\nfor name in {without!r}: sys.modules[name] = None\n"
    environment = os.environ | ({} if machine is None else machine.environment)
    code = block + "from dijiang_export.cli import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "build-engine", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (("cuda", "cuda.bindings", "cuda.bindings.runtime"), "cuda-bindings is not installed"),
        (("tensorrt",), "tensorrt is not installed"),
    ],
)
def test_what_is_not_installed(bundle: Path, tmp_path: Path, without: tuple[str, ...], words: str) -> None:
    options = ("-o", tmp_path / "e", "--runtime", "tensorrt")
    done = run(FakeMachine(tmp_path / "machine"), bundle, *options, without=without)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr.splitlines()[0]
    assert done.stderr.splitlines()[-1].startswith("hint: ") and "Traceback" not in done.stderr
    assert visible(tmp_path) == []


def test_polygraphy_is_not_installed(bundle: Path, tmp_path: Path) -> None:
    """The builder's process is where that is seen."""
    machine = FakeMachine(tmp_path / "machine")
    path = machine.site / "polygraphy/backend/trt/__init__.py"
    path.write_text("raise ModuleNotFoundError(\"No module named 'polygraphy'\", name='polygraphy')")
    with pytest.raises(RunnerError, match="polygraphy is not installed") as info:
        build(machine, bundle, tmp_path / "e")
    assert "dijiang-export[tensorrt]" in str(info.value.hint)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"gpus": 0}, RunnerError, "no NVIDIA GPU"),
        ({"tensorrt": "9.2.0"}, RunnerError, "not supported"),
        ({"registers": False}, PluginError, "did not register itself"),
    ],
)
def test_a_machine_that_cannot(
    bundle: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    if "tensorrt" in settings:
        machine = FakeMachine(tmp_path / "machine")
        machine.settings |= settings
        fake_tensorrt._PREVIEW.setdefault(9, [])
    else:
        machine = FakeMachine(tmp_path / "machine", **settings)
    with pytest.raises(error, match=words):
        build(machine, bundle, tmp_path / "e")
    assert machine.calls == [] and visible(tmp_path) == []


def test_no_such_gpu(bundle: Path, tmp_path: Path) -> None:
    done = run(FakeMachine(tmp_path / "machine"), bundle, "-o", tmp_path / "e", "--device", "3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no such GPU\n  got: GPU 3 of 1\nhint: ")


# Memory


def facts(**changes: Any) -> DeviceFacts:
    return replace(DeviceFacts(0, "Test", 90, 16 << 30, 16 << 30, "12.8", "12.6", False), **changes)


def test_a_gpu_that_is_too_small(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(tmp_path / "machine", free=1 << 30, total=2 << 30)
    with pytest.raises(RunnerError, match="the GPU has too little free memory") as info:
        build(machine, bundle, tmp_path / "e")
    for option in ("--max-length", "--max-batch", "--workspace", "--ignore-memory"):
        assert option in str(info.value.hint)
    assert info.value.got == "1.1 GB free of 2.1" and "GB" in str(info.value.expected)
    assert machine.calls == [] and visible(tmp_path) == []
    build(machine, bundle, tmp_path / "e", check_estimate=False, validate=False)
    assert len(machine.calls) == 1


def test_a_host_that_is_too_small(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = estimate_memory(open_bundle(bundle), load_recipe("datacenter"))
    monkeypatch.setattr("dijiang_engines.building.memory.available_memory", lambda: 1 << 30)
    with pytest.raises(RunnerError, match="the host has too little free memory") as info:
        check_memory(estimate, facts())
    assert "swap" in str(info.value.hint)


def test_a_board_shares_its_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPU and CPU need adds up there."""
    estimate = estimate_memory(open_bundle(bundle), load_recipe("jetson-orin"))
    need = estimate.device + estimate.host - HOST_BASE
    board = facts(integrated=True, free_bytes=1)
    monkeypatch.setattr("dijiang_engines.building.memory.available_memory", lambda: need)
    check_memory(estimate, board)
    monkeypatch.setattr("dijiang_engines.building.memory.available_memory", lambda: need - 1)
    with pytest.raises(RunnerError, match="this board has too little free memory") as info:
        check_memory(estimate, board)
    assert "swap" in str(info.value.hint) and "--max-length" in str(info.value.hint)


def test_the_estimate_follows_what_is_asked_for(tmp_path: Path) -> None:
    for logits in ("last", "all"):
        make_bundle(tmp_path / logits, logits=logits)
    last, every = (open_bundle(tmp_path / logits) for logits in ("last", "all"))
    recipe = load_recipe("datacenter")
    usual = estimate_memory(last, recipe)
    assert estimate_memory(last, recipe.with_changes(max_length=64)).device < usual.device
    assert estimate_memory(last, recipe.with_changes(max_batch=1)).device < usual.device
    assert estimate_memory(last, recipe.with_changes(workspace_mb=2048)).device == usual.device + (1 << 30)
    assert estimate_memory(every, recipe).device > usual.device
    assert "GB on the GPU" in usual.text(True) and "GPU" not in usual.text(False)


# The builder fails


@pytest.mark.parametrize(
    ("way", "words", "hint"),
    [
        ("fails:10: Could not find any implementation for node", "could not build the engine", "verbose"),
        ("fails:2: Error Code 2: OutOfMemory (no further information)", "could not build", "--workspace"),
        ("killed", "the builder's process died", "host memory ran out"),
        ("aborts", "the builder's process died", "build-engine.log"),
        ("memory", "ran out of host memory", "build-engine.log"),
    ],
)
def test_a_build_that_fails_leaves_nothing(
    bundle: Path, tmp_path: Path, way: str, words: str, hint: str
) -> None:
    machine = FakeMachine(tmp_path / "machine", builder=way)
    with pytest.raises(RunnerError, match=words) as info:
        build(machine, bundle, tmp_path / "e")
    assert hint in str(info.value.hint)
    kind, _, said = way.partition(":")
    assert said in str(info.value.got) or kind == "memory"
    assert kind not in ("killed", "aborts") or str(info.value.got).startswith("signal ")
    assert visible(tmp_path) == []


def test_a_failed_build_keeps_the_old_engine(bundle: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine")
    build(machine, bundle, tmp_path / "e", validate=False)
    before = (tmp_path / "e/engine.json").read_bytes()
    with pytest.raises(OutputError, match="already exists"):
        build(machine, bundle, tmp_path / "e")
    machine.settings["builder"] = "killed"
    with pytest.raises(RunnerError, match="died"):
        build(machine, bundle, tmp_path / "e", force=True)
    assert (tmp_path / "e/engine.json").read_bytes() == before
    open_engine(tmp_path / "e")
    assert visible(tmp_path) == ["e"]


def test_an_engine_that_computes_something_else_is_not_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fake_tensorrt._run

    def wrong(facts: Any, integers: str, shapes: Any, addresses: dict[str, int]) -> None:
        original(facts, integers, shapes, addresses)
        place = addresses["present.1.recurrent_state"]
        state = fake_tensorrt.fake_cuda.DEVICE.read(place, (1,), np.float32)
        fake_tensorrt.fake_cuda.DEVICE.write(place, state * np.float32(np.nan))

    monkeypatch.setattr(fake_tensorrt, "_run", wrong)
    with pytest.raises(ValidationMismatch, match=r"checks on tensorrt failed; first: .*layer 1"):
        build(FakeMachine(tmp_path / "machine"), bundle, tmp_path / "e")
    assert visible(tmp_path) == []


def test_a_place_that_cannot_be_written_to(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file/e"):
        with pytest.raises(OutputError):
            build(FakeMachine(tmp_path / "machine"), bundle, target)
    assert visible(tmp_path) == ["file"]


# Two at once, and none to the end


def test_two_processes_and_one_folder(bundle: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine")
    with (
        only_builder(tmp_path / "e"),
        pytest.raises(OutputError, match="another process is building") as info,
    ):
        build(machine, bundle, tmp_path / "e")
    assert "wait for it" in str(info.value.hint) and machine.calls == []
    build(machine, bundle, tmp_path / "e", validate=False)
    assert visible(tmp_path) == ["e"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Not even the builder's process, which Ctrl-C does not reach. Meanwhile nobody else may build."""
    note = tmp_path / "machine/builder"
    machine = FakeMachine(tmp_path / "machine", builder=f"hangs:{note}")
    command = [sys.executable, "-m", "dijiang_export", "build-engine", str(bundle), "-o", str(tmp_path / "e")]
    process = subprocess.Popen(
        command,
        env=os.environ | machine.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        builder = int(wait_for(lambda: note.exists() and note.read_text()))
        assert any(".e.dijiang-tmp" in name for name in visible(tmp_path))
        second = run(machine, bundle, "-o", tmp_path / "e")
        assert second.returncode == 1 and "another process is building" in second.stderr
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number and out == "" and "Traceback" not in err
    wait_for(lambda: not Path(f"/proc/{builder}").exists())
    assert visible(tmp_path) == []


def wait_for(condition: Callable[[], Any]) -> Any:
    for _ in range(400):
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come about")
