"""The result of `bench step` as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dijiang_export.bench.step.shapes import Cell

if TYPE_CHECKING:
    from rich.console import Group

_CONTESTANTS = ("one launch", "launches", "cublas", "tinygemm")
LEGEND = (
    "Times are medians in µs of a step in a CUDA graph at position 100. one launch: dijiang_step. launches: "
    "products, attention, products, three launches a layer. cublas, tinygemm: the bare matrix products, "
    "tinygemm in int4 with bfloat16 activations. floor: the weights' bytes at the rate of a large copy. "
    "far: position 100,000."
)


def draw_steps(record: dict[str, Any]) -> Group:
    """One table under what was measured with what."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="A decoding step")
    for name in ("step", *_CONTESTANTS, "floor", "of the floor", "far", "error"):
        table.add_column(name, justify="left" if name == "step" else "right")
    notes = []
    for step in record["steps"]:
        results = step["results"]
        cells = [_time(results.get(name)) for name in _CONTESTANTS]
        one = results.get("one launch", {})
        table.add_row(describe(step), *cells, f"{1e6 * step['floor']:.0f}", *_more(one, step["floor"]))
        notes += [f"{describe(step)}, {n}: {r['skipped']}" for n, r in results.items() if "skipped" in r]
    rate = f"a copy moves {record['rate'] / 1e12:.2f} TB/s"
    head = f"{record['gpu']['name']}, {record['settings']['dtype']}, {rate}"
    return Group(Text(head), table, Text(LEGEND), *(Text(f"note: {note}") for note in notes))


def describe(step: dict[str, Any]) -> str:
    """A measured step's size in words."""
    return str(Cell(step["shape"], step["weights"], step["rows"]))


def _time(result: dict[str, Any] | None, figure: str = "timing") -> str:
    if result is None or "skipped" in result:
        return ""
    return f"{1e6 * result[figure]['median']:.1f}" if figure in result else "wrong"


def _more(one: dict[str, Any], floor: float) -> tuple[str, str, str]:
    if "timing" not in one:
        return "", "", f"{one['error']:.1e}" if "error" in one else ""
    return f"{one['timing']['median'] / floor:.2f}", _time(one, "far"), f"{one['error']:.1e}"
