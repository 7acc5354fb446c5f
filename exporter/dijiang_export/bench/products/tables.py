"""The result of `bench products` as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dijiang_export.bench.cells.tables import draw_cells, error, microseconds, over_floor

if TYPE_CHECKING:
    from rich.console import Group

LEGEND = (
    "Times are medians in µs of all products in a CUDA graph. Up to 16 rows: of a step, with the head and "
    "with norms inside; more rows: of eight layers. cublas, tinygemm: the bare products, cublas with float "
    "weights, tinygemm in int4 with bfloat16 activations. floor: the weights' bytes at the rate of a large "
    "copy. first: qkv, gate and the MLP's first product; second: dense and the MLP's second."
)


def draw_products(record: dict[str, Any]) -> Group:
    """One table under what was measured with what."""
    return draw_cells(
        record, "Matrix products", ("ours", "cublas", "tinygemm"),
        {
            "of the floor": over_floor("ours"),
            "TFLOP/s": _rate,
            "of cublas' rate": _share,
            **{part: _part(part) for part in ("first", "second", "head")},
            "error": error("ours"),
        },
        LEGEND,
    )  # fmt: skip


def _median(cell: Mapping[str, Any], name: str) -> float | None:
    timing = cell["results"].get(name, {}).get("timing")
    return None if timing is None else float(timing["median"])


def _rate(cell: Mapping[str, Any]) -> str:
    median = _median(cell, "ours")
    return "" if median is None else f"{cell['operations'] / median / 1e12:.1f}"


def _share(cell: Mapping[str, Any]) -> str:
    ours, cublas = _median(cell, "ours"), _median(cell, "cublas")
    return "" if ours is None or cublas is None else f"{cublas / ours:.0%}"


def _part(name: str) -> Any:
    def column(cell: Mapping[str, Any]) -> str:
        ours = cell["results"].get("ours", {})
        return microseconds(ours, name) if name in ours else ""

    return column
