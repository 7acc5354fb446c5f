"""Line plots as SVG text, for machines without a plotting library: the same bytes for the same values.

    plot       an element for an HTML page, its legend below it. Colours come from the page's CSS (classes
               line, mark, grid, limit, limit-text, bad, s0 to s7), so that one drawing serves light and dark
    picture    a file of its own, with title, legend and colours in it

Series differ in their marks too, not in colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MOST_SERIES = 8
"""How many colours and marks a page has; a picture of more goes round them."""
_MOST_TICKS = 9
_LEAST_GAP = 44
"""Pixels between the middles of labels below a plot; those that would touch are left out."""
_COLOURS = ("#0b6e4f", "#d1495b", "#2e86ab", "#c98a0c", "#6c4f9e", "#8a5a44", "#e07a5f", "#3d5a80")
_STYLE = (
    "text{font:11px sans-serif;fill:#222}.title{font-size:15px}path{fill:none}.paper{fill:#fff}"
    ".grid{stroke:#ddd}.line{stroke-width:1.8}"
    ".dashed{stroke:#444;stroke-dasharray:4 3}.dashed.odd{stroke-dasharray:1 3}"
    ".limit{stroke:#c62828;stroke-dasharray:6 4}.limit-text{fill:#c62828}.bad{stroke:#c62828;stroke-width:2}"
    + "".join(f".s{i}{{stroke:{c}}}.mark.s{i}{{fill:{c}}}" for i, c in enumerate(_COLOURS))
)


@dataclass(frozen=True)
class Frame:
    """Where the lines are in a drawing; pixels."""

    width: int
    height: int
    left: int
    """Margin, as the next three."""
    right: int
    top: int
    bottom: int

    @property
    def end(self) -> int:
        """Right edge of the lines' area."""
        return self.width - self.right

    @property
    def floor(self) -> int:
        """Lower edge of the lines' area."""
        return self.height - self.bottom


PAGE = Frame(720, 330, left=70, right=26, top=14, bottom=46)
PICTURE = Frame(900, 520, left=70, right=290, top=48, bottom=56)
"""The names of the series stand on the right."""


@dataclass(frozen=True)
class Series:
    """One line. A y of None is a value that is not a number, drawn as a cross at the top."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False
    """For what was not measured but follows: dashes without marks. In pictures only."""


@dataclass(frozen=True)
class Axis:
    """What is drawn along one direction."""

    label: str
    log: bool = False
    whole: bool = False
    """Ticks at whole numbers only; without `log`."""
    percent: bool = False
    """Values are shares from 0 to 1."""
    snug: bool = False
    """With `log`: ends just beyond the values instead of at powers of ten."""
    ticks: Sequence[float] | None = None
    """Where to draw ticks instead of at round numbers; with `snug`."""


Limit = tuple[float, str]
"""Where a horizontal line is, and what it stands for."""


def plot(title: str, series: Sequence[Series], x: Axis, y: Axis, limit: Limit | None = None) -> str:
    """Draw lines over one another, for an HTML page.

    Args:
        title: says what is seen, for those who cannot see it; not drawn.
        series: the first `MOST_SERIES` are drawn.
        x: values must be positive if `log`.
        y: on a logarithmic axis, zero is drawn at the bottom.
        limit: a horizontal line.

    Returns:
        An `svg` element and its legend, or a paragraph if there is no point.
    """
    drawn = [one for one in series if one.points][:MOST_SERIES]
    if not drawn:
        return '<p class="note">nothing to plot</p>'
    parts = [_head(PAGE), f"<title>{escape(title)}</title>", *_lines(PAGE, drawn, x, y, limit), "</svg>"]
    return "".join(parts) + _list(drawn)


def picture(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Draw lines over one another, as the text of an .svg file.

    Args:
        title: above the lines.
        series: at least one with a point; in the order of the legend.
        x: as for `plot`.
        y: as for `plot`.
    """
    drawn = [one for one in series if one.points]
    parts = [
        _head(PICTURE),
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{PICTURE.width}" height="{PICTURE.height}"/>',
        f'<text class="title" x="{PICTURE.left}" y="26">{escape(title)}</text>',
        *_lines(PICTURE, drawn, x, y),
        *_column(drawn),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _head(frame: Frame) -> str:
    size = f'viewBox="0 0 {frame.width} {frame.height}"'
    return f'<svg {size} role="img" xmlns="http://www.w3.org/2000/svg">'


def _lines(frame: Frame, drawn: Sequence[Series], x: Axis, y: Axis, limit: Limit | None = None) -> list[str]:
    """Everything within a frame: axes, grid, limit and lines."""
    across = _Scale(x, [px for one in drawn for px, _ in one.points], frame.left, frame.end)
    values = [py for one in drawn for _, py in one.points if py is not None]
    up = _Scale(y, [*values, *([limit[0]] if limit else [])], frame.floor, frame.top)
    parts = _grid(frame, across, up)
    if limit is not None:
        parts += _limit(frame, limit, up)
    for index, one in enumerate(drawn):
        parts += _line(frame, index, one, across, up)
    return parts


class _Scale:
    """Values of one axis -> pixels, and where its ticks are."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        if axis.log and axis.snug:
            self._snug(values)
        elif axis.log:
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

    def _snug(self, values: Sequence[float]) -> None:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = max(0.04 * (high - low), 0.1)
        self.low, self.high = low - room, high + room
        span = self.high - self.low
        digits = (1,) if span > 4 else (1, 3) if span > 2.5 else (1, 2, 5)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        ticks = self.axis.ticks or [digit * 10.0**power for power in powers for digit in digits]
        self.ticks = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]

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
        if self.axis.log and not (0.01 if self.axis.snug else 0.1) <= tick < 1e5:
            return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
        return f"{tick:,.12g}"


def _round_step(step: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    rounded = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)
    return max(rounded, 1.0) if whole else rounded


def _grid(frame: Frame, across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for tick in up.ticks:
        height = up.place(tick)
        parts.append(f'<path class="grid" d="M{frame.left} {height:.1f}H{frame.end}"/>')
        parts.append(
            f'<text x="{frame.left - 6}" y="{height + 4:.1f}" text-anchor="end">{up.text(tick)}</text>'
        )
    last = -math.inf
    for tick in across.ticks:
        place = across.place(tick)
        parts.append(f'<path class="grid" d="M{place:.1f} {frame.top}V{frame.floor}"/>')
        if place - last >= _LEAST_GAP:
            last = place
            parts.append(
                f'<text x="{place:.1f}" y="{frame.floor + 16}" text-anchor="middle">'
                f"{across.text(tick)}</text>"
            )
    middle = (frame.top + frame.floor) / 2
    parts.append(
        f'<text x="{(frame.left + frame.end) / 2:.0f}" y="{frame.height - 8}" text-anchor="middle">'
        f"{escape(across.axis.label)}</text>"
    )
    parts.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(up.axis.label)}</text>"
    )
    return parts


def _limit(frame: Frame, limit: Limit, up: _Scale) -> list[str]:
    height = up.place(limit[0])
    below = height + 14 if height < frame.top + 16 else height - 5
    return [
        f'<path class="limit" d="M{frame.left} {height:.1f}H{frame.end}"/>',
        f'<text class="limit-text" x="{frame.end}" y="{below:.1f}" text-anchor="end">'
        f"{escape(limit[1])}</text>",
    ]


def _look(index: int, series: Series) -> str:
    """The class of a line, which decides its colour and its dashes."""
    if series.dashed:
        return "dashed odd" if index % 2 else "dashed"
    return f"s{index % MOST_SERIES}"


def _line(frame: Frame, index: int, series: Series, across: _Scale, up: _Scale) -> list[str]:
    look = _look(index, series)
    places = [(across.place(px), None if py is None else up.place(py)) for px, py in sorted_points(series)]
    path, pen = [], "M"
    for px, py in places:
        if py is None:
            pen = "M"
            continue
        path.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
    parts = [f'<path class="line {look}" d="{"".join(path)}"/>'] if len(path) > 1 else []
    if series.dashed and len(path) > 1:
        return parts
    parts += [
        f'<path class="bad" d="M{px - 5:.1f} {frame.top}l10 10m0 -10l-10 10"/>'
        if py is None
        else f'<path class="mark {look}" d="{_mark(index, px, py)}"/>'
        for px, py in places
    ]
    return parts


def sorted_points(series: Series) -> list[tuple[float, float | None]]:
    """From left to right."""
    return sorted(series.points, key=lambda point: point[0])


def _mark(index: int, x: float, y: float) -> str:
    """Circle, square, triangle or diamond, small or large."""
    r = 3.2 if index % MOST_SERIES < 4 else 4.6
    start = f"M{x:.1f} {y:.1f}"
    shapes = (
        f"m-{r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 -{2 * r} 0z",
        f"m-{r} -{r}h{2 * r}v{2 * r}h-{2 * r}z",
        f"m0 -{r}l{r} {2 * r}h-{2 * r}z",
        f"m0 -{r + 0.8}l{r + 0.8} {r + 0.8}l-{r + 0.8} {r + 0.8}l-{r + 0.8} -{r + 0.8}z",
    )
    return start + shapes[index % len(shapes)]


def _key(index: int, series: Series, x: float, y: float) -> str:
    """A short piece of a line for a legend, its middle at x, y."""
    look = _look(index, series)
    line = f'<path class="line {look}" d="M{x - 10:g} {y:g}h20"/>'
    return line if series.dashed else f'{line}<path class="mark {look}" d="{_mark(index, x, y)}"/>'


def _list(drawn: Sequence[Series]) -> str:
    """The legend below a plot on a page."""
    items = [
        f'<li><svg viewBox="0 0 22 14" aria-hidden="true">{_key(i, one, 11, 7)}</svg>{escape(one.name)}</li>'
        for i, one in enumerate(drawn)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _column(drawn: Sequence[Series]) -> list[str]:
    """The legend of a picture, on the right."""
    parts = []
    for index, one in enumerate(drawn):
        y = PICTURE.top + 10 + 20 * index
        parts.append(_key(index, one, PICTURE.end + 27, y - 4))
        parts.append(f'<text x="{PICTURE.end + 44}" y="{y}">{escape(one.name)}</text>')
    return parts
