"""What stands in tests/support: each file says what it is, a fake what it proves, and nothing lies idle."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.paths import ROOT, TESTS

FILES = sorted((TESTS / "support").rglob("*.py"))
USERS = ("tests", ".ci", "docs", "plugins", "samples")
"""Where a helper may be named: in tests, and in what says how a script is run."""
PRODUCT = ("engines", "exporter")
"""What calls fakes besides."""


def name_of(path: Path) -> str:
    return str(path.relative_to(TESTS / "support"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_file_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    says = ast.get_docstring(ast.parse(text)) or ""
    assert len(says.split()) >= 5
    assert len(text.splitlines()) <= 400
    if path.parent.name == "fakes":
        assert "orchestration only" in " ".join(says.split())


def names(tree: ast.Module) -> Iterator[str]:
    """Of functions, classes and constants of a module, and of methods of classes that derive from nothing.

    A class with a base may only fill in what its base calls.
    """
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef) and not node.bases:
            yield from (part.name for part in node.body if isinstance(part, ast.FunctionDef))
        for target in node.targets if isinstance(node, ast.Assign) else []:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def idle(files: dict[str, str], users: str) -> list[str]:
    """Names in `files` that `users`, of which these are part, say no more often than they define them."""
    words = Counter(re.findall(r"\w+", users))
    defined = Counter(name for text in files.values() for name in names(ast.parse(text)))
    dunder = re.compile(r"__\w+__$")
    return sorted(n for n, count in defined.items() if words[n] <= count and not dunder.match(n))


def read(paths: Iterable[Path]) -> dict[str, str]:
    return {name_of(path): path.read_text(encoding="utf-8") for path in paths}


def text_in(*folders: str) -> str:
    kinds = (".py", ".md", ".txt", ".cpp", ".h")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds and p.is_file()]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def test_nothing_lies_idle() -> None:
    fakes = [path for path in FILES if path.parent.name == "fakes"]
    assert idle(read(path for path in FILES if path not in fakes), text_in(*USERS)) == []
    assert idle(read(fakes), text_in(*USERS, *PRODUCT)) == []


def test_what_lies_idle_is_found() -> None:
    text = "LEFT = 1\ndef used(): pass\ndef unused(): used()\nclass C:\n    def m(self): ...\n"
    assert idle({"a.py": text}, text + "C()") == ["LEFT", "m", "unused"]
