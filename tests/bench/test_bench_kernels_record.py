"""docs/performance.md quotes the record of `bench kernels`, cell by cell."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from support.makers.record_mutants import mutants
from support.paths import ROOT

from dijiang_export.bench.kernels.cells import make_cells
from dijiang_export.bench.kernels.plot import roofline, series
from dijiang_export.bench.kernels.record import read_record, requote, wrong
from dijiang_export.bench.kernels.tables import draw_kernels, markdown_table
from dijiang_export.bench.report.records import RecordError


def test_a_record_with_any_value_is_refused_or_drawn(tmp_path: Path) -> None:
    whole = json.loads(RECORD.read_text())
    whole["cells"] = [whole["cells"][0], whole["cells"][-1]]
    wrong_one = {"right": False, "errors": {"output": "nan", "state": 1.0}, "single": None, "rotated": None}
    whole["cells"][0]["results"] |= {"fla": {"skipped": "[red]no"}, "other": wrong_one}
    path = tmp_path / "x.json"
    refused = taken = 0
    shown = set()
    for at, _, document in mutants(whole):
        path.write_text(json.dumps(document))
        try:
            record = read_record(path)
        except RecordError as error:
            refused += 1
            assert "\x1b" not in str(error) and len(str(error)) < 3000  # noqa: PT017
            continue
        taken += 1
        requote(record, "rotated")
        wrong(record)
        roofline(record)
        for phase in ("decode", "prefill"):
            markdown_table(record, phase)
            series(record, phase, 16, 64)
        if at not in shown:
            shown.add(at)
            Console(file=io.StringIO(), width=300, markup=False).print(draw_kernels(record))
    assert refused > 500 and taken > 100


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
    wanted = [(c.phase, c.shape.heads, c.shape.head_dim, c.batch, c.length) for c in make_cells()]
    assert sizes == [size for size in wanted if size != NOT_REACHED]
    assert wrong(record) == []
    assert record["settings"]["dtype"] == "float16"
    assert record["library"]["sha256"]
    for cell in record["cells"]:
        assert {"ours", "fla", "fla-phi", "copy"} <= set(cell["results"])
        assert all(result.get("right") for result in cell["results"].values()), cell
