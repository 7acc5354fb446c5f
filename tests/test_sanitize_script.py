"""What tests/gpu/sanitize.py and record.py make of what programs and compute-sanitizer say; both faked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_scripts import FOLDER, load


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


SANITIZER = """for word in "$@"; do
  case $word in */linear|*/attention|*/control|quick) set -- "$@" "$word";; esac
  shift
done
"$@"
"""
"""Runs what it is given, without its own options."""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """Programs that find nothing, and a compute-sanitizer that finds nothing."""
    for name in ("linear", "attention", "control"):
        program(tmp_path / name, 'echo "7 calls, 0 bad"')
    program(tmp_path / "compute-sanitizer", f'{SANITIZER}echo "ERROR SUMMARY: 0 errors"')
    return tmp_path


def sanitize(built: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / "sanitize.py", built / "library.so", "--built", built, *options]
    environment = os.environ | {"PATH": f"{built}:{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_both_kernels_run_bare_and_under_every_tool(built: Path) -> None:
    done = sanitize(built)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernels in ("linear", "attention"):
        for tool in ("no tool", "memcheck", "initcheck", "synccheck", "racecheck"):
            assert f"{kernels}, {tool}" in done.stdout
    assert done.stdout.endswith("no tool found anything\n")


@pytest.mark.parametrize("says", [
    'echo "ERROR SUMMARY: 1 error"; exit 9', 'echo "ERROR SUMMARY: 10 errors"', 'echo "no summary"', "exit 1",
    'echo "RACECHECK SUMMARY: 2 hazards displayed"',
])  # fmt: skip
def test_what_a_tool_finds_fails(built: Path, says: str) -> None:
    program(built / "compute-sanitizer", f"{SANITIZER}{says}")
    done = sanitize(built, "--kernels=linear", "--tools=memcheck")
    assert done.returncode == 1
    assert "failed: linear, memcheck" in done.stdout


@pytest.mark.parametrize("says", ['echo "7 calls, 1 bad"; exit 1', 'echo "7 calls, 1 bad"', "exit 0"])
def test_what_a_program_finds_fails_bare_and_under_a_tool(built: Path, says: str) -> None:
    program(built / "linear", says)
    done = sanitize(built, "--kernels=linear", "--tools=memcheck")
    assert done.returncode == 1
    assert "failed: linear, no tool; linear, memcheck" in done.stdout


def test_the_record_has_the_largest_errors_of_each_kernel() -> None:
    lines = load("record").largest_errors(
        "bounds: decode slice float16 output 0.25 state 0.5\n"
        "linear torch.float16 3 layer_norm 0.25\nlinear torch.float16 8 layer_norm 0.75\n"
        "linear torch.bfloat16 3 layer_norm 0.5\n"
    )
    assert lines[1:] == [
        "decode slice       float16       1 calls, output 0.25, state 0.50",
        "linear layer_norm  bfloat16      1 calls, output 0.50",
        "linear layer_norm  float16       2 calls, output 0.75",
    ]
