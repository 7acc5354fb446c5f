"""tests/gpu/ort_threads.py as far as a CPU goes, so that it works, and can fail, when a GPU is at hand.

The sessions here only keep CUDA's rule for captures in global mode: this proves orchestration, never CUDA.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ort_cuda import FakeCuda, GraphSession

from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.runners.onnxruntime.runner import CUDA

SCRIPTS = Path(__file__).parent / "gpu"
sys.path.insert(0, str(SCRIPTS))

from ort_threads import ThreadChecks, Work, differences, run_checks  # noqa: E402


class GlobalCapture(FakeCuda):
    """A capture that fails if any other thread's call is under way, as in CUDA's global mode (error 900)."""

    here = threading.Lock()
    running = 0
    spoiled = False

    def _call(self, session: Any, binding: Any, options: Any) -> None:
        kind = GlobalCapture
        captures = isinstance(session, GraphSession) and (
            options.get_run_config_entry("gpu_graph_id") not in ("-1", *session._captured)
        )
        with kind.here:
            kind.running += 1
            kind.spoiled = kind.running > 1 if captures else kind.spoiled or kind.running > 1
        try:
            super()._call(session, binding, options)
        finally:
            with kind.here:
                kind.running -= 1
                spoiled = kind.spoiled
        if captures and spoiled:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")


@pytest.fixture(scope="module")
def bundle(variants: Path) -> Bundle:
    return open_bundle(variants)


def checks(bundle: Bundle, *, lock: bool, threads: int = 3) -> ThreadChecks:
    def make(lowering: str) -> FakeCuda:
        runner = GlobalCapture(bundle, CUDA, lowering=lowering)  # type: ignore[arg-type]
        if not lock:
            runner.alone = nullcontext()
        return runner

    return ThreadChecks(make, ["ort-step", "capture"], threads=threads, rounds=1, steps=2)


def test_threads_that_take_turns_agree(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    one = checks(bundle, lock=True)
    assert run_checks(one, None) == 0, capsys.readouterr().out
    found = one.facts["found"]
    assert set(found) == {"own runners", "one runner, ort-step", "one runner, capture", "mixed"}
    assert all(fact["inside_at_once"] == 1 and fact["captured"] > 0 for fact in found.values())


def test_threads_that_do_not_take_turns_are_found_out(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: without the lock, captures are spoiled, and the script says so."""
    assert run_checks(checks(bundle, lock=False), None) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "not all right"
    assert any("900" in line for line in lines if line.startswith("FAIL"))


def test_a_wrong_bit_is_found(bundle: Bundle) -> None:
    work = Work(3, 2, 2)
    runner = FakeCuda(bundle, CUDA)
    found = work.run(runner)
    assert differences(found, work.run(runner)) is None
    other = [array.copy() for array in found]
    other[-1].reshape(-1).view(np.uint32)[0] ^= 1
    assert str(differences(other, found)).startswith(f"result {len(found) - 1} ")
    assert "instead of" in str(differences(found[:-1], found))
    assert differences(found, Work(4, 2, 2).run(runner)) is not None


def test_the_command_on_a_cpu(variants: Path, tmp_path: Path) -> None:
    saved = tmp_path / "r.json"
    command = [
        sys.executable, str(SCRIPTS / "ort_threads.py"), str(variants), "--runner", "onnxruntime-cpu",
        "--threads", "3", "--rounds", "1", "--steps", "2", "--save", str(saved),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all right"
    record = json.loads(saved.read_text())
    assert record["machine"]["onnxruntime"]
    assert "ort_threads.py" in record["machine"]["command"]
    assert len(record["checks"]) == 5
