"""A picture of time per token over context, as an SVG file: no package is needed."""

from __future__ import annotations

from pathlib import Path

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.atomic_file import check_output_file, output_file
from dijiang_engines.svg_plot import Axis, Series, picture
from dijiang_export.bench.report.report import Report


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
    lines: dict[str, list[tuple[float, float | None]]] = {name: [] for name in report.series("decode")}
    for p in decode:
        if p.batch == rows:
            # Position 0 has no place on a logarithmic axis; one token is next to it.
            lines[p.series].append((max(p.tokens, 1), 1e3 * p.seconds))
    tokens = sorted({x for points in lines.values() for x, _ in points})
    return picture(
        f"Time per token over context, {'one sequence' if rows == 1 else f'{rows} sequences'}",
        [Series(name, points, dashed=name.startswith("floor")) for name, points in lines.items()],
        Axis("tokens before it", log=True, snug=True, ticks=tokens),
        Axis("milliseconds per token of every row", log=True, snug=True),
    )
