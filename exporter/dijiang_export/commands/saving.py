"""`--save`: a measured result as a JSON file, the same as `--json` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dijiang_export.commands.common import Output, jsonable


def _writable(_ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """Find out before minutes of measuring that the result cannot be kept."""
    if value is not None:
        from dijiang_engines.formats.atomic_file import check_output_file

        check_output_file(value)
    return value


save_option = click.option(
    "--save", type=click.Path(path_type=Path), callback=_writable,
    help="Also write the result as JSON to a file.",
)  # fmt: skip


def finish(output: Output, result: dict[str, Any], save: Path | None, table: Any) -> None:
    """Save a result if asked to, and print it: `table()` for people."""
    if save is not None:
        save_json(result, save)
        output.log(f"saved {save}")
    output.print_result(result, table)


def save_json(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON: the whole file or none, an older one stays until then.

    Raises:
        OutputError: the file cannot be written.
    """
    from dijiang_engines.formats.atomic_file import output_file

    text = json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n"
    with output_file(path) as file:
        file.write(text.encode())
