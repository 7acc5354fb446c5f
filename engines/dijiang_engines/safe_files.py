"""Reading files that may be hostile: no links, no surprises in size, bounded JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dijiang_engines.errors import BundleError

MAX_JSON_DEPTH = 32

_BLOCK = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


def is_plain_name(name: object) -> bool:
    """True for a file name without separators, leading dots or odd characters."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


@contextmanager
def open_regular(path: Path, *, expected_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for reading if it is an ordinary one with one name.

    A symbolic or hard link inside a bundle can reach what the bundle's author could not, so both are
    refused (as onnx.checker does). Pipes and devices are refused without waiting on them.

    Raises:
        BundleError: the file is missing, unreadable, a link, not a regular file, or of another size
            than `expected_bytes`.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        if path.is_symlink():
            raise BundleError(
                f"{path} is a symbolic link",
                expected="an ordinary file",
                hint="copy the bundle with `cp -rL`",
            )
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing", hint="the bundle is incomplete: export or copy it again"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read {path}", got=error.strerror) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not an ordinary file")
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if info.st_nlink > 1:
            raise BundleError(
                f"{path} is a hard link: the same file has {info.st_nlink} names",
                expected="a file of its own",
                hint="copy the bundle with `cp -r --no-preserve=links`",
            )
        if expected_bytes is not None and info.st_size != expected_bytes:
            raise BundleError(
                f"{path} has the wrong size",
                got=f"{info.st_size} bytes",
                expected=f"{expected_bytes} bytes",
                hint="the file is truncated or was changed: export or copy the bundle again",
            )
        yield file


def read_bounded(path: Path, most: int) -> bytes:
    """A whole ordinary file of at most `most` bytes.

    Raises:
        BundleError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise BundleError(f"{path} is too large", expected=f"at most {most} bytes")
    return data


def sha256_of(file: BinaryIO, on_bytes: Callable[[int], None] | None = None) -> str:
    """The hex SHA-256 of the rest of a file, read in blocks; `on_bytes` is told each block's size."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    while count := file.readinto(view):  # type: ignore[attr-defined]
        digest.update(view[:count])
        if on_bytes is not None:
            on_bytes(count)
    return digest.hexdigest()


def parse_json(data: bytes, what: str) -> Any:
    """JSON as a bundle may hold it: UTF-8, no NaN, no repeated keys, bounded nesting.

    Raises:
        BundleError: anything else; `what` names the file.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{what} is not UTF-8", got=f"bad byte at offset {error.start}") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError as error:
        raise BundleError(f"{what} is not valid JSON", got=str(error)) from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise _too_deep(what)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep(what: str) -> BundleError:
    return BundleError(f"{what} is nested too deeply", expected=f"at most {MAX_JSON_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
