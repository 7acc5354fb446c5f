"""docs/architecture.md is complete: its tree has every module, and its walk every one that the walk loads."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

PACKAGES = {"dijiang_engines": ROOT / "engines", "dijiang_export": ROOT / "exporter"}


@cache
def page() -> str:
    return (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page(), re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def tree() -> list[str]:
    """Paths that the tree names: each line a folder or a module, two blanks, and what it is."""
    found: list[str] = []
    folders = [(-1, "")]
    for line in section("Where things are").split("```text\n")[1].split("```")[0].splitlines():
        name, _, about = line.strip().partition("  ")
        assert about.strip(), f"{name}: nothing is said about it"
        depth = len(line) - len(line.lstrip())
        while folders[-1][0] >= depth:
            folders.pop()
        if name.endswith("/"):
            folders.append((depth, folders[-1][1] + name))
        else:
            found.append(f"{folders[-1][1]}{name}.py")
    return found


def test_the_tree_has_every_module_once() -> None:
    files = {
        str(path.relative_to(ROOT))
        for package, side in PACKAGES.items()
        for path in (side / package).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert sorted(tree()) == sorted(files)


def loaded(code: str, *arguments: str | Path) -> set[str]:
    """Modules of this project, as the page names them, that a program has loaded when it ends."""
    code = f"import sys\n{code}\nprint(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = [name.split(".") for name in done.stderr.split() if name.split(".")[0] in PACKAGES]
    return {"/".join(p[1:]) for p in names if (PACKAGES[p[0]] / Path(*p)).with_suffix(".py").is_file()}


RUN = "from dijiang_export.cli import main\nassert main(sys.argv[1:]) == 0"


def named(title: str) -> set[str]:
    """What a section has in backticks, `a/{b,c}` as `a/b` and `a/c`."""
    found = set()
    for quoted in re.findall(r"`([^`]+)`", section(title)):
        before, braced, names = quoted.partition("{")
        found |= {before + name for name in names.rstrip("}").split(",")} if braced else {quoted}
    return found


def test_every_path_that_a_walk_names_is_a_module() -> None:
    files = [path.removesuffix(".py").split("/", 2)[2] for path in tree()]
    for title in re.findall(r"^## (From .*)$", page(), re.MULTILINE):
        paths = {name for name in named(title) if re.fullmatch(r"[a-z_]+(/[a-z_]+)+", name)}
        assert paths - set(files) == set()


def test_the_walk_of_an_export_names_every_module_it_passes(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    modules = loaded(RUN, "to-onnx", ROOT / "samples/tiny-stdlib", tmp_path / "b")
    assert len(modules) > 40
    assert modules - named("From a checkpoint to a bundle") == set()


def test_the_walk_of_generation_and_validation_names_every_module_it_passes(sample_bundle: Path) -> None:
    modules = loaded(RUN, "generate", sample_bundle, "--prompt", "def main():", "--max-tokens", "3")
    modules |= loaded(RUN, "validate", sample_bundle, "--case", "short")
    assert len(modules) > 40
    assert modules - named("From a bundle to tokens") == set()
