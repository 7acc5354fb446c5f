"""Run the tests that need no PyTorch on other versions of Python: `make test-pythons`.

For each version: an environment of its own with the package's wheel, ONNX Runtime and pytest, in the versions
of constraints.txt, and the tests with it. Without PyTorch most tests of the exporter skip, and say so
(tests/support/without_export.py); so many others must pass that a mistake in that would show. Tests whose
outcome no version of Python can change are left out: python-independent.txt names them, with reasons.
Environments are made while another's tests run; the tests of one version have all cores.
Standard library and pip only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("pytest", "pytest-xdist", "hypothesis", "onnx", "onnx-ir")
"""For the tests, besides what the package brings; onnx makes toy bundles."""


INDEPENDENT = Path(__file__).with_name("python-independent.txt")
TESTING = threading.Lock()
"""Held while one version's tests run: more at a time would only share the cores."""


@dataclass
class Outcome:
    """Of one version."""

    version: str
    passed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    error: str = ""
    output: str = ""


def find_python(version: str) -> Path | None:
    """python3.X on the path, or the newest of pyenv's."""
    named = shutil.which(f"python{version}")
    if named is not None and _runs(Path(named), version):
        return Path(named)
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = sorted(
        root.glob(f"versions/{version}.*/bin/python"), key=lambda path: _numbers(path.parents[1].name)
    )
    return next((path for path in reversed(found) if _runs(path, version)), None)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".") if part.isdigit()]


def _runs(python: Path, version: str) -> bool:
    command = [python, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() == version  # pyenv's shims are there for versions that are not


def make_environment(python: Path, folder: Path, wheel: Path) -> Path:
    """A fresh environment; its Python.

    Raises:
        subprocess.CalledProcessError: something cannot be installed.
    """
    run(python, "-m", "venv", "--clear", folder)
    inside = folder / "bin/python"
    pip: list[str | Path] = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints: list[str | Path] = ["--constraint", ROOT / "constraints.txt"]
    run(*pip, "--only-binary=:all:", *constraints, f"{wheel}[cpu,serve]", *NEEDED)
    return inside


def left_out(text: str) -> list[str]:
    """pytest's options that leave out the files and tests that such a list names, one a line."""
    names = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [f"--{'deselect' if '::' in name else 'ignore'}={name}" for name in names if name]


def run(*command: str | Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
    return done.stdout


def test(version: str, python: Path, options: argparse.Namespace) -> Outcome:
    """Install and run the tests with one version."""
    started = time.perf_counter()
    outcome = Outcome(version)
    results = options.folder / f"{version}.xml"
    results.unlink(missing_ok=True)
    try:
        inside = make_environment(python, options.folder / version, options.wheel)
        command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        command += ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
        command += ["-m", "not slow", "--basetemp", options.folder / f"tmp-{version}"]
        command += [*left_out(INDEPENDENT.read_text(encoding="utf-8")), *options.pytest]
        with TESTING:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(options), text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        outcome.output = done.stdout
        if done.returncode != 0:
            outcome.error = f"pytest ended with {done.returncode}"
    except subprocess.CalledProcessError as error:
        outcome.error, outcome.output = f"{error.cmd[1:4]} failed", error.output
    if results.is_file():
        count(results, outcome)
    if not outcome.error and outcome.passed < options.least:
        outcome.error = f"only {outcome.passed} tests passed, {options.least} are expected"
    outcome.seconds = time.perf_counter() - started
    return outcome


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What the tests' process gets."""
    variables = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "DIJIANG_TENSORRT_BINDINGS")}
    if options.bundle is not None:
        variables["DIJIANG_SAMPLE_BUNDLE"] = str(options.bundle.resolve())
    # Kernels do not depend on the version of Python, and are tested with the whole suite.
    fewer = {"DIJIANG_TEST_COMPILE": "0"}
    # Threads that spin while they wait would take the cores of other tests.
    return variables | fewer | {"OMP_NUM_THREADS": "1", "DIJIANG_SPINNING": "off"}


def count(results: Path, outcome: Outcome) -> None:
    """Passed and skipped tests of a JUnit file that pytest wrote."""
    suite = ET.parse(results).getroot()[0]
    total, others = (
        int(suite.attrib["tests"]),
        [int(suite.attrib[n]) for n in ("failures", "errors", "skipped")],
    )
    outcome.passed, outcome.skipped = total - sum(others), others[-1]


def main() -> int:
    """All versions; 1 if one fails, or is required and not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("versions", nargs="+", help="such as 3.12")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/pythons")
    parser.add_argument("--wheel", type=Path, required=True, help="of the package")
    parser.add_argument("--bundle", type=Path, help="the sample, exported where PyTorch is")
    parser.add_argument("--least", type=int, required=True, help="tests that must pass")
    parser.add_argument("--require", action="store_true", help="fail if a version is not installed")
    parser.add_argument("--pytest", action="append", default=[], help="one more argument for pytest")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {version: find_python(version) for version in options.versions}
    absent = [version for version, python in found.items() if python is None]
    for version in absent:
        print(f"there is no Python {version} here: not tested", flush=True)
    with ThreadPoolExecutor(len(found)) as pool:
        jobs = [pool.submit(test, version, python, options) for version, python in found.items() if python]
        outcomes = [job.result() for job in jobs]
    for outcome in outcomes:
        if outcome.error:
            print(outcome.output)
        result = outcome.error or "ok"
        print(
            f"Python {outcome.version}: {outcome.passed} passed, {outcome.skipped} skipped, "
            f"{outcome.seconds:.0f} s, {result}"
        )
    failed = any(outcome.error for outcome in outcomes)
    return 1 if failed or (absent and options.require) else 0


if __name__ == "__main__":
    sys.exit(main())
