"""Line plots as SVG text, for reports on machines without a plotting library.

Colours come from the page's CSS (classes line, mark, grid, limit, limit-text, bad, s0 to s7), so that one
drawing serves light and dark. Series differ in their marks too, not in colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 330
LEFT, RIGHT, TOP, BOTTOM = 70, 26, 14, 46
MOST_SERIES = 8
"""How many colours and marks there are."""
_MOST_TICKS = 9


@dataclass(frozen=True)
class Series:
    """One line. A y of None is a value that is not a number, drawn as a cross at the top."""

    name: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Axis:
    """What is drawn along one direction."""

    label: str
    log: bool = False
    whole: bool = False
    """Ticks at whole numbers only; without `log`."""
    percent: bool = False
    """Values are shares from 0 to 1."""


def plot(
    title: str, series: Sequence[Series], x: Axis, y: Axis, limit: tuple[float, str] | None = None
) -> str:
    """Draw lines over one another.

    Args:
        title: says what is seen, for those who cannot see it; not drawn.
        series: the first `MOST_SERIES` are drawn.
        x: values must be positive if `log`.
        y: on a logarithmic axis, zero is drawn at the bottom.
        limit: a horizontal line and what it stands for.

    Returns:
        An `svg` element, or a paragraph if there is no point.
    """
    drawn = [one for one in series if one.points][:MOST_SERIES]
    if not drawn:
        return '<p class="note">nothing to plot</p>'
    across = _Scale(x, [px for one in drawn for px, _ in one.points], LEFT, WIDTH - RIGHT)
    values = [py for one in drawn for _, py in one.points if py is not None]
    up = _Scale(y, [*values, *([limit[0]] if limit else [])], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title>",
        *_grid(across, up),
    ]
    if limit is not None:
        height = up.place(limit[0])
        parts.append(f'<path class="limit" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        below = height + 14 if height < TOP + 16 else height - 5
        parts.append(
            f'<text class="limit-text" x="{WIDTH - RIGHT}" y="{below:.1f}" text-anchor="end">'
            f"{escape(limit[1])}</text>"
        )
    for index, one in enumerate(drawn):
        parts += _line(index, one, across, up)
    parts.append("</svg>")
    return "".join(parts) + _legend([one.name for one in drawn])


class _Scale:
    """Values of one axis -> pixels, and where its ticks are."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        if axis.log:
            positive = [value for value in values if value > 0] or [1e-9, 1.0]
            first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
            self.low, self.high = float(first), float(max(last, first + 1))
            step = max(1, math.ceil((self.high - self.low) / _MOST_TICKS))
            self.ticks = [10.0**power for power in range(first, int(self.high) + 1, step)]
        elif axis.percent:
            self.low, self.high = min(0.9, math.floor(min(values, default=0) * 10) / 10), 1.0
            self.ticks = [self.low + (1 - self.low) * k / 5 for k in range(6)]
        else:
            self.low, self.high = min(values, default=0), max(values, default=1)
            if self.low == self.high:
                self.low, self.high = self.low - 0.5, self.high + 0.5
            step_ = _round_step((self.high - self.low) / _MOST_TICKS, axis.whole)
            first = math.ceil(self.low / step_)
            self.ticks = [k * step_ for k in range(first, math.floor(self.high / step_) + 1)]

    def place(self, value: float) -> float:
        """Pixels from the left or the top."""
        if self.axis.log:
            value = math.log10(value) if value > 0 else self.low
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def text(self, tick: float) -> str:
        """A tick's label."""
        if self.axis.percent:
            return f"{100 * tick:.3g}%"
        if self.axis.log and not 0.1 <= tick < 1e5:
            return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
        return f"{tick:,.12g}"


def _round_step(step: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    rounded = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)
    return max(rounded, 1.0) if whole else rounded


def _grid(across: _Scale, up: _Scale) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in up.ticks:
        height = up.place(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{up.text(tick)}</text>')
    for tick in across.ticks:
        place = across.place(tick)
        parts.append(f'<path class="grid" d="M{place:.1f} {TOP}V{bottom}"/>')
        parts.append(
            f'<text x="{place:.1f}" y="{bottom + 16}" text-anchor="middle">{across.text(tick)}</text>'
        )
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(across.axis.label)}</text>"
    )
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(up.axis.label)}</text>"
    )
    return parts


def _line(index: int, series: Series, across: _Scale, up: _Scale) -> list[str]:
    places = [(across.place(px), None if py is None else up.place(py)) for px, py in sorted_points(series)]
    path, pen = [], "M"
    for px, py in places:
        if py is None:
            pen = "M"
            continue
        path.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    parts = [f'<path class="line s{index}" d="{"".join(path)}"/>'] if len(path) > 1 else []
    parts += [
        f'<path class="bad" d="M{px - 5:.1f} {TOP}l10 10m0 -10l-10 10"/>'
        if py is None
        else f'<path class="mark s{index}" d="{_mark(index, px, py)}"/>'
        for px, py in places
    ]
    return parts


def sorted_points(series: Series) -> list[tuple[float, float | None]]:
    """From left to right."""
    return sorted(series.points, key=lambda point: point[0])


def _mark(index: int, x: float, y: float) -> str:
    """Square, diamond, triangle or circle, small or large."""
    r = 3.2 if index < 4 else 4.6
    start = f"M{x:.1f} {y:.1f}"
    shapes = (
        f"m-{r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 -{2 * r} 0z",
        f"m-{r} -{r}h{2 * r}v{2 * r}h-{2 * r}z",
        f"m0 -{r}l{r} {2 * r}h-{2 * r}z",
        f"m0 -{r + 0.8}l{r + 0.8} {r + 0.8}l-{r + 0.8} {r + 0.8}l-{r + 0.8} -{r + 0.8}z",
    )
    return start + shapes[index % len(shapes)]


def _legend(names: Sequence[str]) -> str:
    items = [
        f'<li><svg viewBox="0 0 22 14" aria-hidden="true"><path class="line s{i}" d="M1 7H21"/>'
        f'<path class="mark s{i}" d="{_mark(i, 11, 7)}"/></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
