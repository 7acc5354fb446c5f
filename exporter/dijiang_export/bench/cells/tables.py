"""A record of `measure.measure_cells` as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

Column = Callable[[Mapping[str, Any]], str]
"""A cell's text in one column."""


def draw_cells(
    record: Mapping[str, Any],
    title: str,
    contestants: Sequence[str],
    columns: Mapping[str, Column],
    legend: str,
) -> Group:
    """One table under what was measured with what.

    Args:
        record: of the run.
        title: of the table.
        contestants: whose times are shown, in order.
        columns: further ones, behind the floor.
        legend: what the words in the table mean.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for name in ("size", *contestants, "floor", *columns):
        table.add_column(name, justify="left" if name == "size" else "right")
    notes = []
    for cell in record["cells"]:
        results = cell["results"]
        times = [microseconds(results.get(name)) for name in contestants]
        table.add_row(
            cell["name"], *times, f"{1e6 * cell['floor']:.1f}", *(c(cell) for c in columns.values())
        )
        notes += [f"{cell['name']}, {n}: {r['skipped']}" for n, r in results.items() if "skipped" in r]
    settings = [value for value in record["settings"].values() if isinstance(value, str)]
    head = [record["gpu"]["name"], *settings, f"a copy moves {record['rate'] / 1e12:.2f} TB/s"]
    return Group(Text(", ".join(head)), table, Text(legend), *(Text(f"note: {note}") for note in notes))


def microseconds(result: Mapping[str, Any] | None, figure: str = "timing") -> str:
    """The median of one of a contestant's figures; nothing where it was left out."""
    if result is None or "skipped" in result:
        return ""
    return f"{1e6 * result[figure]['median']:.1f}" if figure in result else "wrong"


def error(name: str) -> Column:
    """Of the contestant of this name."""

    def column(cell: Mapping[str, Any]) -> str:
        result = cell["results"].get(name, {})
        return f"{result['error']:.1e}" if "error" in result else ""

    return column


def over_floor(name: str) -> Column:
    """How many times the floor its time is."""

    def column(cell: Mapping[str, Any]) -> str:
        timing = cell["results"].get(name, {}).get("timing")
        return "" if timing is None else f"{timing['median'] / cell['floor']:.2f}"

    return column
