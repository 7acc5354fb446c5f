"""A picture of time per token over context, as SVG text: no package needed, the same bytes each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.atomic_file import check_output_file, output_file
from dijiang_export.bench.report.report import Point, Report

WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 290, 48, 56
"""Margins; the names of the series stand on the right."""
COLOURS = (
    "#0b6e4f", "#d1495b", "#2e86ab", "#edae49", "#6c4f9e", "#8a5a44", "#e07a5f", "#3d5a80", "#7a9e3f",
    "#c06c9b",
)  # fmt: skip
FLOOR_COLOUR = "#444444"
FONT = 'font-family="sans-serif"'


def check_plot(path: Path) -> None:
    """Raise if `path` cannot be drawn.

    Raises:
        UsageError: the name does not end in .svg.
        OutputError: the file cannot be written.
    """
    if path.suffix.lower() != ".svg":
        raise UsageError("cannot draw such a file", got=path.name, expected="a name in .svg")
    check_output_file(path)


def plot_report(report: Report, path: Path, *, batch: int | None = None) -> None:
    """Draw a report's decoding.

    Args:
        report: what.
        path: of the picture.
        batch: rows; default: the fewest that were measured.

    Raises:
        UsageError: another name than .svg, or nothing was measured at that batch.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    text = draw(report, batch)
    with output_file(path) as file:
        file.write(text.encode())


def draw(report: Report, batch: int | None = None) -> str:
    """The picture: both axes logarithmic, one line for each series, floors dashed.

    Raises:
        UsageError: nothing was measured at that batch.
    """
    decode = [p for p in report.points if p.phase == "decode" and p.seconds > 0]
    known = sorted({p.batch for p in decode})
    if not known or (batch is not None and batch not in known):
        raise UsageError(
            "there are no times per token to draw", got=f"batch {batch}" if batch else None,
            expected=f"a batch of {', '.join(map(str, known))}" if known else "records with decode steps",
        )  # fmt: skip
    rows = known[0] if batch is None else batch
    points = [p for p in decode if p.batch == rows]
    # Position 0 has no place on a logarithmic axis; one token is next to it.
    xs = _Axis([max(p.tokens, 1) for p in points], LEFT, WIDTH - RIGHT)
    ys = _Axis([1e3 * p.seconds for p in points], HEIGHT - BOTTOM, TOP)
    title = f"Time per token over context, {'one sequence' if rows == 1 else f'{rows} sequences'}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 26, title, 15),
        *_grid(xs, ys, sorted({max(p.tokens, 1) for p in points})),
    ]
    colours = iter(COLOURS * (1 + len(points) // len(COLOURS)))
    for index, name in enumerate(n for n in report.series("decode") if any(p.series == n for p in points)):
        floor = name.startswith("floor")
        colour = FLOOR_COLOUR if floor else next(colours)
        line = sorted((p for p in points if p.series == name), key=lambda p: p.tokens)
        parts += _line(line, xs, ys, colour, dash=["4 3", "1 3"][index % 2] if floor else None)
        y = TOP + 10 + 20 * index
        x = WIDTH - RIGHT + 16
        dashed = ' stroke-dasharray="4 3"' if floor else ""
        key = f'x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}"'
        parts.append(f'<line {key} stroke="{colour}" stroke-width="2"{dashed}/>')
        parts.append(_text(x + 28, y, name, 11))
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """A logarithmic scale from values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.04 * (high - low), 0.1)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Powers of ten inside, with their doubles and quintuples where there are few."""
        span = self.high - self.low
        digits = (1,) if span > 4 else (1, 3) if span > 2.5 else (1, 2, 5)
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [d * 10.0**e for e in exponents for d in digits]
        return [v for v in found if self.low <= math.log10(v) <= self.high]


def _grid(xs: _Axis, ys: _Axis, tokens: Sequence[int]) -> list[str]:
    parts = []
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in ys.ticks():
        y = ys(value)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", 11, "end"))
    last = -1e9
    for value in tokens:
        x = xs(value)
        parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{bottom}" stroke="#eeeeee"/>')
        if x - last >= 44:  # names that would touch are left out
            parts.append(_text(x, bottom + 18, f"{value:,}", 11, "middle"))
            last = x
    box = f'<rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"'
    parts.append(f'{box} fill="none" stroke="#888888"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 14, "tokens before it", 12, "middle"))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="18" y="{middle}" font-size="12" text-anchor="middle" '
        f'transform="rotate(-90 18 {middle})">milliseconds per token of every row</text>'
    )
    return parts


def _line(line: Sequence[Point], xs: _Axis, ys: _Axis, colour: str, dash: str | None) -> list[str]:
    places = [(xs(max(p.tokens, 1)), ys(1e3 * p.seconds)) for p in line]
    joined = " ".join(f"{x},{y}" for x, y in places)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    parts = [f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.8"{dashed}/>']
    if not dash:
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
    return parts


def _text(x: float, y: float, words: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
