"""Reading files that may be hostile: no links, no surprises in size, bounded JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from dijiang_engines.errors import BundleError, CheckpointError, DijiangError, UsageError

LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "manifest": 16 << 20,
        "graph": 256 << 20,  # without its weights; 32 layers of standard operators take about 2 MB
        "config": 16 << 20,
        "shard index": 64 << 20,
        "tokenizer": 64 << 20,
        "tokenizer part": 64 << 20,  # what is copied beside tokenizer.json: settings, templates, merges
        "recipe": 64 << 10,
        "plugin record": 1 << 20,
        "library": 1 << 30,
        "kernel cache": 1 << 30,
        "benchmark record": 64 << 20,
        "text": 256 << 20,  # to score; one call of the tokenizer takes it whole
    }
)
"""Bytes that a file of each kind may have; real ones are far smaller."""
MAX_JSON_DEPTH = 32
MAX_JSON_VALUES = 1 << 20
"""Values in a JSON file: a manifest of 100 layers has 60,000, an index of 100,000 tensors as many."""
MAX_DIGITS = 40
"""Of a number in JSON: more than any 64-bit integer or float64 needs."""
MAX_TOML_DOTS = 100
"""In one line of TOML: tomllib takes a time that grows with the square of a dotted key's parts."""

_BLOCK = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_LFS = b"version https://git-lfs.github.com/spec/"  # spec.md of git-lfs: the first line of a pointer
_LFS_BYTES = 1024  # the same: a pointer is smaller


def is_plain_name(name: object) -> bool:
    """True for a file name without separators, leading dots or odd characters."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


@contextmanager
def open_regular(
    path: Path,
    *,
    expected_bytes: int | None = None,
    most: int | None = None,
    links: bool = False,
    error: type[DijiangError] = BundleError,
) -> Iterator[BinaryIO]:
    """Open an untrusted file for reading: an ordinary one, without waiting on pipes and devices.

    Every file that somebody else may have made is opened here. A symbolic or hard link inside a bundle can
    reach what the bundle's author could not, so both are refused there (as onnx.checker does); where a user
    names the file, and in checkpoints, `links` allows them.

    Args:
        path: the file.
        expected_bytes: its size, if that is known.
        most: bytes that it may have, usually one of LIMITS.
        links: follow symbolic links, and take a file that has several names.
        error: the class that is raised.

    Raises:
        DijiangError: of class `error`: the file is missing, unreadable, a link, not a regular file, too
            large, of another size than `expected_bytes`, or a Git LFS pointer.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
    if not links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        if not links and path.is_symlink():
            raise error(
                f"{path} is a symbolic link",
                expected="an ordinary file",
                hint="copy the bundle with `cp -rL`",
            )
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise error(f"{path} is missing", hint=_MISSING.get(error)) from None
    except (OSError, ValueError) as failure:  # ValueError: a NUL in the name
        raise error(f"cannot read {path}", got=getattr(failure, "strerror", failure)) from failure
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise error(f"{path} is not an ordinary file", got=_kind(info.st_mode))
    with os.fdopen(descriptor, "rb") as file:
        if not links and info.st_nlink > 1:
            raise error(
                f"{path} is a hard link: the same file has {info.st_nlink} names",
                expected="a file of its own",
                hint="copy the bundle with `cp -r --no-preserve=links`",
            )
        if info.st_size < _LFS_BYTES and os.pread(descriptor, len(_LFS), 0) == _LFS:
            raise error(
                f"{path} is a Git LFS pointer, not the file itself",
                got=f"{info.st_size} bytes that name the file",
                hint=f"run `git lfs pull` in {path.parent}",
            )
        if expected_bytes is not None and info.st_size != expected_bytes:
            raise error(
                f"{path} has the wrong size",
                got=f"{info.st_size} bytes",
                expected=f"{expected_bytes} bytes",
                hint="the file is truncated or was changed: export or copy the bundle again",
            )
        if most is not None and info.st_size > most:
            raise error(f"{path} is too large", got=f"{info.st_size} bytes", expected=f"at most {most} bytes")
        yield file


def read_bounded(
    path: Path, most: int, *, links: bool = False, error: type[DijiangError] = BundleError
) -> bytes:
    """A whole ordinary file of at most `most` bytes, opened by `open_regular`.

    Raises:
        DijiangError: of class `error`: as `open_regular`, or the file grew beyond `most` meanwhile.
    """
    with open_regular(path, most=most, links=links, error=error) as file:
        try:
            data = file.read(most + 1)
        except OSError as failure:
            raise error(f"cannot read {path}", got=failure.strerror) from failure
    if len(data) > most:
        raise error(f"{path} is too large", expected=f"at most {most} bytes")
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


def parse_json(
    data: bytes,
    what: str,
    *,
    error: type[DijiangError] = BundleError,
    lenient: bool = False,
    most_values: int = MAX_JSON_VALUES,
) -> Any:
    """JSON as an untrusted file may hold it: UTF-8, bounded nesting and count, numbers of bounded length.

    Args:
        data: the file's bytes.
        what: names the file in messages.
        error: the class that is raised.
        lenient: take what other tools write into files of checkpoints: a byte order mark, NaN and Infinity,
            a repeated key (the last one counts). What reads the values must refuse such numbers.
        most_values: that it may hold.

    Raises:
        DijiangError: of class `error`: anything else.
    """
    try:
        text = data.decode("utf-8-sig" if lenient else "utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{what} is not UTF-8", got=f"bad byte at offset {failure.start}") from failure
    if sum(map(data.count, (b",", b"[", b"{"))) >= most_values:  # each but the first value follows one
        raise error(f"{what} holds too many values", expected=f"at most {most_values}")
    try:
        value = json.loads(
            text,
            object_pairs_hook=None if lenient else _unique,
            parse_constant=None if lenient else _no_constant,
            parse_int=_integer,
            parse_float=float if lenient else _finite,
        )
    except RecursionError:
        raise _too_deep(what, error) from None
    except ValueError as failure:
        raise error(
            f"{what} is not valid JSON", got=failure, hint="export, download or copy it again"
        ) from failure
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise _too_deep(what, error)


def parse_toml(data: bytes, what: str, *, error: type[DijiangError] = UsageError) -> dict[str, Any]:
    """TOML as an untrusted file may hold it: UTF-8, bounded nesting, integers of bounded length.

    The file's size must be bounded already: LIMITS["recipe"].

    Raises:
        DijiangError: of class `error`: anything else.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if any(line.count(b".") > MAX_TOML_DOTS for line in data.splitlines()):
        raise error(f"{what} has a line of too many dots", expected=f"at most {MAX_TOML_DOTS}")
    try:
        values: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except RecursionError:
        raise _too_deep(what, error) from None
    except ValueError as failure:  # UnicodeDecodeError, TOMLDecodeError, and numbers that int() refuses
        raise error(f"{what} is not TOML", got=failure) from failure
    _check_integers(values, what, error)
    return values


def _check_integers(value: Any, what: str, error: type[DijiangError], depth: int = 0) -> None:
    """Hexadecimal TOML integers have no limit of their own, and printing one may."""
    if depth > MAX_JSON_DEPTH:
        raise _too_deep(what, error)
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise error(f"{what} holds a number of more than {MAX_DIGITS} digits")
    for child in _children(value):
        _check_integers(child, what, error, depth + 1)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep(what: str, error: type[DijiangError]) -> DijiangError:
    return error(f"{what} is nested too deeply", expected=f"at most {MAX_JSON_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:MAX_DIGITS]} is too large")
    return value


def _kind(mode: int) -> str:
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "a device")


_MISSING: Mapping[type[DijiangError], str] = MappingProxyType(
    {
        BundleError: "the bundle is incomplete: export or copy it again",
        CheckpointError: "the checkpoint is incomplete: download or copy it again",
    }
)
