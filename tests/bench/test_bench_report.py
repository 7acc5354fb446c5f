"""bench report: records of several processes side by side, as tables, JSON and a picture."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support.makers.record_mutants import mutants
from support.paths import ROOT

from dijiang_engines.bench.bandwidth import Bandwidth
from dijiang_engines.bench.report import BenchReport, LoopTime, Prefill, Step
from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import OutputError, UsageError
from dijiang_engines.svg_plot import PICTURE
from dijiang_export.bench.peers.measure import PeerResult, peers_document, step_floor_bytes
from dijiang_export.bench.peers.settings import PeerSettings, neox_spec
from dijiang_export.bench.random_checkpoint import SHAPES
from dijiang_export.bench.report.plot import draw, plot_report
from dijiang_export.bench.report.records import RecordError
from dijiang_export.bench.report.report import KIND, Report, make_report, read_records
from dijiang_export.bench.report.tables import draw_report
from dijiang_export.cli import main

SVG = "{http://www.w3.org/2000/svg}"
SHAPE = SHAPES["pythia-410m"]
SPEC = neox_spec(SHAPE)
GPU = {"name": "NVIDIA H200", "memory_bytes": None, "driver": "1", "compute_capability": "9.0"}
MACHINE = {"cpu": "a CPU", "gpus": [GPU]}


def timing(median: float) -> dict[str, Any]:
    return {"calls": 5, "median": median, "low": median * 0.9, "high": median * 1.2, "best": median * 0.8}


def engine(bandwidth: Bandwidth | None = None) -> dict[str, Any]:
    """What `bench run ENGINE` saves on a GPU."""
    figure = BenchReport(
        runner="tensorrt", dtype="float16", weight_bytes=900_000_000, load_seconds=1.0, bandwidth=bandwidth,
        step_bytes=step_floor_bytes(SPEC, "float16")["dijiang"]["weights"], state_bytes=SPEC.state_bytes,
        prefill=(Prefill(1, 2048, Timing(**timing(0.005))),),
        steps=(
            Step(1, 128, Timing(**timing(0.0008)), Timing(**timing(0.0006))),
            Step(1, 2048, Timing(**timing(0.0008)), Timing(**timing(0.0006))),
            Step(4, 128, Timing(**timing(0.001)), Timing(**timing(0.0007))),
        ),
        loops=(
            LoopTime(1, 128, 64, Timing(**timing(0.0007)), 0.0006),
            LoopTime(1, 2048, 64, Timing(**timing(0.0007)), 0.0006),
        ),
        memory={"weights": 800_000_000, "state": 6_291_456}, notes=("a note of the runner",),
    )  # fmt: skip
    return {
        "kind": "bench", "device": "cuda", "threads": 2, "machine": MACHINE,
        "versions": {"tensorrt": "8.6.0", "dijiang-export": "0.1"}, "validated": "validated: good",
        "model": {"name": "pythia-410m", "parameters": 430_000_000}, "bench": figure.to_json(),
    }  # fmt: skip


def peers() -> dict[str, Any]:
    """What `bench peers` saves on the same GPU."""
    settings = PeerSettings(SHAPE, "float16", "cuda:0", contexts=(128, 2048), lengths=(2048,))

    def steps(*seconds: float) -> list[dict[str, Any]]:
        return [
            {"batch": 1, "context": n, "timing": timing(s), "error": 0.0, "compile_seconds": 1.0,
             "peak_bytes": 10**9 + n, "notes": []}
            for n, s in zip((128, 2048), seconds, strict=True)
        ]  # fmt: skip

    prefill = {"batch": 1, "length": 2048, "timing": timing(0.01), "error": 0.0, "compile_seconds": 1.0,
               "peak_bytes": 1, "notes": ["torch.compile broke the graph 1 times"]}  # fmt: skip
    versions = {"torch": "2.11.0", "transformers": "5.17.0"}
    results = [
        PeerResult("hf-compiled", None, 9.0, versions, GPU, {"bytes": 1, "read": 4e12, "copy": 4.2e12},
                   steps(0.0014, 0.0028), [prefill | {"form": ""}]),
        PeerResult("dijiang-eager", None, 9.0, versions, GPU, None, steps(0.02, 0.02),
                   [prefill | {"form": "parallel", "notes": []}],
                   [{"what": "a prefill", "why": "[b]no room"}]),
        PeerResult("dijiang-graph", "stopped after 9 s, during steps"),
    ]  # fmt: skip
    about = {"command": "x", "versions": {}, "machine": MACHINE, "load_average": 0.0}
    return about | peers_document(settings, "pythia-410m", results)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "engine.json", tmp_path / "peers.json"
    for path, record in zip(paths, (engine(), peers()), strict=True):
        path.write_text(json.dumps(record))
    return paths


# -- points --------------------------------------------------------------------------------------------


def test_everything_that_was_measured_is_a_point() -> None:
    report = make_report([engine(), peers()])
    assert report.base == "tensorrt float16, generate"
    assert report.series("decode") == [
        "tensorrt float16, generate", "tensorrt float16, step", "tensorrt float16, GPU",
        "hf-compiled float16", "dijiang-eager float16",
        "floor, DiJiang float16", "floor, softmax attention float16",
    ]  # fmt: skip
    assert report.series("prefill") == [
        "tensorrt float16", "hf-compiled float16", "dijiang-eager float16, parallel",
    ]  # fmt: skip
    point = report.at("hf-compiled float16", "decode", 1, 2048)
    assert point is not None
    assert (point.seconds, point.low, point.high) == (0.0028, 0.0028 * 0.9, 0.0028 * 1.2)
    assert report.ratio(point) == pytest.approx(4.0)
    prefill = report.at("hf-compiled float16", "prefill", 1, 2048)
    assert prefill is not None
    assert report.ratio(prefill) == pytest.approx(2.0)
    for own in (("tensorrt float16, generate", "decode"), ("tensorrt float16", "prefill"),
                ("floor, DiJiang float16", "decode")):  # fmt: skip
        at = report.at(own[0], own[1], 1, 2048)  # type: ignore[arg-type]
        assert at is not None and report.ratio(at) is None
    assert report.left_out == [
        ("dijiang-eager float16", "a prefill", "[b]no room"),
        ("dijiang-graph float16", "the rest", "stopped after 9 s, during steps"),
    ]
    assert ("hf-compiled float16", "most while decoding", 10**9 + 2048) in report.memory
    assert ("tensorrt float16", "state", 6_291_456) in report.memory
    assert "tensorrt float16: a note of the runner" in report.notes
    assert "hf-compiled float16: torch.compile broke the graph 1 times" in report.notes


def test_floors_are_bytes_over_the_best_rate_on_the_same_hardware() -> None:
    """The engine's Python measured no rate: that of the peers serves it too."""
    report = make_report([engine(), peers()])
    h, inner, layers, vocab, d = 1024, 4096, 24, 50304, 64
    linear = 4 * h * h + 4 * h + 2 * h * inner + h + inner  # qkv, dense, MLP, with biases
    softmax = layers * (linear + 4 * h) + 2 * h + vocab * h
    wide = layers * (d * d + 2 * h + 16)  # P, GroupNorm and decay, float32
    ours = 2 * (softmax + layers * h * h) + 4 * wide
    state = 4 * layers * 16 * d * d
    floor = report.at("floor, DiJiang float16", "decode", 4, 128)
    assert floor is not None
    assert floor.seconds == pytest.approx((ours + 4 * 2 * state) / 4.2e12, rel=1e-9)
    cache = report.at("floor, softmax attention float16", "decode", 1, 2048)
    assert cache is not None
    assert cache.seconds == pytest.approx((2 * softmax + 2 * 2 * layers * h * 2048) / 4.2e12, rel=1e-9)
    assert [row.floor for row in report.loops] == pytest.approx([(ours + 2 * state) / 4.2e12] * 2)
    assert "memory of NVIDIA H200: 4,200 GB/s measured" in report.notes


def test_without_a_rate_there_are_no_floors() -> None:
    report = make_report([engine()])
    assert not any(point.series.startswith("floor") for point in report.points)
    assert [row.floor for row in report.loops] == [None, None]
    assert report.notes[-1] == "memory of NVIDIA H200: not measured, so there are no floors"
    own = make_report([engine(Bandwidth(0, 2e12, 1e12))])
    assert "memory of NVIDIA H200: 2,000 GB/s measured" in own.notes


def test_rates_of_other_hardware_do_not_count() -> None:
    other = peers()
    other["gpu"] = {"name": "NVIDIA L4"}
    report = make_report([engine(), other])
    assert [row.floor for row in report.loops] == [None, None]
    assert "the records come from different hardware: NVIDIA H200, NVIDIA L4" in report.notes


def test_two_records_of_one_runner_keep_their_names() -> None:
    twice = engine()
    twice["model"]["name"] = "another"
    names = make_report([engine(), twice, deepcopy(twice) | {"threads": 9}]).series("prefill")
    assert names == ["tensorrt float16", "tensorrt float16 (another)", "tensorrt float16 (another, 2)"]


def test_records_of_earlier_versions_can_be_read() -> None:
    """And what `bench export --run` measured: the run in it."""
    for name in ("cpu-bench-sample.json", "cpu-bench-160m.json"):
        report = make_report(read_records([ROOT / "docs/evidence" / name]))
        assert report.base == "onnxruntime-cpu float32, step"
        assert report.at(report.base, "decode", 1, 100_000) is not None
        assert report.at("floor, DiJiang float32", "decode", 1, 100) is not None


# -- files ---------------------------------------------------------------------------------------------


def test_a_merged_record_stands_for_those_in_it(saved: tuple[Path, Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged.json"
    first = make_report(read_records(saved)).to_json()
    merged.write_text(json.dumps(first))
    assert first["kind"] == KIND
    assert make_report(read_records([merged])).to_json() == first
    assert make_report(read_records([merged, saved[0]])).to_json() == first  # not counted twice


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "not a record"),
        ('{"kind": "bench-kernels"}', "not a record"),
        ('{"kind": "bench", "bench": {}}', "does not have what a record has"),
        ('{"kind": "bench-peers", "device": "cuda", "machine": {"gpus": []}}', "does not have"),
        ('{"kind": "bench-report", "records": [3]}', "not a record"),
        ('{"kind": "bench-report", "records": []}', "not a record"),
        ('{"kind": ["bench"]}', "not a record"),
        # Python 3.13 reads it, and earlier ones do not: refused either way.
        ('{"kind": "bench", "bench": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
        ('{"kind": "bench", "bench": 1' + "0" * 400 + "}", "not valid JSON"),
        ('{"kind": "bench", "bench": Infinity}', "not valid JSON"),
        ("[" + "1," * 2**20 + "1]", "too many values"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=message):
        read_records([path])


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is missing"):
        read_records([tmp_path / "absent.json"])
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(RecordError, match="is not an ordinary file") as info:
        read_records([tmp_path / "pipe.json"])
    assert info.value.got == "a pipe"
    with pytest.raises(UsageError, match="no record"):
        read_records([])


def render(report: Report) -> str:
    """What the command shows, as text."""
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=300, markup=False).print(draw_report(report))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["run", "peers"])
def test_a_record_with_any_value_is_refused_or_makes_a_sane_report(kind: str, tmp_path: Path) -> None:
    whole = engine(Bandwidth(2, 2e12, 1e12)) if kind == "run" else peers()
    path = tmp_path / "x.json"
    refused = taken = 0
    shown: set[Any] = set()
    for at, _, document in mutants(whole):
        path.write_text(json.dumps(document))
        try:
            report = make_report(read_records([path]))
        except RecordError as error:
            refused += 1
            assert "\x1b" not in str(error) and len(str(error)) < 3000  # noqa: PT017
            continue
        taken += 1
        json.dumps(report.to_json()["points"], allow_nan=False)
        try:
            picture = draw(report)
        except UsageError as error:  # nothing was measured
            assert "no times per token" in str(error)  # noqa: PT017
            picture = ""
        assert "nan" not in picture and "inf" not in picture.replace("infinite", "")
        if at not in shown:
            shown.add(at)
            render(report)
    assert refused > 500 and taken > 100


def test_hundreds_of_records_of_one_name_and_many_rows(tmp_path: Path) -> None:
    """Names stay apart, and the time grows with the number of figures, not with its square."""
    many = [engine() for _ in range(100)]
    for index, record in enumerate(many):
        step = record["bench"]["steps"][0]
        record["threads"] = index
        record["bench"]["steps"] = [step | {"position": n} for n in range(100)]
    (tmp_path / "x.json").write_text(json.dumps({"kind": KIND, "records": many}))
    start = time.monotonic()
    report = make_report(read_records([tmp_path / "x.json"]))
    assert len(report.to_json()["points"]) > 20_000
    assert len(report.series("prefill")) == 100
    assert time.monotonic() - start < 20
    (tmp_path / "x.json").write_text(json.dumps({"kind": KIND, "records": many + [many[0]] * 2}))
    with pytest.raises(RecordError, match="a bad value for records"):
        read_records([tmp_path / "x.json"])


# -- the picture ---------------------------------------------------------------------------------------


def test_the_picture_shows_every_series_in_its_place() -> None:
    report = make_report([engine(), peers()])
    text = draw(report)
    assert text == draw(report)
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert set(report.series("decode")) < set(words)
    lines = {}
    for line in root.iter(f"{SVG}path"):
        if line.attrib["class"].startswith("line ") and "h" not in line.attrib["d"]:  # "h": of the legend
            pairs = re.findall(r"[ML]([\d.]+) ([\d.]+)", line.attrib["d"])
            places = lines[line.attrib["class"]] = [(float(x), float(y)) for x, y in pairs]
            assert all(
                PICTURE.left <= x <= PICTURE.end and PICTURE.top <= y <= PICTURE.floor for x, y in places
            )
    assert len(lines) == 7
    solid = [places for name, places in lines.items() if "dashed" not in name]
    generate, step, gpu, compiled, eager = (places[1][1] for places in solid)
    # Upwards is slower: y falls.
    assert eager < compiled < step < generate < gpu
    assert solid[0][0][0] < solid[0][1][0]
    assert solid[0][0][1] == solid[0][1][1]  # ours is flat
    assert solid[3][0][1] > solid[3][1][1]  # softmax attention is not


def test_one_place_at_position_zero_can_be_drawn() -> None:
    record = engine()
    record["bench"]["steps"] = [record["bench"]["steps"][0] | {"position": 0, "gpu": None}]
    record["bench"]["loops"] = []
    text = draw(make_report([record]))
    assert text.count('class="mark s0"') == 2  # the figure, and the legend
    assert "nan" not in text


def test_names_are_escaped() -> None:
    record = engine()
    record["bench"]["runner"] = "<b>&"
    assert "&lt;b&gt;&amp; float16, step" in draw(make_report([record]))


def test_pictures_that_cannot_be_drawn(tmp_path: Path) -> None:
    report = make_report([engine()])
    with pytest.raises(UsageError, match="cannot draw"):
        plot_report(report, tmp_path / "x.png")
    with pytest.raises(UsageError, match="no times per token"):
        plot_report(report, tmp_path / "x.svg", batch=3)
    with pytest.raises(OutputError, match="there is no folder"):
        plot_report(report, tmp_path / "no" / "x.svg")
    plot_report(report, tmp_path / "x.svg", batch=4)
    assert "4 sequences" in (tmp_path / "x.svg").read_text()


# -- the command ---------------------------------------------------------------------------------------


def test_the_command_prints_draws_and_saves(
    saved: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plot, merged = tmp_path / "p.svg", tmp_path / "m.json"
    words = ["bench", "report", *map(str, saved), "--plot", str(plot), "--save", str(merged)]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert re.search(r"hf-compiled float16 .*1.4 ms \(2.0x\).*2.8 ms \(4.0x\)", out)
    assert re.search(r"tensorrt float16 .*0.7 ms.*0.6 ms.*0.1 ms.*1,429", out)  # loop, GPU, overhead
    assert "[b]no room" in out
    assert "stopped after 9 s" in out
    assert plot.read_text().startswith("<svg")
    data = json.loads(merged.read_text())
    assert len(data["records"]) == 2
    assert {"times_base": pytest.approx(4.0)}.items() <= next(
        p for p in data["points"] if (p["series"], p["tokens"]) == ("hf-compiled float16", 2048)
    ).items()


def test_the_command_refuses_before_it_works(
    saved: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "report", str(saved[0]), "--plot", "x.png"]) == 2
    assert "cannot draw such a file" in capfd.readouterr().err
    assert main(["bench", "report"]) == 2


def test_the_command_needs_no_torch_and_no_runtime(saved: tuple[Path, Path], tmp_path: Path) -> None:
    blocked = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "cuda", "matplotlib")
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from dijiang_export.cli import main\nsys.exit(main())"
    )
    words = ["bench", "report", *map(str, saved), "--plot", str(tmp_path / "p.svg")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The loop of `generate`" in done.stdout


def test_a_picture_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svg"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError):
        plot_report(make_report([engine()]), path)
    monkeypatch.undo()
    assert path.read_text() == "old"


def test_the_picture_has_its_own_title_ticks_and_colours() -> None:
    text = draw(make_report([engine(), peers()]))
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"Time per token over context, one sequence", "tokens before it", "128", "2,048"} <= set(words)
    [style] = [element.text or "" for element in root.iter(f"{SVG}style")]
    for element in root.iter(f"{SVG}path"):
        for name in element.attrib["class"].split():
            assert f".{name}" in style
    floors = [e for e in root.iter(f"{SVG}path") if e.attrib["class"].startswith("line dashed")]
    assert len({floor.attrib["class"] for floor in floors}) == 2  # told apart, in the legend too


def test_one_module_draws() -> None:
    """Pages and pictures have their axes, grids, lines and legends from the same place."""
    sources = [path for side in ("engines", "exporter") for path in (ROOT / side).rglob("*.py")]
    drawing = [
        path.name for path in sources if re.search(r"<(svg|path|line|polyline|circle)\b", path.read_text())
    ]
    assert drawing == ["svg_plot.py"]
