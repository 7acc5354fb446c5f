"""Modules that run in a Python process of their own: which there are, and what reaches them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.paths import ROOT

from dijiang_engines.fresh_interpreter import command_for

SOURCES = [p for package in ("engines", "exporter") for p in sorted((ROOT / package).rglob("*.py"))]


def nodes_of(word: str) -> list[tuple[Path, ast.AST]]:
    """All of the files of both packages in which a word stands; reading every file's tree takes seconds."""
    texts = [(path, path.read_text()) for path in SOURCES]
    found = [(path, ast.parse(text)) for path, text in texts if word in text]
    return [(path, node) for path, tree in found for node in ast.walk(tree)]


def calls(name: str) -> list[ast.Call]:
    """Calls of a function of that name in both packages."""
    nodes = [node for _, node in nodes_of(name)]
    return [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]


def programs() -> list[str]:
    names = [call.args[0] for call in calls("command_for")]
    return sorted({name.value for name in names if isinstance(name, ast.Constant)})


def test_every_program_that_is_started_is_named_in_full() -> None:
    assert all(isinstance(call.args[0], ast.Constant) for call in calls("command_for"))
    assert len(programs()) >= 7


@pytest.mark.parametrize("name", programs())
def test_every_program_is_a_module_with_a_main(name: str) -> None:
    module = import_module(name)
    assert callable(module.main)
    assert module.main.__code__.co_argcount == 0


def test_no_program_is_kept_as_a_string() -> None:
    """`python -c TEXT`: no linter and no type checker reads such a text."""
    for path, node in nodes_of("executable"):
        if isinstance(node, ast.List | ast.Tuple) and "sys.executable" in ast.unparse(node):
            words = [word.value for word in node.elts if isinstance(word, ast.Constant)]
            assert "-c" not in words, f"{path}:{node.lineno}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs on the search path."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_arguments_the_search_path_and_the_exit_code(here: Path) -> None:
    (here / "echo.py").write_text(
        "import json, sys\n\n"
        "def main():\n    print(json.dumps([sys.argv, sys.path, __name__]))\n    return 7\n"
    )
    done = subprocess.run(command_for("echo", "a b", "-c"), capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    argv, path, name = json.loads(done.stdout)
    assert argv == [str(here / "echo.py"), "a b", "-c"]
    assert path == sys.path
    assert name == "echo"


def test_what_it_starts_itself_keeps_its_own_environment(here: Path) -> None:
    (here / "shown.py").write_text("import os\n\ndef main():\n    print(dict(os.environ))\n")
    done = subprocess.run(command_for("shown"), capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout).get("PYTHONPATH") == os.environ.get("PYTHONPATH")


@pytest.mark.parametrize("name", [name for name in programs() if name.startswith("dijiang_engines")])
def test_nothing_is_imported_from_the_current_folder(name: str, tmp_path: Path) -> None:
    """Which may be an unpacked download."""
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close()"
    for module in ("json", "numpy", "onnxruntime", "tensorrt", "polygraphy", "ctypes"):
        (tmp_path / f"{module}.py").write_text(trap)
    for package in ("dijiang_engines", "dijiang_export"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(trap)
    subprocess.run(
        command_for(name),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert not (tmp_path / "sprung").exists()
