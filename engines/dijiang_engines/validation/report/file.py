"""A report's file: checked before the work that it is about, and written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from dijiang_engines.errors import OutputError
from dijiang_engines.formats.atomic_file import check_output_file, output_file
from dijiang_engines.formats.safe_files import open_regular

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
    target = check_output_file(path)
    if target.exists() and not force and not _is_report(target, marker):
        raise OutputError(
            f"{path} exists and is not a report of this program",
            hint="choose another name, or replace it with --force",
        )


def write_report(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, replacing what is there; never half of it.

    Characters that UTF-8 does not have (lone surrogates) are written as escapes.

    Raises:
        OutputError: it cannot be written.
    """
    with output_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _is_report(path: Path, marker: str) -> bool:
    with open_regular(path, links=True, error=OutputError) as file:
        return marker.encode() in file.read(_HEAD_BYTES)
