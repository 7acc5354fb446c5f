"""bench kernels: its arithmetic, its sizes, its command, its tables and pictures. Timing needs a GPU; here a
stand-in for it returns set times, so that everything which follows from them can be checked."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import OutputError, UsageError
from dijiang_export.bench.about import find_commit
from dijiang_export.bench.kernels import cells as sizes
from dijiang_export.bench.kernels import measure as kernels_measure
from dijiang_export.bench.kernels import plot, warm
from dijiang_export.bench.kernels.cells import Cell, Shape
from dijiang_export.bench.kernels.gpu import Measured
from dijiang_export.bench.kernels.measure import PEER_NAMES, measure_kernels
from dijiang_export.bench.kernels.record import read_record, requote
from dijiang_export.bench.kernels.tables import draw_kernels, result_cell
from dijiang_export.bench.report.records import RecordError
from dijiang_export.cli import main

DECODE = Cell("decode", Shape(16, 64), 64, 1)
PREFILL = Cell("prefill", Shape(8, 256), 1, 8192)
COPY, MATMUL = 4.0e12, 800e12


def timing(median: float, spread: float = 0.01) -> Timing:
    return Timing(9, median, median * (1 - spread), median * (1 + spread), median * (1 - 2 * spread))


class FakeLab:
    """A GPU on which ours takes 10 µs a row, fla 15, and everything else what a test says."""

    def __init__(self, peers: Sequence[str] = PEER_NAMES, dtype: str = "float16", *,
                 library: Path | None = None, ours: bool = True) -> None:  # fmt: skip
        self.peers, self.dtype, self.ours, self.asked = tuple(peers), dtype, ours, library
        self.absent = {"torch-compile": "no compiler"} if "torch-compile" in peers else {}
        self.seen: list[Cell] = []
        self.right = True
        self.warmed = 0

    def describe(self) -> dict[str, Any]:
        return {"name": "Fake GPU", "cuda": "13.0", "l2_bytes": 1 << 20}

    def library(self) -> dict[str, Any] | None:
        return (
            {"version": "0.1.0", "architectures": "sm_90", "sha256": "ab" * 32, "path": "x.so"}
            if self.ours else None
        )  # fmt: skip

    def ceilings(self) -> dict[str, Any]:
        return {
            "copy": {"bytes": 1, "per_second": COPY},
            "matmul": {"size": 1, "timing": timing(1.0), "per_second": MATMUL},
        }

    def warm(self, cells: Sequence[Cell], jobs: int, progress: Any) -> list[str]:
        self.warmed = jobs
        return ["fla, decode 16x64: it did not compile"]

    def measure(self, cell: Cell, seconds: float) -> dict[str, Measured | str]:
        self.seen.append(cell)
        errors = {"output": 1e-4, "state": float("nan") if not self.right else 1e-5}

        def good(microseconds: float) -> Measured:
            t = microseconds * 1e-6 * cell.batch
            return Measured({"output": 1e-4, "state": 1e-5}, True, timing(2 * t), timing(t), 4, 8)

        found: dict[str, Measured | str] = {"fla": good(15), "copy": good(5)}
        if self.ours:
            found = {"ours": good(10) if self.right else Measured(errors, False)} | found
        return {n: f for n, f in found.items() if n == "ours" or n in self.peers} | {
            "fla-phi": "failed: no such kernel"
        }


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> list[FakeLab]:
    """Labs that the command opens; the first is there before it does, to be told what to return."""
    opened: list[FakeLab] = []
    wrong: list[bool] = []

    def open_lab(peers: Any, dtype: Any, **options: Any) -> FakeLab:
        made = FakeLab(peers, dtype, **options)
        made.right = not wrong
        opened.append(made)
        return made

    monkeypatch.setattr(kernels_measure, "open_lab", open_lab)
    monkeypatch.setattr(FakeLab, "fail", lambda: wrong.append(True), raising=False)
    return opened


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    cells = sizes.make_cells([Shape(16, 64), Shape(8, 256)], [1, 8], [(1, 512), (8, 2048)])
    return json.loads(json.dumps(measure_kernels(FakeLab(), cells), default=str))


# -- arithmetic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "microseconds"),
    [
        # Worked by hand: bytes of state (decode), q, k, v and o over 4.25e12, or operations over 790e12.
        (Cell("decode", Shape(16, 64), 1, 1), (2 * 4 * 16 * 64 * 64 + 2 * 4 * 16 * 64) / 4.25e6),
        (Cell("decode", Shape(32, 128), 256, 1), 256 * (2 * 4 * 32 * 128**2 + 2 * 4 * 32 * 128) / 4.25e6),
        (Cell("prefill", Shape(16, 64), 1, 512), 512 * 4 * 1024 * 2 / 4.25e6),
        (Cell("prefill", Shape(32, 128), 8, 2048), 8 * 2048 * 4 * 4096 * 2 / 4.25e6),
        (Cell("prefill", Shape(8, 256), 1, 8192), 8192 * 8 * (8 * 256**2 + 4 * 64 * 256) / 790e6),
    ],
    ids=str,
)
def test_the_core_floor(cell: Cell, microseconds: float) -> None:
    assert 1e6 * sizes.core_floor_seconds(cell, "float16") == pytest.approx(microseconds)


def test_the_bytes_of_the_op() -> None:
    found = sizes.cell_bytes(Cell("decode", Shape(2, 16), 3, 1), "float32")
    assert found == sizes.Bytes(
        state=2 * 4 * 3 * 2 * 256, qkv=4 * 3 * 3 * 32, gate=4 * 3 * 32, output=4 * 3 * 32
    )
    assert found.op == found.state + found.qkv + found.gate + found.output
    assert found.core("decode") == found.op - found.gate
    assert found.core("prefill") == found.qkv + found.output
    half = sizes.cell_bytes(Cell("decode", Shape(2, 16), 3, 1), "bfloat16")
    assert (half.state, half.qkv) == (found.state, found.qkv // 2)


def test_the_operations_of_a_prefill_include_its_chunks() -> None:
    d, heads = 32, 2
    step = sizes.cell_operations(Cell("decode", Shape(heads, d), 5, 1))
    assert step == 5 * heads * 8 * d * d
    assert sizes.cell_operations(Cell("prefill", Shape(heads, d), 1, 128)) == 128 * heads * (
        8 * d * d + 4 * 64 * d
    )
    assert sizes.cell_operations(Cell("prefill", Shape(heads, d), 1, 10)) == 10 * heads * (
        8 * d * d + 4 * 10 * d
    )


def test_what_follows_from_the_medians() -> None:
    nbytes = sizes.cell_bytes(DECODE, "float16").op
    found = sizes.derive(DECODE, "float16", {"ours": 10e-6, "fla": 15e-6, "copy": 8e-6}, COPY, MATMUL)
    assert found["floor"] == pytest.approx(nbytes / COPY)
    assert found["bound"] == "bytes"
    assert found["ratios"] == {"fla": pytest.approx(1.5), "copy": pytest.approx(0.8)}
    assert found["over_floor"] == pytest.approx(10e-6 * COPY / nbytes)
    assert found["share_of_copy"] == pytest.approx(nbytes / 10e-6 / COPY)
    heavy = sizes.derive(PREFILL, "float16", {"ours": 1.0}, COPY, MATMUL)
    assert heavy["bound"] == "operations"
    assert heavy["floor"] == pytest.approx(sizes.cell_operations(PREFILL) / MATMUL)
    bare = sizes.derive(DECODE, "float16", {"fla": 1.0}, None, None)
    assert (bare["ratios"], bare["floor"], bare["over_floor"], bare["share_of_copy"]) == (
        {},
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("nbytes", "cache", "sets"), [(1 << 20, 50 << 20, 150), (1 << 30, 50 << 20, 2), (1, 50 << 20, 512)]
)
def test_sets_of_buffers_outgrow_the_cache(nbytes: int, cache: int, sets: int) -> None:
    assert sizes.buffer_sets(nbytes, cache) == sets


def test_geometric_mean() -> None:
    assert sizes.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert sizes.geometric_mean([]) is None


# -- the sizes -----------------------------------------------------------------------------------------


def test_the_default_plan() -> None:
    cells = sizes.make_cells()
    assert len(cells) == 32
    assert [str(s) for s in sizes.SHAPES] == ["16x64", "32x80", "32x128", "8x256"]
    assert {c.batch for c in cells if c.phase == "decode"} == {1, 8, 64, 256}
    assert {(c.batch, c.length) for c in cells if c.phase == "prefill"} == set(sizes.PROMPTS)


def test_a_cell_is_measured_once() -> None:
    assert len(sizes.make_cells([Shape(1, 16), Shape(1, 16)], [2, 2], [], ["decode"])) == 1
    assert sizes.make_cells(phases=["prefill"])[0].phase == "prefill"


@pytest.mark.parametrize(
    "text", ["16", "16x", "x64", "16x64x2", "16x63", "16x272", "0x64", "-1x64", "16x0", "a"]
)
def test_shapes_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError) as info:
        sizes.parse_shape(text)
    assert info.value.got == text
    assert info.value.expected is not None


def test_shapes_and_prompts_are_read() -> None:
    assert sizes.parse_shape("32x128") == sizes.parse_shape(" 32×128 ") == Shape(32, 128)
    assert sizes.parse_prompt("8x2048") == (8, 2048)
    assert sizes.parse_prompt("512") == (1, 512)
    for text in ("1", "2x1", "0x8", "x", "8x", "2x3x4"):
        with pytest.raises(UsageError):
            sizes.parse_prompt(text)


def test_compilation_is_shared_out() -> None:
    tasks = warm.tasks(sizes.make_cells(), ["ours", "fla", "fla-phi", "torch-compile", "copy"])
    assert len(tasks) == 3 * 2 * 4 + 3 * 4
    assert {name for name, _, _ in tasks} == {"fla", "fla-phi", "torch-compile"}
    assert all(len({(c.phase, c.shape) for c in cells}) == 1 for _, cells, _ in tasks)
    assert tasks[0][1][0].phase == "prefill"
    assert [part for name, cells, part in tasks if cells[0].shape == Shape(32, 80) and name == "fla"] == [
        (0, 4), (1, 4), (2, 4), (3, 4), (0, 1),
    ]  # fmt: skip
    assert sum(len(cells) for name, cells, _ in tasks if name != "fla") == 2 * 32


def test_a_compilation_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = warm.warm([DECODE], ["copy", "torch-compile"], "float16", 2)
    assert len(found) == 1
    assert found[0].startswith("torch-compile, decode 16x64: ")
    assert "\n" not in found[0]


# -- the record ----------------------------------------------------------------------------------------


def test_the_record_says_everything(record: dict[str, Any]) -> None:
    assert {"command", "date", "versions", "machine", "commit", "gpu", "library", "settings", "ceilings",
            "absent", "notes", "cells", "format"} <= set(record)  # fmt: skip
    assert record["settings"] == {"dtype": "float16", "seconds": 0.2, "quoted": "single"}
    assert record["ceilings"]["copy"]["per_second"] == COPY
    cell = record["cells"][1]
    assert (cell["phase"], cell["heads"], cell["head_dim"], cell["batch"]) == ("decode", 16, 64, 8)
    assert cell["results"]["ours"]["single"]["median"] == pytest.approx(80e-6)
    assert cell["results"]["ours"]["errors"] == {"output": 1e-4, "state": 1e-5}
    assert cell["results"]["fla-phi"] == {"skipped": "failed: no such kernel"}
    assert cell["derived"]["ratios"]["fla"] == pytest.approx(1.5)
    assert record["absent"] == {"torch-compile": "no compiler"}


def test_time_can_be_limited() -> None:
    lab, seen = FakeLab(), []
    cells = sizes.make_cells()
    found = measure_kernels(lab, cells, limit=0.0, report=lambda r: seen.append(len(r["cells"])))
    assert found["cells"] == seen == []
    assert found["notes"][0].startswith("left out, the time was up: decode 16x64 B1 L1, decode 16x64 B8 L1")
    found = measure_kernels(lab, cells[:3], limit=60.0, report=lambda r: seen.append(len(r["cells"])))
    assert seen == [1, 2, 3]
    assert found["seconds"] >= 0


def test_what_was_measured_before_an_end_is_kept(
    lab: list[FakeLab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = FakeLab.measure

    def stop(self: FakeLab, cell: Cell, seconds: float) -> Any:
        if len(self.seen) == 2:
            raise KeyboardInterrupt
        return measure(self, cell, seconds)

    monkeypatch.setattr(FakeLab, "measure", stop)
    saved = tmp_path / "kernels.json"
    assert main([*SMALL, "--save", str(saved)]) == 130
    assert len(read_record(saved)["cells"]) == 2


def test_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}\+?", found)
    monkeypatch.setenv("DIJIANG_COMMIT", "abc")
    assert find_commit() == "abc"


# -- the command ---------------------------------------------------------------------------------------

SMALL = ["bench", "kernels", "--shape", "16x64", "--batch", "1", "--batch", "4", "--prompt", "2x512"]


def test_the_command_measures_and_saves(
    lab: list[FakeLab], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "kernels.json"
    assert main([*SMALL, "--save", str(saved), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown == json.loads(saved.read_text()) == read_record(saved)
    assert [str(c) for c in lab[0].seen] == [
        "decode 16x64 B1 L1", "decode 16x64 B4 L1", "prefill 16x64 B2 L512",
    ]  # fmt: skip
    assert (lab[0].dtype, lab[0].peers, lab[0].ours) == ("float16", PEER_NAMES, True)


def test_what_is_measured_can_be_chosen(lab: list[FakeLab], tmp_path: Path) -> None:
    library = tmp_path / "libdijiang_kernels.so"
    words = ["--dtype", "bfloat16", "--peer", "copy", "--phase", "prefill", "--jobs", "3", "--no-ours"]
    assert main([*SMALL, *words, "--library", str(library), "-q"]) == 0
    assert (lab[0].dtype, lab[0].peers, lab[0].ours) == ("bfloat16", ("copy",), False)
    assert (lab[0].asked, lab[0].warmed) == (library, 3)
    assert {c.phase for c in lab[0].seen} == {"prefill"}


def test_the_other_figure_can_be_compared(
    record: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "kernels.json"
    saved.write_text(json.dumps(record))
    assert main(["bench", "kernels", "--from", str(saved), "--buffers", "rotated", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["settings"]["quoted"] == "rotated"
    first, before = shown["cells"][0]["derived"], record["cells"][0]["derived"]
    assert first["share_of_copy"] == pytest.approx(before["share_of_copy"] / 2)
    assert first["ratios"] == pytest.approx(before["ratios"])
    assert requote(shown, "single")["cells"] == record["cells"]


def test_the_tables(lab: list[FakeLab], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--jobs", "2"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    for words in (
        "Fake GPU, CUDA 13.0", "copy 4.00 TB/s, matrix product 800 TFLOP/s", "ours: 0.1.0, sm_90, abababab",
        "absent: torch-compile: no compiler", "note: fla, decode 16x64: it did not compile",
        "fla-phi at 3 sizes: failed: no such kernel",
        "decode: fla takes 1.50 times as long as ours (1.50 to 1.50)",
    ):  # fmt: skip
        assert words in out
    row = re.search(r"16x64 │ 1 │ 1 │ 10\.0 │ 15\.0 │ - │ 5\.00 │ 1\.50 │", out)
    assert row is not None, out


def test_a_wrong_kernel_is_not_timed_and_fails(
    lab: list[FakeLab], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    FakeLab.fail()  # type: ignore[attr-defined]
    saved = tmp_path / "kernels.json"
    assert main([*SMALL, "--save", str(saved)]) == 1
    out, err = capfd.readouterr()
    assert re.search(r"16x64 │ +1 │ +1 │ wrong │", out)
    assert "our kernels compute something else" in err
    assert "decode 16x64 B1 L1: output 1.0e-04, state nan" in err
    result = json.loads(saved.read_text())["cells"][0]["results"]["ours"]
    assert result["rotated"] is None
    assert result["errors"]["state"] == "nan"


def test_a_saved_result_is_drawn_again(
    record: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "kernels.json"
    saved.write_text(json.dumps(record))
    assert main(["bench", "kernels", "--from", str(saved)]) == 0
    out = capfd.readouterr().out
    assert "Decode, one token of each row" in out
    assert "Prefill" in out
    assert "8x256" in out


@pytest.mark.parametrize("content", ["{}", "[]", "no json", json.dumps({"format": 99, "cells": []})])
def test_files_that_are_no_records(content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert main(["bench", "kernels", "--from", str(tmp_path / "x.json")]) == 1
    assert "x.json" in capfd.readouterr().err
    with pytest.raises(RecordError, match="is missing"):
        read_record(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "16x63"], "no such heads"),
        (["--prompt", "1"], "no such prefill"),
        (["--batch", "0"], "--batch"),
        (["--peer", "nobody"], "--peer"),
        (["--plot", "x.pdf"], "cannot draw such a file"),
    ],
)
@pytest.mark.usefixtures("lab")
def test_wrong_options(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *words]) == 2
    assert message in capfd.readouterr().err


def test_without_a_gpu_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from dijiang_export.cli import main; sys.exit(main(['bench', 'kernels', '--no-ours']))"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: bench kernels needs an NVIDIA GPU\n")
    assert len(done.stderr.splitlines()) == 3


# -- cells and pictures --------------------------------------------------------------------------------


def test_a_wide_spread_is_shown() -> None:
    def cell(spread: float) -> str:
        found = {"right": True, "rotated": {"median": 1e-5, "low": 1e-5 * (1 - spread), "high": 1e-5}}
        return result_cell(found, "rotated")

    assert cell(0.01) == "10.0"
    assert cell(0.2) == "10.0 ±10%"
    assert result_cell(None, "rotated") == result_cell({"skipped": "x"}, "rotated") == "-"


def test_what_is_drawn(record: dict[str, Any]) -> None:
    lines = plot.series(record, "decode", 16, 64)
    assert lines["ours"] == [(1.0, pytest.approx(10.0)), (8.0, pytest.approx(80.0))]
    assert set(lines) == {"ours", "fla", "copy", "floor"}
    prefill = plot.series(record, "prefill", 8, 256)
    assert prefill["ours"] == [(512.0, pytest.approx(10.0))]
    assert prefill["fla B8"] == [(8 * 2048.0, pytest.approx(120.0))]
    roofs = plot.roofline(record)
    first = record["cells"][0]["derived"]
    assert roofs["decode"][0] == (
        first["operations"] / first["bytes"]["op"],
        pytest.approx(first["operations"] / 10e-6),
    )
    assert len(roofs["prefill"]) == 4


def test_drawing_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match="matplotlib") as info:
        plot.check_plot(tmp_path / "x.svg")
    assert "dijiang-export[bench]" in str(info.value)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "magic"), [("a.svg", b"<?xml"), ("b.png", b"\x89PNG")])
def test_pictures(record: dict[str, Any], tmp_path: Path, name: str, magic: bytes) -> None:
    path = tmp_path / name
    plot.plot_kernels(record, path)
    assert path.read_bytes().startswith(magic)
    with pytest.raises(OutputError, match="there is no folder"):
        plot.plot_kernels(record, tmp_path / "no" / name)


def test_help_names_no_gpu_package() -> None:
    code = "import sys; sys.modules['torch'] = None; from dijiang_export.cli import main; "
    code += "sys.exit(main(['bench', 'kernels', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--prompt" in done.stdout


def test_the_draw_needs_no_peer(record: dict[str, Any]) -> None:
    from rich.console import Console

    alone = json.loads(json.dumps(record))
    for cell in alone["cells"]:
        cell["results"] = {"ours": cell["results"]["ours"]}
        cell["derived"]["ratios"] = {}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(draw_kernels(alone))
    assert "fla," not in console.export_text().split("Times are")[0]
