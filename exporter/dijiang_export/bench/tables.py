"""`bench run` and `bench export` for people: tables of what was measured."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHOWN = ("spinning", "prepack", "lowering")
"""Of a runner's settings, beside the figures; the record has all."""
BUSY = 0.7
"""A load average above which figures are not worth quoting: half a core is at work on something else."""


def draw_run(result: dict[str, Any]) -> Group:
    """The tables of one measured bundle."""
    model, found = result["model"], result["bench"]
    where = f"{result['threads']} threads, {result['machine']['cpu']}"
    if result["device"] != "cpu":
        where = ", ".join(gpu["name"] for gpu in result["machine"]["gpus"][:1]) or "a GPU"
    told = ", ".join(
        f"{name} {value}" for name, value in result.get("settings", {}).items() if name in _SHOWN
    )
    head = (
        f"{model['name']}: {model['parameters'] / 1e6:.1f} M parameters, {_types(model, found)}\n"
        f"{found['runner']}, {where}{told and f'; {told}'}\n{result['validated']}"
    )
    parts: list[RenderableType] = [Text(head), _speed_table(result), _summary_table(result)]
    parts += [Text(f"note: {note}") for note in (*found["notes"], *_busy(result))]
    return Group(*parts)


def _types(model: dict[str, Any], found: dict[str, Any]) -> str:
    kind = model.get("weight_format", "float")  # older records have floats
    return str(found["dtype"]) if kind == "float" else f"{kind} weights, {found['dtype']}"


def _busy(result: dict[str, Any]) -> list[str]:
    load = result["load_average"]
    if load <= BUSY:
        return []
    note = f"other processes kept this machine busy (load {load:.1f} before the start): measure again"
    if result.get("settings", {}).get("spinning") in ("auto", "on"):
        note += "; where that is how it is used, --spinning off may be much faster"
    return [note]


def draw_export(result: dict[str, Any]) -> Group:
    """The table of one measured export, and of its run if there was one."""
    e = result["export"]
    table = Table(title=f"Export of {e['shape']} to {e['dtype']}, cases {e['cases']}", title_justify="left")
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("checkpoint, float16", f"{e['checkpoint_bytes'] / 1e9:.2f} GB"),
        ("bundle", f"{e['bundle_bytes'] / 1e9:.2f} GB"),
        ("copying the checkpoint", f"{e['copy_seconds']:.1f} s"),
        ("export, all", f"{e['export_seconds']:.1f} s"),
        ("export, without recording cases", f"{e['seconds_without_cases']:.1f} s ({e['copies']:.1f} copies)"),
        *((f"  of it {name}", f"{seconds:.1f} s") for name, seconds in e["parts"].items()),
        ("peak resident memory above torch", f"{e['rss_above'] / 1e6:.0f} MB"),
        ("peak proportional set above torch", f"{e['pss_above'] / 1e6:.0f} MB"),
        ("highest anonymous memory", f"{e['peak_anonymous'] / 1e6:.0f} MB"),
    ):
        table.add_row(name, value)
    parts: list[RenderableType] = [table, *(Text(f"note: {note}") for note in _busy(result))]
    return Group(*parts, *([draw_run(result["run"])] if "run" in result else []))


def _speed_table(result: dict[str, Any]) -> RenderableType:
    table = Table(title="Median time of one call", title_justify="left")
    for index, column in enumerate(("what", "time", "10% to 90%", "tokens/s", "PyTorch", "times faster")):
        table.add_column(column, justify="left" if index == 0 else "right")
    found, peers = result["bench"], result["reference"]
    for row in found["prefill"]:
        peer = None
        if peers is not None:
            same = [p for p in peers["prefill"] if p["length"] == row["length"] and p["form"] == "parallel"]
            peer = same[0]["timing"]["median"] if same and row["batch"] == 1 else None
        rows = "" if row["batch"] == 1 else f", {row['batch']} sequences"
        table.add_row(f"prefill of {row['length']} tokens{rows}", *_cells(row, peer))
    first = True
    for row in found["steps"]:
        peer = peers["step"]["median"] if peers is not None and row["batch"] == 1 and first else None
        first = False
        rows = "" if row["batch"] == 1 else f", {row['batch']} sequences"
        table.add_row(f"step at position {row['position']:,}{rows}", *_cells(row, peer))
        if row["gpu"] is not None:
            gpu = {"timing": row["gpu"], "tokens_per_second": row["batch"] / row["gpu"]["median"]}
            table.add_row(f"  of it on the GPU{rows}", *_cells(gpu, None))
    for row in found["loops"]:
        rows = "" if row["batch"] == 1 else f", {row['batch']} sequences"
        table.add_row(f"`generate`, a token from {row['position']:,} on{rows}", *_cells(row, None))
    return table


def _cells(row: dict[str, Any], peer: float | None) -> list[str]:
    timing = row["timing"]
    cells = [
        _time(timing["median"]),
        f"{_time(timing['low'])} to {_time(timing['high'])}",
        f"{row['tokens_per_second']:,.0f}"
        if row["tokens_per_second"] >= 100
        else f"{row['tokens_per_second']:.1f}",
    ]
    return [
        *cells,
        "-" if peer is None else _time(peer),
        "" if peer is None else f"{peer / timing['median']:.1f}",
    ]


def _summary_table(result: dict[str, Any]) -> RenderableType:
    found = result["bench"]
    derived, bandwidth = found["derived"], found["bandwidth"]
    table = Table(title="What follows", title_justify="left")
    table.show_header = False
    table.add_column()
    table.add_column(justify="right")
    rows = [
        ("step far from the beginning over near it", _ratio(derived["far_over_near"])),
        ("longest prefill, times faster than steps", _ratio(derived["prefill_over_steps"])),
        ("weights read by a step", f"{found['step_bytes'] / 1e6:.1f} MB"),
    ]
    for loop in found["loops"]:
        if loop["overhead"] is not None:
            name = f"`generate` beside the GPU's step, {loop['batch']} at {loop['position']:,}"
            rows.append((name, f"+{_time(loop['overhead'])}"))
    for kind, size in (found["memory"] or {}).items():
        rows.append((f"device memory, {kind}", f"{size / 1e6:,.1f} MB"))
    if bandwidth is not None:
        rows.append(("reading speed of this machine", f"{bandwidth['read'] / 1e9:.1f} GB/s"))
        if derived["bandwidth_share"] is not None:  # that of steps of one sequence, which may not be wanted
            rows.append(("of that, reached by steps", f"{100 * derived['bandwidth_share']:.0f}%"))
    startup = result["startup"]
    if startup is not None:
        rows.append(("`generate`, start to first text", f"{startup['first_output_seconds']:.2f} s"))
        rows.append(("`generate`, peak memory", f"{startup['peak_rss'] / 1e6:.0f} MB"))
    for row in rows:
        table.add_row(*row)
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"
