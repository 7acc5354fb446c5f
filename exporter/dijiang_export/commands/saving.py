"""`--save`: a measured result as a JSON file, the same as `--json` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dijiang_export.commands.common import Output, jsonable

save_option = click.option(
    "--save", type=click.Path(dir_okay=False, path_type=Path), help="Also write the result as JSON to a file."
)


def finish(output: Output, result: dict[str, Any], save: Path | None, table: Any) -> None:
    """Save a result if asked to, and print it: `table()` for people."""
    if save is not None:
        save_json(result, save)
        output.log(f"saved {save}")
    output.print_result(result, table)


def save_json(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON.

    Raises:
        OutputError: the file cannot be written.
    """
    from dijiang_engines.errors import OutputError

    try:
        path.write_text(json.dumps(jsonable(result), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written", got=error.strerror) from error
