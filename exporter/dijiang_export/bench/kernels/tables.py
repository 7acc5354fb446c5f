"""The result of `bench kernels` as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dijiang_export.bench.kernels.cells import geometric_mean
from dijiang_export.bench.kernels.record import cell_name, medians

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

ORDER = ("ours", "fla", "fla-phi", "torch-compile", "copy")
LEGEND = (
    "Times are medians in µs of one call in a CUDA graph. single: all calls use one set of tensors; rotated: "
    "they go round sets, together three times the L2 cache. floor: the op's bytes and operations at measured "
    "ceilings. of copy: the op's bytes over its time, of the copy's rate. fla computes the recurrence alone; "
    "fla-phi adds the feature map."
)


def draw_kernels(record: dict[str, Any]) -> Group:
    """Two tables, the quoted figures and the others, under what was measured with what."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(_head(record))]
    for phase, title in (("decode", "Decode, one token of each row"), ("prefill", "Prefill")):
        cells = [cell for cell in record["cells"] if cell["phase"] == phase]
        if cells:
            parts.append(_table(record, cells, title))
    parts.append(Text(LEGEND))
    parts += [Text(f"absent: {name}: {why}") for name, why in record["absent"].items()]
    parts += [Text(f"note: {note}") for note in (*record["notes"], *_notes(record))]
    return Group(*parts)


def contestants(record: dict[str, Any]) -> list[str]:
    """Who was measured or tried at any cell, in the tables' order."""
    seen = {name for cell in record["cells"] for name in cell["results"]}
    return [name for name in ORDER if name in seen] + sorted(seen - set(ORDER))


def describe_cell(cell: dict[str, Any]) -> str:
    """One measured cell in a line."""
    words = []
    for name, result in cell["results"].items():
        said = result.get("skipped") or result_cell(result, "single")
        wrong = "" if result.get("right", True) else f" {result['errors']}"
        words.append(f"{name} {said}{wrong}")
    return f"{cell_name(cell)}: {', '.join(words)}"


def markdown_table(record: dict[str, Any], phase: str) -> str:
    """The table of one phase as docs/performance.md shows it.

    The quoted figures of ours, fla, fla-phi and the copy, what follows from them, and the other figures of
    ours and fla.
    """
    quoted = record["settings"]["quoted"]
    other = "rotated" if quoted == "single" else "single"
    names = ("ours", "fla", "fla-phi", "copy")
    head = ["heads", "B" if phase == "decode" else "B, L", "ours", "fla", "fla + φ", "copy", "floor"]
    head += ["of copy rate", "fla / ours", f"{other}: ours", "fla"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in record["cells"]:
        if cell["phase"] != phase:
            continue
        derived, results = cell["derived"], cell["results"]
        ratio, share = derived["ratios"].get("fla"), derived["share_of_copy"]
        row = [
            f"{cell['heads']}×{cell['head_dim']}",
            str(cell["batch"]) if phase == "decode" else f"{cell['batch']}, {cell['length']}",
            *(result_cell(results.get(name), quoted) for name in names),
            _microseconds(derived["floor"]),
            "" if share is None else f"{100 * share:.0f}%",
            "" if ratio is None else f"{ratio:.2f}",
            *(result_cell(results.get(name), other) for name in ("ours", "fla")),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _head(record: dict[str, Any]) -> str:
    gpu, versions, library = record["gpu"], record["versions"], record["library"]
    packages = ", ".join(f"{n} {versions[n]}" for n in ("torch", "triton", "fla-core") if n in versions)
    ceilings = record["ceilings"]
    lines = [
        f"{gpu['name']}, CUDA {gpu['cuda']}, {packages}; {record['settings']['dtype']}, float32 state",
        f"copy {ceilings['copy']['per_second'] / 1e12:.2f} TB/s, "
        f"matrix product {ceilings['matmul']['per_second'] / 1e12:.0f} TFLOP/s",
    ]
    if library is not None:
        lines.append(f"ours: {library['version']}, {library['architectures']}, {library['sha256'][:12]}")
    return "\n".join(lines)


def _table(record: dict[str, Any], cells: list[dict[str, Any]], title: str) -> Table:
    from rich.table import Table

    names = contestants(record)
    quoted = record["settings"]["quoted"]
    table = Table(title=f"{title} ({quoted} buffers)", title_justify="left")
    other = "rotated" if quoted == "single" else "single"
    others = [name for name in ("ours", "fla") if name in names]
    columns = ["heads", "B", "L", *names, "fla/ours", "floor", "over floor", "of copy"]
    columns += [f"{name}, {other}" for name in others]
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    previous = None
    for cell in cells:
        size = f"{cell['heads']}x{cell['head_dim']}"
        derived = cell["derived"]
        row = [size if size != previous else "", str(cell["batch"]), str(cell["length"])]
        row += [result_cell(cell["results"].get(name), quoted) for name in names]
        row += [
            _factor(derived["ratios"].get("fla")),
            _microseconds(derived["floor"]),
            _factor(derived["over_floor"]),
            "" if derived["share_of_copy"] is None else f"{100 * derived['share_of_copy']:.0f}%",
            *(result_cell(cell["results"].get(name), other) for name in others),
        ]
        if previous not in (None, size):
            table.add_section()
        previous = size
        table.add_row(*row)
    return table


def result_cell(result: dict[str, Any] | None, figure: str) -> str:
    """One contestant's time at one cell, or why there is none."""
    if result is None or "skipped" in result:
        return "-"
    if not result["right"]:
        return "wrong"
    timing = result[figure]
    spread = (timing["high"] - timing["low"]) / timing["median"]
    return _microseconds(timing["median"]) + (f" ±{50 * spread:.0f}%" if spread > 0.04 else "")


def _notes(record: dict[str, Any]) -> list[str]:
    """Reasons for missing figures, and the whole in a line for each phase."""
    found = []
    for name in contestants(record):
        results = [(cell, cell["results"].get(name)) for cell in record["cells"]]
        reasons: dict[str, int] = {}
        for _, result in results:
            if result is None:
                continue
            if "skipped" in result:
                reasons[result["skipped"]] = reasons.get(result["skipped"], 0) + 1
            elif not result["right"]:
                errors = ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}"
                                   for k, v in result["errors"].items())  # fmt: skip
                why = f"wrong results ({errors})"
                reasons[why] = reasons.get(why, 0) + 1
        found += [f"{name} at {count} sizes: {reason}" for reason, count in reasons.items()]
    for phase in ("decode", "prefill"):
        quoted = record["settings"]["quoted"]
        cells = [medians(c["results"], quoted) for c in record["cells"] if c["phase"] == phase]
        for peer in ("fla", "fla-phi", "torch-compile"):
            ratios = [c[peer] / c["ours"] for c in cells if peer in c and "ours" in c]
            mean = geometric_mean(ratios)
            if mean is not None:
                span = f"{min(ratios):.2f} to {max(ratios):.2f}"
                found.append(f"{phase}: {peer} takes {mean:.2f} times as long as ours ({span})")
    return found


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    value = 1e6 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
