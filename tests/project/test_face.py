"""`import dijiang_engines as dj`: its names, lazily; and paths of modules that have moved."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import dijiang_engines as dj
from dijiang_engines import errors
from dijiang_engines.former_paths import FORMER


def imported_for_typing() -> dict[str, str]:
    """Name -> module, of what mypy and editors see."""
    tree = ast.parse(Path(dj.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_types_and_values_are_of_the_same_modules() -> None:
    assert imported_for_typing() == dj._MODULE_OF
    assert set(dj.__all__) == {*dj._MODULE_OF, "__version__"}
    assert set(dj.__all__) <= set(dir(dj))


@pytest.mark.parametrize("name", sorted(set(dj.__all__) - {"__version__"}))
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(dj, name)
    assert value is getattr(importlib.import_module(dj._MODULE_OF[name]), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)


def test_every_error_is_there() -> None:
    kinds = {n for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, errors.DijiangError)}
    assert kinds <= set(dj.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dj.nothing


def run(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import dijiang_engines; print(*(set(sys.modules) - before))"
    )
    allowed = {"dijiang_engines", "dijiang_engines.former_paths", "dijiang_engines.version"}
    assert {name for name in run(code).split() if name.startswith("dijiang")} == allowed
    assert not {"typing", "numpy", "tokenizers", "rich", "onnxruntime"} & set(run(code).split())


def test_a_program_that_generates_needs_one_import(sample_bundle: Path) -> None:
    code = f"""
import dijiang_engines as dj
model = dj.open_model({str(sample_bundle)!r})
generator = dj.Generator(dj.open_runner(model, "cpu", threads=1), dj.load_tokenizer(model))
for event in generator.start(["def main():"], dj.GenerateOptions(max_tokens=5)):
    print(event.text, end="")
"""
    assert run(code).strip()


@pytest.mark.parametrize("path", sorted((ROOT / "samples").glob("*.py")), ids=lambda path: path.name)
def test_samples_use_nothing_else(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("dijiang"), ast.unparse(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("dijiang")]
            assert names in ([], ["dijiang_engines"]), ast.unparse(node)


@pytest.mark.parametrize("former", sorted(FORMER))
def test_former_paths_work_with_a_warning(former: str) -> None:
    pytest.importorskip("torch" if former.startswith("dijiang_export") else "numpy")
    now = importlib.import_module(FORMER[former])
    name = next(n for n, v in vars(now).items() if getattr(v, "__module__", "") == FORMER[former])
    sys.modules.pop(former, None) if not hasattr(sys.modules.get(former), "__path__") else None
    with pytest.warns(DeprecationWarning, match=f"is now {FORMER[former]}.{name}"):
        assert getattr(importlib.import_module(former), name) is getattr(now, name)
    with pytest.raises(AttributeError):
        _ = importlib.import_module(former).nothing


def test_paths_that_never_were_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dijiang_engines.nothing")
