"""The result of `bench kernels` as a picture: latency over batch and over length, and a roofline.

Needs matplotlib, which the extra `bench` brings; `series` and `roofline` say what is drawn without it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dijiang_engines.errors import OutputError, UsageError
from dijiang_engines.formats.atomic_file import check_output_file, output_file
from dijiang_export.bench.kernels.record import medians
from dijiang_export.bench.kernels.tables import contestants

FORMATS = (".svg", ".png")
_COLOURS = {
    "ours": "#0b6e4f", "fla": "#d1495b", "fla-phi": "#edae49", "torch-compile": "#66717e",
    "copy": "#7aa6c2", "floor": "#222222",
}  # fmt: skip

Points = list[tuple[float, float]]


def check_plot(path: Path) -> None:
    """Raise before anything is measured if `path` cannot be drawn.

    Raises:
        UsageError: neither .svg nor .png.
        OutputError: matplotlib is missing, or the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError("cannot draw such a file", got=path.name, expected="a name in .svg or .png")
    check_output_file(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError(
            "drawing needs the Python package matplotlib", hint="pip install 'dijiang-export[bench]'"
        )


def series(record: dict[str, Any], phase: str, heads: int, head_dim: int) -> dict[str, Points]:
    """Lines of one panel: (batch, µs) of decode steps, (tokens of all rows, µs) of prefills.

    By contestant, and "floor" where the ceilings are known; sorted by the first number.
    """
    lines: dict[str, Points] = {}
    for cell in record["cells"]:
        if (cell["phase"], cell["heads"], cell["head_dim"]) != (phase, heads, head_dim):
            continue
        x = float(cell["batch"] if phase == "decode" else cell["batch"] * cell["length"])
        found = medians(cell["results"], record["settings"]["quoted"])
        if cell["derived"]["floor"] is not None:
            found["floor"] = cell["derived"]["floor"]
        if phase == "prefill" and cell["batch"] > 1:  # beside the line over length, not on it
            found = {f"{name} B{cell['batch']}": value for name, value in found.items()}
        for name, value in found.items():
            lines.setdefault(name, []).append((x, 1e6 * value))
    return {name: sorted(points) for name, points in lines.items()}


def roofline(record: dict[str, Any]) -> dict[str, Points]:
    """By phase: (operations per byte, operations per second) of ours, or of fla where ours is absent."""
    points: dict[str, Points] = {}
    for cell in record["cells"]:
        found = medians(cell["results"], record["settings"]["quoted"])
        seconds = found.get("ours", found.get("fla"))
        if seconds is not None:
            operations = cell["derived"]["operations"]
            points.setdefault(cell["phase"], []).append(
                (operations / cell["derived"]["bytes"]["op"], operations / seconds)
            )
    return points


def plot_kernels(record: dict[str, Any], path: Path) -> None:
    """Draw a result.

    Args:
        record: as `measure_kernels` or `read_record` returns it.
        path: of the picture; the suffix decides its format.

    Raises:
        UsageError, OutputError: as `check_plot`; or the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dijiang"  # the same bytes for the same record
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be read and searched
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((cell["heads"], cell["head_dim"]) for cell in record["cells"]))
    phases = [p for p in ("decode", "prefill") if any(c["phase"] == p for c in record["cells"])]
    rows = len(phases) + 1
    figure = pyplot.figure(figsize=(3.6 * max(len(shapes), 2), 3.0 * rows), constrained_layout=True)
    try:
        grid = figure.add_gridspec(rows, max(len(shapes), 1))
        for row, phase in enumerate(phases):
            for column, shape in enumerate(shapes):
                axes = figure.add_subplot(grid[row, column])
                _panel(axes, series(record, phase, *shape), contestants(record))
                axes.set_title(f"{phase}, {shape[0]} heads of {shape[1]}", fontsize=9)
                axes.set_xlabel(
                    "rows" if phase == "decode" else "tokens (diamonds: of several rows)", fontsize=8
                )
                if column == 0:
                    axes.set_ylabel("µs per call", fontsize=8)
                if (row, column) == (0, 0):
                    axes.legend(fontsize=7)
        _draw_roofline(figure.add_subplot(grid[-1, :]), record)
        gpu, settings = record["gpu"]["name"], record["settings"]
        figure.suptitle(
            f"DijiangAttention on {gpu}, {settings['dtype']}, {settings['quoted']} buffers", fontsize=11
        )
        kind = path.suffix.lower()[1:]
        with output_file(path) as file:
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None, dpi=120)
    finally:
        pyplot.close(figure)


def _panel(axes: Any, lines: dict[str, Points], names: list[str]) -> None:
    for label in lines:
        name = label.split(" ")[0]
        if name not in (*names, "floor"):
            continue
        xs, ys = zip(*lines[label], strict=True)
        alone = label != name
        axes.plot(
            xs, ys, label=None if alone else name, color=_COLOURS.get(name, "#999999"),
            marker="D" if alone else "o", markersize=4 if alone else 3, linewidth=1.4,
            linestyle="none" if alone else "--" if name in ("floor", "copy") else "-",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.tick_params(labelsize=7)


def _draw_roofline(axes: Any, record: dict[str, Any]) -> None:
    copy = record["ceilings"]["copy"]["per_second"]
    matmul = record["ceilings"]["matmul"]["per_second"]
    points = roofline(record)
    xs = [x for found in points.values() for x, _ in found] or [1.0]
    low, high = min(xs) / 2, max(*xs, matmul / copy) * 2
    edge = matmul / copy
    axes.plot([low, edge, high], [low * copy / 1e12, matmul / 1e12, matmul / 1e12], color="#222222")
    for phase, marker in (("decode", "o"), ("prefill", "s")):
        if phase in points:
            at, rate = zip(*points[phase], strict=True)
            axes.scatter(at, [r / 1e12 for r in rate], marker=marker, s=18, label=phase)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of the op", fontsize=8)
    axes.set_ylabel("TFLOP/s", fontsize=8)
    axes.set_title("roofline: measured copy and matrix product", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
