"""One builder at a time for one engine folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dijiang_engines.errors import OutputError


@contextmanager
def only_builder(output: Path) -> Iterator[None]:
    """Hold a lock beside the output, so that two processes do not both build it for minutes.

    Raises:
        OutputError: another process holds it.
    """
    target = Path(os.path.abspath(output))
    path = target.parent / f".{target.name}.dijiang-lock"
    if not target.parent.is_dir():
        yield  # output_folder makes the parents; nobody else can be building there
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write beside {output}", got=error.strerror) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"another process is building {output}", hint="wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
