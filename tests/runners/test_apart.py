"""Runners are taken apart: parts use each other's public names only, and a call is checked in one place."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from dijiang_engines import runners
from dijiang_engines.runners import registry
from dijiang_engines.runners.base import Runner
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.openvino.runner import OvRunner
from dijiang_engines.runners.tensorrt.decoder import TensorRTDecoder
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner

FOLDER = Path(runners.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
CALLS = (
    "new_state",
    "prefill",
    "step",
    "export_state",
    "import_state",
    "reset_rows",
    "get_rows",
    "put_rows",
    "copy_rows",
)
"""What callers of a runner call with arguments of their own."""
LONGEST = 300
"""Lines of a runner.py."""


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private attributes of anything but `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls"):
                yield f"{owner}.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_nothing_private_is_used_from_outside(path: Path) -> None:
    assert list(private_uses(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_only_the_registry_imports_a_runner(path: Path) -> None:
    """State, sessions, contexts and decoder do not know the runner that uses them."""
    if path.name == "registry.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in imported if module and module.endswith(".runner")}


def test_runners_are_short() -> None:
    for path in FOLDER.rglob("runner.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST, path


def test_the_decoder_gets_contexts() -> None:
    assert next(iter(inspect.signature(TensorRTDecoder).parameters)) == "contexts"


@pytest.mark.parametrize("kind", [OrtRunner, OvRunner, TensorRTRunner])
def test_calls_are_checked_before_all_else(kind: type[Runner]) -> None:
    """Each call begins with a check of checks.py, and a runner raises nothing about a call itself."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(kind)))  # type: ignore[arg-type]
    methods = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name in CALLS:
        _, first, *_ = methods[name].body  # after the docstring
        assert "check_" in ast.unparse(first), (kind, name)
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    assert raised == []


def test_every_runner_has_a_line_in_the_table() -> None:
    """And a folder, which its line imports."""
    assert tuple(registry.TABLE) == registry.RUNNERS == tuple(registry.OPTIONS)
    folders = {path.parent.name for path in FOLDER.glob("*/runner.py")}
    opened = {
        module.split(".")[2]
        for entry in registry.TABLE.values()
        for node in ast.walk(ast.parse(inspect.getsource(entry.open)))
        if isinstance(node, ast.ImportFrom) and (module := str(node.module)).endswith(".runner")
    }
    assert folders == opened
