"""`bench serve` for people: a table, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dijiang_engines.formats.atomic_file import output_file
from dijiang_engines.svg_plot import Axis, Series, picture

_COLUMNS = (
    "streams at a time", "tokens/s", "first token p50", "p95", "between tokens p50", "p95", "p99", "failed",
)  # fmt: skip


def draw_served(result: Mapping[str, Any]) -> Group:
    """The table of one measured server."""
    server, load = result["server"], result["load"]
    table = Table(title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for level in result["levels"]:
        table.add_row(*_cells(level))
    head = (
        f"{server['model']} at {server['url']}: prompts of {load['prompt_tokens']} {server['prompts']}, "
        f"{load['tokens']} tokens each"
    )
    parts: list[RenderableType] = [Text(head), table]
    parts += [
        Text(f"{count} failed at {level['concurrency']}: {reason}")
        for level in result["levels"]
        for reason, count in level["reasons"].items()
    ]
    return Group(*parts, *(Text(f"note: {note}") for note in result["notes"]))


def _cells(level: Mapping[str, Any]) -> list[str]:
    rate = level["tokens_per_second"]
    return [
        str(level["concurrency"]),
        "-" if rate is None else f"{rate:,.1f}",
        *_times(level["first_token"], ("p50", "p95")),
        *_times(level["between_tokens"], ("p50", "p95", "p99")),
        str(level["failures"]),
    ]


def _times(found: Mapping[str, float] | None, names: Sequence[str]) -> list[str]:
    if found is None:
        return ["-"] * len(names)
    return [f"{1e3 * found[n]:.3g} ms" if found[n] < 1 else f"{found[n]:.2f} s" for n in names]


def plot_served(result: Mapping[str, Any], path: Path) -> None:
    """Draw the times over the streams at a time, both axes logarithmic.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [
        Series(f"{name}, {p}", points)
        for name, field in (("first token", "first_token"), ("between tokens", "between_tokens"))
        for p in ("p50", "p95", "p99")
        if (points := _points(result["levels"], field, p))
    ]
    text = picture(
        f"{result['server']['model']}: what clients wait for",
        lines,
        Axis("streams at a time", log=True, snug=True, ticks=[lv["concurrency"] for lv in result["levels"]]),
        Axis("milliseconds", log=True, snug=True),
    )
    with output_file(path) as file:
        file.write(text.encode())


def _points(levels: Sequence[Mapping[str, Any]], field: str, p: str) -> list[tuple[float, float | None]]:
    found = ((level["concurrency"], level[field]) for level in levels)
    return [(clients, 1e3 * times[p]) for clients, times in found if times and times.get(p, 0) > 0]
