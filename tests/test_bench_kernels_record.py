"""docs/performance.md quotes the record of `bench kernels`, cell by cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from dijiang_export.bench_kernels import read_record, wrong
from dijiang_export.bench_kernels_draw import markdown_table
from dijiang_export.bench_kernels_plan import plan_cells

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs/evidence/kernels-bench-h200.json"

NOT_REACHED = ("prefill", 8, 256, 8, 2048)  # the run's time was up; the page says so


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_page_shows_the_records_tables(phase: str) -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert markdown_table(read_record(RECORD), phase) in page


def test_the_page_names_what_the_record_was_measured_with() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    record = read_record(RECORD)
    assert f"{record['ceilings']['copy']['per_second'] / 1e12:.2f} TB/s" in page
    assert f"{record['ceilings']['matmul']['per_second'] / 1e12:.0f} TFLOP/s" in page
    for name in ("torch", "triton", "fla-core"):
        assert record["versions"][name] in page
    assert record["gpu"]["name"] in page


def test_the_record_is_whole_and_right() -> None:
    record = read_record(RECORD)
    sizes = [(c["phase"], c["heads"], c["head_dim"], c["batch"], c["length"]) for c in record["cells"]]
    planned = [(c.phase, c.shape.heads, c.shape.head_dim, c.batch, c.length) for c in plan_cells()]
    assert sizes == [size for size in planned if size != NOT_REACHED]
    assert wrong(record) == []
    assert record["settings"]["dtype"] == "float16"
    assert record["library"]["sha256"]
    for cell in record["cells"]:
        assert {"ours", "fla", "fla-phi", "copy"} <= set(cell["results"])
        assert all(result.get("right") for result in cell["results"].values()), cell
