"""The text: the Python standard library's own source, split by file.

It is on every machine that has Python, it is free to use (PSF licence), and a model of a few million
parameters learns enough of it to write something that looks like Python.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXCLUDED = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders left out: other people's packages, and two that hold generated tables or documentation."""

EXCLUDED_PREFIX = "_sysconfigdata"
"""Generated at build time: full of the building machine's paths."""

TESTS = ("test", "tests", "idle_test")
"""Folder names of CPython's own tests: a part of the corpus, and reported on separately."""


@dataclass(frozen=True)
class Document:
    """One source file: its path below the library, its text, and which split it belongs to."""

    path: str
    text: str
    split: str

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())

    @property
    def is_test(self) -> bool:
        """Whether it belongs to CPython's test suite rather than to the library."""
        return any(part in TESTS for part in self.path.split("/")[:-1])


def split_of(path: str) -> str:
    """Which split a file belongs to, by a hash of its path alone: 5% held out, 5% validation, 90% train.

    Validation serves for watching a run and choosing settings; held-out files are for the final numbers.
    """
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 20
    return {0: "held-out", 1: "validation"}.get(bucket, "train")


def read_corpus(root: str | Path | None = None) -> list[Document]:
    """Every readable, non-empty `*.py` below `root` (default: this interpreter's library), sorted by path.

    Files that are not UTF-8 (some of CPython's tests are not, on purpose) are left out.
    """
    base = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in sorted(base.rglob("*.py"), key=lambda f: f.relative_to(base).as_posix()):
        parts = file.relative_to(base).parts
        if EXCLUDED.intersection(parts) or file.name.startswith(EXCLUDED_PREFIX) or not file.is_file():
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            path = "/".join(parts)
            documents.append(Document(path, text, split_of(path)))
    if not documents:
        raise SystemExit(f"no Python source below {base}\nhint: name the library's folder with --stdlib")
    for split in ("train", "validation", "held-out"):
        if not any(d.split == split for d in documents):
            raise SystemExit(f"no file below {base} falls into the {split} split\nhint: use a larger folder")
    return documents


def describe(documents: list[Document], python_version: str | None = None) -> dict[str, Any]:
    """Facts that identify a corpus: Python version, counts, bytes, and a hash over paths and contents."""
    digest = hashlib.sha256()
    for d in documents:
        data = d.text.encode()
        digest.update(f"{d.path}\0{len(data)}\0".encode() + data)
    facts: dict[str, Any] = {
        "python": python_version or platform.python_version(),
        "files": len(documents),
        "bytes": sum(d.size for d in documents),
        "test_files": sum(d.is_test for d in documents),
        "sha256": digest.hexdigest(),
    }
    for split in ("train", "validation", "held-out"):
        members = [d for d in documents if d.split == split]
        facts[split] = {"files": len(members), "bytes": sum(d.size for d in members)}
    return facts
