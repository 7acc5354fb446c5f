"""Which module imports which: downward only, in the order that docs/architecture.md states, and in no circle.

Every import counts: at the top, inside functions, and for type checkers alone.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

SOURCES = {
    name: ROOT / side / name
    for side, name in (("engines", "dijiang_engines"), ("exporter", "dijiang_export"))
}
MOST_FILES = 20
"""On one floor of a package."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of both packages."""
    found = {}
    for name, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(p for p in parts if p != "__init__")))] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of this project that a module names in any import statement."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules() else str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return frozenset((found & set(modules())) - {module})


@cache
def order() -> dict[str, int]:
    """Module or folder -> its layer, from the table in docs/architecture.md, lowest first."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^## Who may import whom$.*?^```text$(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert table is not None
    layers: dict[str, int] = {}
    for number, line in enumerate(table[1].strip().splitlines()):
        package, *names = line.split()
        layers |= {f"{SHORT[package]}.{name.rstrip('/')}": number for name in names}
    return layers


SHORT = {"engines": "dijiang_engines", "exporter": "dijiang_export"}


def layer(module: str) -> str:
    """The entry of the table that a module is under."""
    parts = module.split(".")
    return next((name for n in (3, 2) if (name := ".".join(parts[:n])) in order()), "")


def of_a_layer() -> list[str]:
    return sorted(set(modules()) - {*SOURCES, "dijiang_export.__main__"})


def test_the_table_has_every_module_and_nothing_else() -> None:
    assert [module for module in of_a_layer() if not layer(module)] == []
    unused = set(order()) - {layer(module) for module in of_a_layer()}
    assert not unused


@pytest.mark.parametrize("module", of_a_layer())
def test_imports_point_down(module: str) -> None:
    for other in imports(module):
        assert other not in SOURCES, f"{module} imports {other}: name the module that has it"
        here, there = order()[layer(module)], order()[layer(other)]
        assert there < here or layer(other) == layer(module), (
            f"{module} imports {other}, which is not below it"
        )


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("top", ["engines", "exporter", "plugins", "tests"])
def test_no_floor_is_crowded(top: str) -> None:
    folders = [folder for folder in (ROOT / top).rglob("*") if folder.is_dir()]
    for folder in [ROOT / top, *folders]:
        files = [path for path in folder.glob("*") if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")]
        assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} has {len(files)} files"
