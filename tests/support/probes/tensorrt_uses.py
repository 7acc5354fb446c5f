"""Which modules of the engines use TensorRT, and what of it they name, as their source says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "dijiang_engines"
MODULE = "trt"
"""What the code calls the module tensorrt, wherever it has it."""

OTHER_VERSIONS = {
    "building.typed_network.type_network": "8.6",
    "building.plugin_layers._create_v3": "10 and 11",
    "building.ahead": "RTX",
    "runners.tensorrt.rtx": "RTX",
}
"""Functions, and whole modules, that run with that dialect alone."""
NOT_OF_RTX = (
    "building.worker", "building.plugin_products", "building.product_layers", "building.step_graph",
    "building.typed_network", "building.plugin_layers", "building.step.one_launch",
)  # fmt: skip
"""Modules, or what of them uses TensorRT, that TensorRT for RTX does without: it builds in building.ahead."""


def modules(engines: Path) -> dict[str, ast.Module]:
    """Every module that uses `trt` or is called after TensorRT, by its dotted name in the package.

    Args:
        engines: the folder that holds the package.
    """
    found = {}
    for path in sorted((engines / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(engines / PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if _uses(tree) or "tensorrt" in name:
            found[name] = tree
    return found


def users(engines: Path) -> set[str]:
    """Those that use `trt` themselves."""
    return {name for name, tree in modules(engines).items() if _uses(tree)}


def _uses(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.Name) and node.id == MODULE)
        or (isinstance(node, ast.Attribute) and node.attr == MODULE)
        for node in ast.walk(tree)
    )


@dataclass
class Names:
    """What one check found."""

    used: set[str] = field(default_factory=set)
    """"Class.member" of everything that is there."""
    missing: list[str] = field(default_factory=list)


def check_names(trt: Any, engines: Path, dialect: str) -> Names:
    """Every `trt.A.B` that the code names is there, unless it asks first or is for another version.

    Args:
        trt: the real bindings.
        engines: the folder that holds the package.
        dialect: of this version, as tensorrt_versions.Dialect.name.
    """
    found = Names()
    for name, tree in modules(engines).items():
        if OTHER_VERSIONS.get(name, dialect) != dialect or (dialect == "RTX" and name in NOT_OF_RTX):
            continue
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.FunctionDef):
                only = OTHER_VERSIONS.get(f"{name}.{node.name}", dialect)
                if only != dialect:
                    node.body = [ast.Pass()]
        _check_module(trt, name, tree, found)
    return found


def _check_module(trt: Any, name: str, tree: ast.Module, found: Names) -> None:
    asked = _asked(tree)
    for chain in sorted(set(_chains(tree))):
        parts = chain.split(".")
        value: Any = trt
        for part in parts:
            value = getattr(value, part, None)
        if value is not None:
            found.used.add(chain)
            found.missing += [
                f"{name}: {chain} calls no {method}"
                for method in _overridden(tree, chain)
                if not hasattr(value, method)
            ]
        elif parts[0] not in asked:
            found.missing.append(f"{name}: {MODULE}.{chain}")


def _chains(tree: ast.Module) -> Iterator[str]:
    """ "A.B" of every trt.A.B, and of self.tensorrt.trt.A.B."""
    for node in ast.walk(tree):
        parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if MODULE in parts[:-1] and all(part.isidentifier() for part in parts):
            yield ".".join(parts[parts.index(MODULE) + 1 :])


def _asked(tree: ast.Module) -> set[Any]:
    """Names that the code asks for with hasattr or getattr."""
    return {
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr") and isinstance(node.args[1], ast.Constant)
    }  # fmt: skip


def _overridden(tree: ast.Module, chain: str) -> set[str]:
    """Public methods of the classes that are derived from trt.<chain>: TensorRT is to call them."""
    return {
        part.name
        for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
        for base in node.bases if ast.unparse(base).endswith(f"{MODULE}.{chain}")
        for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")
    }  # fmt: skip
