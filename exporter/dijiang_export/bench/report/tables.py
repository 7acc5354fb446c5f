"""Tables of `bench peers` and `bench report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dijiang_export.bench.report.report import Phase, Point, Report

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

_TITLES: dict[Phase, str] = {
    "decode": "Time per token ({rows}) after so many tokens",
    "prefill": "Prefill of so many tokens ({rows})",
}


def draw_report(report: Report) -> Group:
    """Everything in a report."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(line) for line in report.sources]
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase in phases:
        for batch in sorted({p.batch for p in report.points if p.phase == phase}):
            parts.append(_pivot(report, phase, batch))
    if report.base is not None:
        parts.append(Text(f"(3.0x): takes so many times as long as {report.base}"))
    if report.loops:
        parts.append(_loops(report))
    if report.memory:
        parts.append(_memory(report))
    if report.left_out:
        parts.append(_left_out(report))
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _pivot(report: Report, phase: Phase, batch: int) -> Table:
    points = [p for p in report.points if (p.phase, p.batch) == (phase, batch)]
    tokens = sorted({p.tokens for p in points})
    rows = "one sequence" if batch == 1 else f"{batch} sequences"
    table = _table(_TITLES[phase].format(rows=rows), "", *(f"{n:,}" for n in tokens))
    for name in report.series(phase):
        found = [report.at(name, phase, batch, n) for n in tokens]
        if any(point is not None for point in found):
            table.add_row(name, *(_cell(report, point) for point in found))
    return table


def _cell(report: Report, point: Point | None) -> str:
    if point is None:
        return ""
    ratio = report.ratio(point)
    return milliseconds(point.seconds) + ("" if ratio is None else f" ({ratio:.1f}x)")


def _loops(report: Report) -> Table:
    table = _table(
        "The loop of `generate`", "", "sequences", "position", "a token", "GPU step", "overhead", "tokens/s",
        "of the floor's speed",
    )  # fmt: skip
    for row in report.loops:
        table.add_row(
            row.series,
            str(row.batch),
            f"{row.position:,}",
            milliseconds(row.seconds),
            "-" if row.gpu is None else milliseconds(row.gpu),
            "-" if row.overhead is None else milliseconds(row.overhead),
            f"{row.batch / row.seconds:,.0f}",
            "-" if row.floor is None else f"{100 * row.floor / row.seconds:.0f}%",
        )
    return table


def _memory(report: Report) -> Table:
    table = _table("Memory", "", "what", "MB")
    for series, kind, size in report.memory:
        table.add_row(series, kind, f"{size / 1e6:,.1f}")
    return table


def _left_out(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Not measured", title_justify="left")
    for column in ("", "what", "why"):
        table.add_column(column)
    for row in report.left_out:
        table.add_row(*(Text(cell) for cell in row))  # others' words: no markup
    return table


def milliseconds(seconds: float) -> str:
    """Three digits, in ms below a second."""
    return f"{1e3 * seconds:.3g} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"
