"""The HTML report: complete, self-contained, safe to open, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.fakes.runner import ToyRunner, toy_case, write_reference
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_manifest

from dijiang_engines.errors import OutputError
from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.svg_plot import MOST_SERIES, PAGE, Axis, Series, plot
from dijiang_engines.validation.report.file import check_target, write_report
from dijiang_engines.validation.report.page import MARKER, report_html
from dijiang_engines.validation.tolerances import tolerance
from dijiang_engines.validation.validate import Report, validate
from dijiang_export.cli import main

MODEL = ToyModel.random(SPEC)
VOID = {"meta", "br"}
HOSTILE = "<script>alert('x')</script>&\"\ud800\x00"


class Reader(HTMLParser):
    """Tags must nest; collects text, attributes and tag names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    cases = {"short": toy_case(MODEL, [13, 7, 1], [0, 0, 0]), "far": toy_case(MODEL, [5, 5], [40, 3], seed=1)}
    return Reference(write_reference(path, cases), SPEC)


@pytest.fixture
def broken(reference: Reference) -> Report:
    """NaN in layer 1's state of row 0."""
    runner = ToyRunner(MODEL)

    def fault(_name: str, a: dict) -> None:
        a[1][0, 0, 0, 0] = np.nan
        a["logits"][0] = np.nan

    runner.tamper = fault
    return validate(runner, reference)


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_a_passing_report_says_everything(reference: Reference) -> None:
    report = validate(ToyRunner(MODEL), reference)
    page = report_html(report, [("model", "toy"), ("machine", "a CPU"), ("date", "today")])
    shown = Reader(page)
    assert "PASS" in shown.text and "FAIL" not in shown.text
    for word in ("toy on toy", "a CPU", "today", *(r.replay for r in report.results), "short", "far"):
        assert word in shown.text
    for quantity in ("logits", "state", "padding"):
        bounds = tolerance("float32", quantity)  # type: ignore[arg-type]
        assert bounds.reason in shown.text
        assert f"{bounds.max_error:g}" in shown.text
    assert "Failures" not in shown.text
    assert "--cases full" in shown.text  # no case is long enough for drift
    assert page.count("<tr") == 1 + len(report.results) + 1 + 3
    assert len(re.findall("<figure>", page)) == 4
    assert shown.text.count("tolerance 0.0001") == 3
    assert svgs(page)


def test_the_page_needs_nothing_else(reference: Reference, broken: Report) -> None:
    for report in (validate(ToyRunner(MODEL), reference), broken):
        page = report_html(report, [("model", "toy")])
        shown = Reader(page)
        assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(shown.tags)
        assert not {"src", "href", "style", "onload", "onclick"} & {name for name, _ in shown.attributes}
        assert set(re.findall(r"\w+://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg"}
        assert "url(" not in page and "@import" not in page
        assert "default-src 'none'" in page
        assert "prefers-color-scheme: dark" in page
        defined = set(re.findall(r"(--\w+):", page))
        assert set(re.findall(r"var\((--\w+)\)", page)) <= defined


def test_a_failing_report_names_the_first_failure(broken: Report) -> None:
    page = report_html(broken, [("model", "toy")])
    shown = Reader(page)
    assert "FAIL" in shown.text
    first = broken.first_failure
    assert first is not None and first.layer == 1
    assert f"First: {first.place}: {first.comparison.reason}" in shown.text
    assert f"The first {len(broken.failures)} of " in shown.text
    figures = page.split("<figure>")[1:]
    for figure, crosses in zip(figures, (1, 1, 1, 0), strict=True):
        assert ('class="bad"' in figure) == crosses
    by_layer = svgs(figures[0])[0]
    # Row 0's NaN is not hidden by other rows' small errors: layer 0 has a number, layer 1 none.
    assert len(marks(by_layer, "mark")) == len(marks(by_layer, "bad")) == 2  # short, far
    assert {x for x, _ in marks(by_layer, "mark")}.isdisjoint(x + 5 for x, _ in marks(by_layer, "bad"))
    assert "A cross at the top" in shown.text
    assert page.count('class="failed"') == len(broken.results)


def test_nothing_from_outside_becomes_markup(broken: Report, tmp_path: Path) -> None:
    worst = replace(
        broken,
        runner=HOSTILE,
        results=tuple(replace(r, case=HOSTILE, replay=HOSTILE) for r in broken.results),
        failures=tuple(
            replace(f, case=HOSTILE, comparison=replace(f.comparison, reason=HOSTILE))
            for f in broken.failures
        ),
    )
    page = report_html(worst, [("model", HOSTILE), (HOSTILE, HOSTILE)])
    write_report(tmp_path / "r.html", page)
    shown = Reader((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "script" not in shown.tags
    assert shown.text.count("<script>alert('x')</script>&\"\\ud800") > 10


def test_many_cases_are_drawn_up_to_a_limit(reference: Reference) -> None:
    report = validate(ToyRunner(MODEL), reference, cases=["short"], replays=["prefill"])
    many = replace(
        report, results=tuple(replace(report.results[0], case=f"case{i}") for i in range(MOST_SERIES + 3))
    )
    page = report_html(many, [])
    assert f"The first {MOST_SERIES} of {MOST_SERIES + 3} cases are drawn" in page
    assert "case10" in Reader(page).text  # in the table all the same


# Plots


def marks(svg: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    paths = [e.get("d") or "" for e in svg if (e.get("class") or "").split(" ")[0] == kind]
    return [(float(m[1]), float(m[2])) for d in paths if (m := re.match(r"M([\d.]+) ([\d.]+)", d))]


def test_values_stand_where_the_axes_say() -> None:
    page = plot(
        "a < b", [Series("x & y", [(100, 1e-2), (1, 1e-4), (10, 1e-3)])],
        Axis("tokens", log=True), Axis("error", log=True), (1e-1, "bound"),
    )  # fmt: skip
    svg = svgs(page)[0]
    points = marks(svg, "mark")
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    steps = np.diff(np.array(points), axis=0)
    assert np.allclose(steps[0], steps[1], atol=0.2)  # equal factors, equal distances
    assert steps[0][0] > 0 > steps[0][1]
    limit = next(e for e in svg if e.get("class") == "limit")
    height = float(re.match(r"M[\d.]+ ([\d.]+)", limit.get("d") or "")[1])  # type: ignore[index]
    assert height == pytest.approx(points[-1][1] + steps[0][1], abs=0.2)  # the next factor of ten
    labels = [e.text for e in svg.iter() if e.tag.endswith("text")]
    assert {"1", "10", "100", "1e-4", "0.1", "bound", "tokens", "error"} <= set(labels)
    assert "x &amp; y" in page and "a &lt; b" in page


def test_zero_and_no_number_are_drawn_at_the_edges() -> None:
    page = plot(
        "t", [Series("s", [(0, 0.0), (1, None), (2, 1e-3)])], Axis("x", whole=True), Axis("y", log=True)
    )
    svg = svgs(page)[0]
    points = marks(svg, "mark")
    assert len(points) == 2
    assert points[0][1] == pytest.approx(PAGE.floor)  # zero: the bottom
    crosses = marks(svg, "bad")
    assert len(crosses) == 1 and crosses[0][1] == PAGE.top
    assert marks(svg, "line") == points[:1]  # one path, that does not pass through what has no number
    assert len([e for e in svg if (e.get("class") or "").startswith("line")]) == 1


@pytest.mark.parametrize(
    "points", [[(1, 1.0)], [(1, 0.0)], [(1, None)], [(5, 1e-300), (6, 1e300)], [(3, 0.5), (3, 0.5)]]
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_values_make_a_drawing_all_the_same(points: list, log: bool) -> None:
    page = plot("t", [Series("s", points)], Axis("x", log=log), Axis("y", log=log))
    for svg in svgs(page):
        assert "nan" not in ElementTree.tostring(svg, "unicode")
    assert page.count("<text") < 60


def test_nothing_to_plot() -> None:
    assert "nothing to plot" in plot("t", [], Axis("x"), Axis("y"))
    assert "nothing to plot" in plot("t", [Series("s", [])], Axis("x"), Axis("y"))


# The file


def test_other_files_are_kept_unless_forced_and_reports_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.html"
    path.write_text("my notes")
    with pytest.raises(OutputError, match="not a report of this program") as info:
        check_target(path, MARKER)
    assert "--force" in str(info.value)
    check_target(path, MARKER, force=True)
    assert path.read_text() == "my notes"
    write_report(path, f"<!DOCTYPE html>\n{MARKER}\nold")
    check_target(path, MARKER)
    write_report(path, f"{MARKER}new")
    assert path.read_text() == f"{MARKER}new"
    assert os.listdir(tmp_path) == ["notes.html"]


def test_a_new_report_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_report(tmp_path / "r.html", MARKER)
    finally:
        os.umask(before)
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == 0o600


def test_the_marker_is_where_it_is_looked_for(reference: Reference, tmp_path: Path) -> None:
    report = validate(ToyRunner(MODEL), reference, cases=["far"], replays=["prefill"])
    write_report(tmp_path / "r.html", report_html(report, [("model", "x" * 1000)]))
    check_target(tmp_path / "r.html", MARKER)


def test_places_that_cannot_be_written_to_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "nowhere/r.html", "file/r.html", "x" * 300 + "/r.html"):
        with pytest.raises(OutputError):
            check_target(tmp_path / name, MARKER, force=True)
    with pytest.raises(OutputError, match="cannot write the output"):
        check_target(Path("/proc/report.html"), MARKER)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.html").write_text(MARKER)
    (tmp_path / "link.html").symlink_to("real.html")
    check_target(tmp_path / "link.html", MARKER)
    write_report(tmp_path / "link.html", "new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text() == "new"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OutputError, match="no space left to write") as info:
        write_report(path, "new")
    assert "No space left" in str(info.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.html"]


# The command


@pytest.fixture
def toy_with_cases(tmp_path: Path) -> Path:
    folder = tmp_path / "toy.bundle"
    model = make_bundle(folder)
    write_reference(folder / "reference.safetensors", {"short": toy_case(model, [13, 7, 1], [0, 0, 0])})
    write_manifest(folder, SPEC)
    return folder


def test_validate_writes_the_report(toy_with_cases: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = toy_with_cases.parent / "report.html"
    for _ in range(2):  # the second replaces the first
        assert main(["validate", str(toy_with_cases), "--report", str(path), "--threads", "1"]) == 0
    assert f"report: {path}" in capfd.readouterr().err
    shown = Reader(path.read_text(encoding="utf-8"))
    assert "PASS" in shown.text
    for fact in ("onnxruntime-cpu", "dijiang-export", "UTC", "float32", "gpt_neox", str(toy_with_cases)):
        assert fact in shown.text


def test_a_failed_validation_has_a_report_too(
    toy_with_cases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = toy_case(ToyModel.random(SPEC), [13, 7, 1], [0, 0, 0])
    case["state.1"][1, 1] *= 1.5
    write_reference(toy_with_cases / "reference.safetensors", {"short": case})
    write_manifest(toy_with_cases, SPEC)
    path = toy_with_cases.parent / "report.html"
    assert main(["validate", str(toy_with_cases), "--report", str(path)]) == 1
    assert "the state of layer 1, row 1" in capfd.readouterr().err
    shown = Reader(path.read_text(encoding="utf-8"))
    assert "First: the state of layer 1, row 1 after 7 tokens (short, prefill): relative error" in shown.text


def test_a_report_that_cannot_be_written_stops_before_the_work(
    toy_with_cases: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def long_work(*_: object, **__: object) -> None:
        raise AssertionError("began")

    monkeypatch.setattr("dijiang_engines.formats.open.open_model", long_work)
    notes = toy_with_cases.parent / "notes.txt"
    notes.write_text("mine")
    for target in (notes, toy_with_cases.parent / "nowhere" / "r.html"):
        assert main(["validate", str(toy_with_cases), "--report", str(target)]) == 1
        assert str(target) in capfd.readouterr().err
    assert notes.read_text() == "mine"
    monkeypatch.undo()
    assert main(["validate", str(toy_with_cases), "--report", str(notes), "--force"]) == 0
    assert MARKER in notes.read_text()
