"""The result of `bench step` as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dijiang_export.bench.cells.tables import draw_cells, error, microseconds, over_floor

if TYPE_CHECKING:
    from rich.console import Group

LEGEND = (
    "Times are medians in µs of a step in a CUDA graph at position 100. one launch: dijiang_step. launches: "
    "products, attention, products, three launches a layer. cublas, tinygemm: the bare matrix products, "
    "tinygemm in int4 with bfloat16 activations. floor: the weights' bytes at the rate of a large copy. "
    "far: position 100,000."
)


def draw_steps(record: dict[str, Any]) -> Group:
    """One table under what was measured with what."""
    return draw_cells(
        record, "A decoding step", ("one launch", "launches", "cublas", "tinygemm"),
        {
            "of the floor": over_floor("one launch"),
            "far": lambda cell: microseconds(cell["results"].get("one launch"), "far"),
            "error": error("one launch"),
        },
        LEGEND,
    )  # fmt: skip
