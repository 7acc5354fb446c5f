"""A report's file: checked before the work that it is about, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from dijiang_engines.errors import OutputError

_HEAD_BYTES = 400


def check_target(path: Path, marker: str, *, force: bool = False) -> None:
    """Make sure that `write_report` will be able to write `path`; leaves nothing behind.

    Args:
        path: the file to come.
        marker: what an earlier report has near its beginning: such a file may be replaced.
        force: replace any other file too.

    Raises:
        OutputError: the folder is missing or cannot be written to, or something else is there.
    """
    try:
        _check(path, _resolve(path), marker, force)
    except OSError as error:
        raise _cannot(path, error) from error


def _check(path: Path, target: Path, marker: str, force: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{path} is a folder", expected="the name of a file for the report")
    if os.path.lexists(target) and not target.is_file():
        raise OutputError(f"{path} exists and is not an ordinary file", hint="choose another name")
    if target.exists() and not force and not _is_report(target, marker):
        raise OutputError(
            f"{path} exists and is not a report of this program",
            hint="choose another name, or replace it with --force",
        )
    if not target.parent.is_dir():
        raise OutputError(f"{path} cannot be written", got=f"there is no folder {target.parent}")
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".dijiang-report-"):
        pass


def write_report(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, replacing what is there; never half of it.

    Characters that UTF-8 does not have (lone surrogates) are written as escapes.

    Raises:
        OutputError: it cannot be written.
    """
    target = _resolve(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".dijiang-report-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise _cannot(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def _resolve(path: Path) -> Path:
    """Where the file really is: a symbolic link stays, and what it leads to is replaced."""
    return Path(os.path.realpath(path))


def _is_report(path: Path, marker: str) -> bool:
    with path.open("rb") as file:
        return marker.encode() in file.read(_HEAD_BYTES)


def _cannot(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written",
        got=error.strerror or str(error),
        hint="choose a name in a folder that you may write to",
    )
