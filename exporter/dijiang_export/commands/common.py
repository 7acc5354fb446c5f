"""What all commands share: `--quiet` and `--json`, results on stdout, logs and progress on stderr.

Imports nothing heavier than click: rich is loaded when the first table or progress bar is drawn, so that
`--help` and the first generated token do not wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dijiang_engines.printable import json_text, printable
from dijiang_engines.progress import Progress, silent

if TYPE_CHECKING:
    from rich import progress as rp
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

PROGRAM = "dijiang-export"
COMPLETION_VARIABLE = "_DIJIANG_EXPORT_COMPLETE"
"""Set by a shell that asks for completions, as click has it."""
DEFAULT_BUNDLE = "tiny-stdlib.bundle"
"""What `to-onnx` writes and the other commands read when no path is given."""


class _Bar:
    def __init__(self, bars: rp.Progress, task: rp.TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float = 1) -> None:
        self._bars.advance(self._task, amount)


class Output:
    """Where a command's words go.

    Attributes:
        quiet: no logs and no progress; results and errors still appear.
        json: the result is one JSON document on stdout, an error one JSON object on stderr.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        self.quiet = quiet
        self.json = json
        self._live: Console | None = None

    @property
    def shows_progress(self) -> bool:
        """True if a progress bar would be drawn: not quiet, and stderr is a terminal."""
        return not self.quiet and _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    def log(self, message: str = "") -> None:
        """One line on stderr, unless quiet. Where it cannot be written the work goes on without it."""
        if self.quiet:
            return
        message = printable(message)
        with suppress(OSError):
            if self._live is not None:
                self._live.print(message, markup=False, highlight=False, soft_wrap=True)
            else:
                click.echo(message, err=True)

    def print_result(
        self, result: Any, table: Callable[[], RenderableType] | Callable[[], str] | None = None
    ) -> None:
        """Print a command's result on stdout.

        Args:
            result: JSON-like data; dataclasses, paths, NumPy scalars and arrays are converted, and
                non-finite floats become the strings "nan", "inf" and "-inf", which JSON has no numbers for.
            table: called unless `--json` was given; a string, or anything that rich can draw. Without it
                the JSON is printed either way.
        """
        if self.json or table is None:
            click.echo(json_text(jsonable(result), encoding=encoding_of(sys.stdout), indent=2))
            return
        shown = table()
        if isinstance(shown, str):
            click.echo(printable(shown))
        else:
            self.print_rich(shown)

    def print_rich(self, *renderables: RenderableType) -> None:
        """Draw tables and the like on stdout; wide enough for any table where it is not a terminal.

        Texts are shown as they are: nothing in brackets or between colons means a style or a picture.
        """
        from rich.console import Console

        width = None if _is_terminal(sys.stdout) or os.environ.get("COLUMNS") else 200
        console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
        for renderable in renderables:
            console.print(_Printable(renderable))

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = "items"
    ) -> Iterator[Progress]:
        """A progress bar on stderr for the length of the block; nothing if quiet or not a terminal.

        Args:
            description: what is being done, a few words.
            total: how much there is, in `unit`; None while that is unknown.
            unit: "bytes" shows sizes and speed, "items" counts.
        """
        if not self.shows_progress or self._live is not None:  # one bar at a time: an inner one stays silent
            with silent(description, total, unit) as nothing:
                yield nothing
            return
        from rich import progress as rp
        from rich.console import Console

        counts: tuple[rp.ProgressColumn, ...]
        if unit == "bytes":
            counts = (rp.DownloadColumn(binary_units=True), rp.TransferSpeedColumn())
        else:
            counts = (rp.MofNCompleteColumn(),)
        console = Console(file=sys.stderr)
        columns = (rp.TextColumn("{task.description}", markup=False), rp.BarColumn(), *counts)
        with rp.Progress(*columns, rp.TimeRemainingColumn(), console=console, transient=True) as bars:
            self._live = console
            try:
                yield _Bar(bars, bars.add_task(printable(description), total=total))
            finally:
                self._live = None


def one_output(positional: Path | None, option: Path | None, name: str) -> Path | None:
    """The output of a command that takes it as an argument or as -o; None if neither was given.

    Raises:
        UsageError: both were given.
    """
    from dijiang_engines.errors import UsageError

    if positional is not None and option is not None:
        raise UsageError(f"{name} and --output are the same: give one of them", got=f"{positional}, {option}")
    return option if positional is None else positional


class _Printable:
    """What a renderable draws, without what else a terminal would obey: it may show names from any file."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment._replace(text=text)


def encoding_of(stream: Any) -> str | None:
    """Of a standard stream; None if it does not say."""
    return getattr(stream, "encoding", None)


def jsonable(value: Any) -> Any:
    """`value` as what `json.dumps(..., allow_nan=False)` accepts."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, without importing NumPy
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint, and is neither a bundle nor an engine."""
    manifests = ("manifest.json", "engine.json")
    return (path / "config.json").is_file() and not any((path / name).exists() for name in manifests)


def finish(
    output: Output, result: dict[str, Any], save: Path | None, table: Callable[[], RenderableType]
) -> None:
    """Save a measured result if asked to, and print it: `table()` for people."""
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


def output_options(function: Callable[[Output], T]) -> Callable[[], T]:
    """Give a command that takes nothing else `-q/--quiet` and `--json`, and pass it its `Output`.

    The group takes the same two options: before and after the command's name they mean the same.
    """

    @declare_output_options
    @click.pass_context
    @wraps(function)
    def wrapper(ctx: click.Context) -> T:
        return function(current_output(ctx))

    return wrapper


def current_output(ctx: click.Context) -> Output:
    """The invocation's one `Output`, made on first use."""
    output = ctx.find_object(Output)
    if output is None:
        output = ctx.find_root().obj = Output()
    return output


def _set_quiet(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        current_output(ctx).quiet = True


def _set_json(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        current_output(ctx).json = True


# Eager: an error in a later option is then already reported in the wanted form.
_QUIET = click.option(
    "-q", "--quiet", is_flag=True, is_eager=True, expose_value=False, callback=_set_quiet,
    help="No logs, no progress bars: only results and errors.",
)  # fmt: skip
_JSON = click.option(
    "--json", is_flag=True, is_eager=True, expose_value=False, callback=_set_json,
    help="The result, or an error, as JSON.",
)  # fmt: skip


def declare_output_options(function: F) -> F:
    """Give a command or the group `-q/--quiet` and `--json`, which set what `current_output` returns."""
    return _QUIET(_JSON(function))


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # closed, or not a stream
        return False
