"""Text to learn from: the user's files, or the documentation that lies on any Debian and Python machine.

Split by file, by a hash of the content, so that the split is the same everywhere. Documentation that occurs
twice is dropped first (a package's README is often its METADATA too): nothing held out is trained on under
another name.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.errors import TextError

from .plain import HTML, plain_html, plain_manual

HELD_OUT = 25
"""One file in so many is held out."""

MOST_BYTES = 4 << 20
"""Of one file: what is longer is a table or a log."""

DOCUMENTATION = (".rst", ".md", ".pod", ".info", ".txt", *HTML)
NAMES = ("readme", "metadata", "news", "faq")
PLACES = ("/usr/share/doc", "/usr/share/man", "/usr/share/perl", "/usr/share/info")
MANUAL = re.compile(r"/man/man\d\w*/[^/]+$")
"""Manual pages, English ones: those of other languages lie in folders of their own."""
LEAST_LETTERS = 0.7
"""Share of letters and spaces in what passes for prose: below are tables, fixtures and dumps."""
REPEATED = 0.3
"""A file of which more than this share was seen in others is dropped."""
LEAST_PARAGRAPH = 60
"""Characters of a paragraph that counts as seen."""


@dataclass(frozen=True)
class Document:
    """One file's text."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big") % HELD_OUT == 0


def read_files(paths: Iterable[Path]) -> list[Document]:
    """Named files, and every file below named folders; what is no text in a folder is left out.

    Raises:
        TextError: a named file cannot be read, is not UTF-8 text, or is empty; a folder holds no text.
    """
    out = []
    for path in paths:
        if not path.is_dir():
            out.append(Document(str(path), _text(path)))
            continue
        found = list(_readable(sorted(p for p in path.rglob("*") if p.is_file())))
        if not found:
            raise TextError(f"{path} holds no text file")
        out += found
    return out


def _readable(paths: Iterable[Path]) -> Iterator[Document]:
    for path in paths:
        with contextlib.suppress(TextError):
            yield Document(str(path), _text(path))


def documentation() -> list[Document]:
    """READMEs, manuals and package descriptions on this machine that read like prose, each once.

    Raises:
        TextError: there is next to none.
    """
    found: list[Document] = []
    seen: set[bytes] = set()
    for document in _readable(_documentation_files()):
        if MANUAL.search(document.name):
            document = Document(document.name, plain_manual(document.text))
        if _letters(document.text) >= LEAST_LETTERS and _is_new(document.text, seen):
            found.append(document)
    if sum(len(document.text) for document in found) < 1_000_000:
        raise TextError("there is too little documentation on this machine", hint="name files with --text")
    return found


def _documentation_files() -> Iterator[Path]:
    roots = [*PLACES, sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), sys.prefix]
    met: set[str] = set()
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                plain = name.lower().removesuffix(".gz")
                wanted = plain.endswith(DOCUMENTATION) or plain.startswith(NAMES) or MANUAL.search(path)
                unwanted = plain.startswith(("changelog", "licen", "copying")) or path in met
                if wanted and not unwanted and _size(path) <= MOST_BYTES:
                    met.add(path)
                    yield Path(path)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0  # reading it will say why


def _text(path: Path) -> str:
    try:
        data = _bytes(path)
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text", got=f"a byte that is none at {error.start}") from None
    except (OSError, EOFError) as error:
        raise TextError(f"{path} cannot be read", got=str(error)) from None
    if "\0" in text:
        raise TextError(f"{path} is binary, not text")
    if path.name.lower().removesuffix(".gz").endswith(HTML):
        text = plain_html(text)
    if not text.strip():
        raise TextError(f"{path} is empty")
    return text


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise TextError(f"there is no file {path}")
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            data = file.read(MOST_BYTES + 1)
    else:
        with path.open("rb") as file:
            data = file.read()
    if path.suffix == ".gz" and len(data) > MOST_BYTES:
        raise TextError(f"{path} is too long", expected=f"at most {MOST_BYTES} bytes")
    return data


def _letters(text: str) -> float:
    sample = text[:20000]
    return sum(c.isalpha() or c == " " for c in sample) / max(1, len(sample))


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Whether most of a text was not in those before it; notes its paragraphs."""
    marks = []
    old = 0
    for paragraph in text.split("\n\n"):
        plain = " ".join(paragraph.split())
        if len(plain) >= LEAST_PARAGRAPH:
            mark = hashlib.sha256(plain.encode()).digest()[:8]
            old += len(plain) if mark in seen else 0
            marks.append(mark)
    if not marks or old > REPEATED * len(text):
        return False
    seen.update(marks)
    return True
