""".ci/setup_venv.py, which `make` runs before anything is installed: its decisions and its messages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT


class Commands:
    """Stands for `run`: remembers commands, and fails those that contain a word of `failing`."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.seen: list[list[str]] = []

    def __call__(self, *command: str, quiet: bool = False, cwd: str | None = None) -> bool:
        self.seen.append([str(word) for word in command])
        return not any(word in part for word in self.failing for part in self.seen[-1])


@pytest.fixture
def setup_venv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / ".ci/setup_venv.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, monkeypatch: pytest.MonkeyPatch, commands: Commands, *arguments: str) -> int:
    monkeypatch.setattr(module, "run", commands)
    monkeypatch.setattr(sys, "argv", ["setup_venv.py", *arguments])
    code = module.main()
    assert isinstance(code, int)
    return code


def test_it_installs_from_the_constraints(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = Commands()
    venv = str(tmp_path / "venv")
    assert call(setup_venv, monkeypatch, commands, "--venv", venv, "--torch-index", "https://index") == 0
    assert [sys.executable, "-m", "venv", "--clear", venv] in commands.seen
    installs = [command for command in commands.seen if "install" in command]
    assert [command[-1] for command in installs] == ["hatchling", f"{ROOT}[export,cpu,serve,dev]"]
    for command in installs:
        assert command[0] == f"{venv}/bin/python"
        assert command[command.index("--constraint") + 1] == str(ROOT / "constraints.txt")
        assert command[command.index("--extra-index-url") + 1] == "https://index"


def test_an_environment_that_works_is_kept(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.touch()
    commands = Commands()
    assert call(setup_venv, monkeypatch, commands, "--venv", str(tmp_path)) == 0
    assert not any("venv" in command for command in commands.seen)


def test_the_cpu_build_is_mentioned_only_where_it_matters(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for machine, index, mentioned in [
        ("x86_64", "", True),
        ("aarch64", "", False),
        ("x86_64", "https://x", False),
    ]:
        monkeypatch.setattr(setup_venv.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(setup_venv.platform, "system", lambda: "Linux")
        assert call(setup_venv, monkeypatch, Commands(), "--torch-index", index) == 0
        assert ("TORCH_INDEX=" in capsys.readouterr().out) is mentioned


def test_without_ensurepip_the_systems_wheel_is_used(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = Commands("import ensurepip")
    monkeypatch.setattr(setup_venv.glob, "glob", lambda pattern: ["/usr/share/python-wheels/pip-23-py3.whl"])
    assert call(setup_venv, monkeypatch, commands, "--venv", str(tmp_path / "v")) == 0
    assert [sys.executable, "-m", "venv", "--clear", "--without-pip", str(tmp_path / "v")] in commands.seen
    assert any(command[1] == "/usr/share/python-wheels/pip-23-py3.whl/pip" for command in commands.seen)


def test_a_machine_without_anything_gets_one_message(
    setup_venv: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(setup_venv.glob, "glob", lambda pattern: [])
    code = call(
        setup_venv, monkeypatch, Commands("import ensurepip", "apt-get"), "--venv", str(tmp_path / "v")
    )
    assert code == 1
    assert capsys.readouterr().err == (
        "error: this Python has neither pip nor ensurepip\n"
        "hint: apt-get install python3-venv, then run the command again\n"
    )


def test_an_old_python_is_refused(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    commands = Commands()
    assert call(setup_venv, monkeypatch, commands) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: Python 3.10 or newer is needed; ")
    assert "hint: install a newer one and name it: make PYTHON=python3.10" in err
    assert commands.seen == []


def test_a_failing_pip_is_reported(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(setup_venv, monkeypatch, Commands("--constraint")) == 1
    assert "error: pip could not install what is needed" in capsys.readouterr().err


def test_make_without_python_says_so(tmp_path: Path) -> None:
    import subprocess

    command = ["make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: there is no no-such-python\nhint: " in done.stderr
