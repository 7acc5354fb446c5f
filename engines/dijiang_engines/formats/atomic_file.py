"""Output files that appear whole or not at all: `atomic.output_folder`, for a single file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dijiang_engines.errors import OutputError
from dijiang_engines.formats.atomic import cannot_write, flush, remove_stale, write_error
from dijiang_engines.formats.temporary_names import temporary_name


@contextmanager
def output_file(path: str | Path, *, force: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends without an exception.

    Until then an older file of that name stays as it is. A new file gets ordinary permissions (those of the
    umask), one that replaces another keeps the other's. A symbolic link stays, and the file that it
    names is replaced.

    Args:
        path: where the file shall appear. Its folder must exist.
        force: replace a file that is already there.

    Yields:
        The temporary file, beside `path` and so on the same file system, open for writing.

    Raises:
        OutputError: as `check_output_file`; the system refuses to write; the disk is full, also when that
            happens inside the block. Other exceptions of the block pass unchanged. In every case, also for
            KeyboardInterrupt, nothing is left behind.
    """
    target = check_output_file(path, force=force)
    with suppress(OSError):  # a folder that may be written to, but not listed
        remove_stale(target.parent)
    temporary = target.parent / temporary_name(target, "tmp")
    try:
        try:
            with _made(temporary, target) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except Exception as error:
            translated = write_error(target, temporary, error)
            if translated is None:
                raise
            raise translated from error
        check_output_file(path, force=force)
        try:
            _keep_permissions(temporary, target)
            os.replace(temporary, target)
            flush(target.parent)
        except OSError as error:
            raise cannot_write(target, error) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def check_output_file(path: str | Path, *, force: bool = True) -> Path:
    """Find out early whether `output_file` could write to `path`; returns where that is, links followed.

    Raises:
        OutputError: its folder is missing or read-only, or something that must not be replaced has that name.
    """
    found: os.stat_result | None = None
    try:
        target = Path(os.path.realpath(path))
        with suppress(FileNotFoundError):
            found = os.stat(target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise OutputError(f"cannot write the output {path}", got=getattr(error, "strerror", error)) from error
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise OutputError(f"the output {path} exists and is not an ordinary file", hint="choose another name")
    if found is not None and not force:
        raise OutputError(
            f"the output {path} already exists", hint="choose another name, or replace it with --force"
        )
    if not target.parent.is_dir():
        raise OutputError(f"there is no folder {Path(path).parent} to write {path} to")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"the folder {Path(path).parent} is read-only", hint="choose another folder")
    if found is not None and not os.access(target, os.W_OK):
        raise OutputError(f"the output {path} is read-only", hint="choose another name, or remove it")
    if found is None:  # permissions do not tell everything: /proc, a full quota
        probe = target.parent / temporary_name(target, "tmp")
        _made(probe, target).close()
        probe.unlink()
    return target


def _made(temporary: Path, target: Path) -> BinaryIO:
    try:
        return open(temporary, "xb")
    except OSError as error:
        raise cannot_write(target, error) from error


def _keep_permissions(temporary: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
