"""The result of `bench sampling` as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dijiang_export.bench.cells.tables import draw_cells, error

if TYPE_CHECKING:
    from rich.console import Group

LEGEND = (
    "Times are medians in µs of a choice in a CUDA graph. torch: PyTorch's operators as decoding loops put "
    "them together; torch-compile: the same through torch.compile. floor: the logits' bytes at the rate of a "
    "large copy; they fit the cache, where a step leaves them, so a choice can take less. error: the share "
    "of tokens that differ from the host's, by rounding. top-k: 50; top-p: 0.9; top-k-top-p: 50 and 0.95; "
    "all: top-k 400, top-p 0.95, min-p 0.002, temperature 0.8."
)


def draw_choices(record: dict[str, Any]) -> Group:
    """One table under what was measured with what."""
    columns = {"error": error("ours")}
    return draw_cells(record, "Choosing tokens", ("ours", "torch", "torch-compile"), columns, LEGEND)
