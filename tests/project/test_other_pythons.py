"""What CI runs beside the suite: other Pythons, without PyTorch, and wheels that are fetched for tests."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f".ci/{name}.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


TESTS = """
import pytest
def test_passes(): pass
def test_needs_it_later():
    import {package}.part
def test_process_needs_it():
    import subprocess, sys
    done = subprocess.run([sys.executable, "-c", "import {package}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
@pytest.mark.skip
def test_skips(): pass
"""


def run_without(package: str, folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """pytest on a file, where `package` counts as one that only an export needs."""
    (folder / "conftest.py").write_text(
        "from support import without_export\n"
        f"without_export.ABSENT = ({package!r},)\n"
        "from support.without_export import pytest_pycollect_makemodule, pytest_runtest_makereport\n"
    )
    (folder / "test_one.py").write_text(text.format(package=package))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")}, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


def test_what_needs_an_absent_package_skips(tmp_path: Path) -> None:
    done = run_without("absent_one", tmp_path, TESTS)
    assert done.returncode == 0 and "1 passed, 3 skipped" in done.stdout, done.stdout
    assert "absent_one is not installed" in done.stdout


def test_a_file_that_imports_it_skips(tmp_path: Path) -> None:
    done = run_without("absent_one", tmp_path, "import {package}\n" + TESTS)
    assert "1 skipped" in done.stdout and "passed" not in done.stdout, done.stdout


@pytest.mark.parametrize("text", ["import absent_two\n", "def test_one():\n    import absent_two\n"])
def test_any_other_absent_package_is_an_error(text: str, tmp_path: Path) -> None:
    done = run_without("absent_one", tmp_path, text)
    assert done.returncode not in (0, 5), done.stdout


def test_an_import_of_the_engines_is_an_error(tmp_path: Path) -> None:
    """They must run without."""
    package = tmp_path / "dijiang_engines"
    package.mkdir()
    (package / "needy.py").write_text("def use():\n    import absent_one\n")
    path = f"import sys\nsys.path.insert(0, {str(package)!r})\nimport needy\n"
    inside = path + "def test_one():\n    needy.use()\n"
    code = f"{path}needy.use()"
    outside = f"import subprocess, sys\ndef test_two():\n    c = [sys.executable, '-c', {code!r}]\n"
    outside += "    done = subprocess.run(c, capture_output=True, text=True)\n    assert not done.stderr\n"
    done = run_without("absent_one", tmp_path, (inside + outside).replace("{", "{{").replace("}", "}}"))
    assert "2 failed" in done.stdout, done.stdout


def options(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    values = {"folder": tmp_path, "wheel": tmp_path / "a.whl", "bundle": None, "least": 2, "pytest": []}
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize(
    ("tests", "failures", "errors", "skipped", "status", "error"),
    [
        (4, 0, 0, 1, 0, ""),
        (4, 0, 0, 3, 0, "only 1 tests passed, 2 are expected"),
        (4, 1, 0, 0, 1, "pytest ended with 1"),
        (0, 0, 0, 0, 5, "pytest ended with 5"),
    ],
)
def test_what_counts_as_tested(
    tests: int, failures: int, errors: int, skipped: int, status: int, error: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Too few that passed is a failure, whatever pytest says."""
    pythons = script("test_pythons")

    def fake(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        junit = next(str(part) for part in command if str(part).startswith("--junitxml=")).partition("=")[2]
        counts = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
        Path(junit).write_text(f"<testsuites><testsuite {counts}/></testsuites>")
        return subprocess.CompletedProcess(command, status, "what pytest printed")

    monkeypatch.setattr(pythons, "make_environment", lambda *_: Path("python"))
    monkeypatch.setattr(pythons.subprocess, "run", fake)
    outcome = pythons.test("3.12", Path("python3.12"), options(tmp_path))
    assert outcome.error == error and outcome.passed == tests - failures - errors - skipped


def test_what_is_left_out_is_there() -> None:
    """Else a test that was renamed would be run by all versions again, unnoticed."""
    pythons = script("test_pythons")
    options = pythons.left_out(pythons.INDEPENDENT.read_text())
    assert len(options) > 5
    for option in options:
        kind, name = option.split("=")
        file, _, test = name.partition("::")
        assert (kind == "--deselect") == bool(test)
        assert f"\ndef {test}(" in (ROOT / file).read_text() if test else (ROOT / file).exists(), name


def test_what_leaves_a_test_out_has_a_reason() -> None:
    """A comment of its own above each group of names."""
    text = (ROOT / ".ci/python-independent.txt").read_text()
    for group in text.split("\n\n")[1:]:
        assert group.startswith("# ") and "\ntests/" in group, group


def test_options_that_leave_out() -> None:
    left_out = script("test_pythons").left_out
    text = "# why\ntests/a.py\n\ntests/b.py::test_one  # more\n"
    assert left_out(text) == ["--ignore=tests/a.py", "--deselect=tests/b.py::test_one"]


@pytest.mark.parametrize(("require", "status"), [([], 0), (["--require"], 1)])
def test_a_version_that_is_not_here(
    require: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pythons = script("test_pythons")
    monkeypatch.setattr(
        sys, "argv", ["x", "--folder", str(tmp_path), "--wheel", "a", "--least", "1", *require, "3.99"]
    )
    assert pythons.main() == status
    assert "there is no Python 3.99 here: not tested" in capsys.readouterr().out


def test_a_python_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyenv puts a python3.12 on the path that only says that it is not there."""
    pythons = script("test_pythons")
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.99: command not found'\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    assert pythons.find_python("3.99") is None
    installed = tmp_path / "pyenv/versions/3.99.1/bin/python"
    installed.parent.mkdir(parents=True)
    installed.write_text("#!/bin/sh\necho 3.99\n")
    installed.chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert pythons.find_python("3.99") == installed


def test_wheels_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = script("fetch_wheels")
    wanted = wheels.requirements((ROOT / ".ci/tensorrt-wheels.txt").read_text())
    assert len(wanted) > 8 and all("==" in line for line in wanted)
    asked: list[str] = []
    monkeypatch.setattr(wheels, "fetch", lambda line, folder: bool(asked.append(line)) or "bad" not in line)
    (tmp_path / "list.txt").write_text("# two\na_b==1.0; python_version < '4'\n\nbad==2\n")
    (tmp_path / "a_b-1.0-py3-none-any.whl").touch()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--list", str(tmp_path / "list.txt")])
    assert wheels.main() == 1
    assert asked == ["bad==2"]
