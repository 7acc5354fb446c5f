"""bench: what it measures and derives. How fast anything is belongs to `make bench`, not here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.fakes.runner import ToyRunner, toy_case, write_reference
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_manifest

from dijiang_engines.bench import runner as bench
from dijiang_engines.bench.bandwidth import Bandwidth, CudaCopy, measure_bandwidth, measure_gpu_bandwidth
from dijiang_engines.bench.loop import LOOP_STEPS, Loop, loop_start, loop_steps
from dijiang_engines.bench.report import BenchReport, LoopTime, Prefill, Step
from dijiang_engines.bench.runner import bench_runner
from dijiang_engines.bench.timing import Effort, Timing, until_done
from dijiang_engines.errors import OutputError, RunnerError, UsageError
from dijiang_engines.inspection import step_bytes
from dijiang_engines.sizes import weight_bytes
from dijiang_export.bench import export as bench_export
from dijiang_export.bench import random_checkpoint
from dijiang_export.bench.random_checkpoint import SHAPES, Shape, write_random_checkpoint
from dijiang_export.cli import main

QUICK = Effort(seconds=0.0, least=3, most=3)
TINY = Shape(layers=2, hidden=64, heads=4, intermediate=96, vocab=260, positions=512)


def timing(median: float) -> Timing:
    return Timing(5, median, median * 0.9, median * 1.1, median * 0.8)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A toy bundle with a record that fits it."""
    folder = tmp_path / "toy.bundle"
    model = make_bundle(folder, tokenizer=False)
    write_reference(folder / "reference.safetensors", {"short": toy_case(model, [9, 4], [0, 0])})
    write_manifest(folder, SPEC)
    return folder


# -- the engine's side ---------------------------------------------------------------------------------


def test_timings_are_percentiles_of_single_calls() -> None:
    found = Timing.of([0.5, 0.1, 0.2, 0.3, 0.4])
    assert found.calls == 5
    assert found.best == 0.1
    assert found.median == pytest.approx(0.3)
    assert found.low == pytest.approx(0.14)
    assert found.high == pytest.approx(0.46)


@pytest.mark.parametrize(
    ("effort", "calls"), [(Effort(0.0, 4, 9), 4), (Effort(60.0, 1, 3), 3), (Effort(0.0, 0, 5), 0)]
)
def test_effort_bounds_the_calls(effort: Effort, calls: int) -> None:
    assert len(list(until_done(effort))) == calls


def test_what_follows_from_the_figures() -> None:
    report = BenchReport(
        runner="r", dtype="float32", weight_bytes=9, step_bytes=600, state_bytes=1, load_seconds=0.1,
        prefill=(Prefill(1, 128, timing(0.5)), Prefill(1, 2048, timing(2.0))),
        steps=(Step(1, 100, timing(0.01)), Step(1, 100_000, timing(0.012)), Step(4, 100, timing(0.02))),
        bandwidth=Bandwidth(2, read=120_000.0, copy=1.0),
    )  # fmt: skip
    assert report.flatness == pytest.approx(1.2)
    assert report.bandwidth_share == pytest.approx(0.5)
    assert report.prefill_gain == pytest.approx(2048 * 0.01 / 2.0)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["prefill"][1]["tokens_per_second"] == pytest.approx(1024)
    assert data["steps"][2]["tokens_per_second"] == pytest.approx(200)
    assert data["derived"]["far_over_near"] == pytest.approx(1.2)
    bare = replace(report, steps=(), prefill=(), bandwidth=None)
    assert bare.to_json()["derived"] == {
        "far_over_near": None, "bandwidth_share": None, "prefill_over_steps": None,
    }  # fmt: skip


def test_a_runner_is_measured_near_far_and_in_batches() -> None:
    runner = ToyRunner(ToyModel.random(SPEC))
    seen: list[tuple[str, tuple[int, ...], int]] = []
    runner.tamper = lambda name, a: seen.append((name, a["ids"].shape, int(a["positions"][0])))
    report = bench_runner(runner, "float32", lengths=(5, 9), batches=(1, 3), effort=QUICK)
    assert [(p.batch, p.length) for p in report.prefill] == [(1, 5), (1, 9)]
    assert [(s.batch, s.position) for s in report.steps] == [(1, 100), (1, 100_000), (3, 100)]
    assert report.weight_bytes == weight_bytes(SPEC, "float32")
    assert report.step_bytes == step_bytes(SPEC, "float32")
    assert report.load_seconds > 0
    far = [p for name, shape, p in seen if name == "step" and p >= 100_000]
    near = [p for name, shape, p in seen if name == "step" and 100 <= p < 1000 and shape == (1, 1)]
    assert report.steps[0].timing.calls == report.steps[1].timing.calls == bench.BLOCK
    # The loop reads the last token of the text in a step of its own, then as many as it counts.
    looped = (1 + bench.LEAST_LOOPS) * (LOOP_STEPS + 1)
    assert len(far) == bench.BLOCK + looped
    assert len(near) == bench.BLOCK + bench.WARM_UP_STEPS + looped
    assert [(x.batch, x.position, x.steps) for x in report.loops] == [
        (1, 100, LOOP_STEPS), (1, 100_000, LOOP_STEPS), (3, 100, LOOP_STEPS)
    ]  # fmt: skip
    assert [x.timing.calls for x in report.loops] == [bench.LEAST_LOOPS] * 3
    assert all(x.gpu is None and x.overhead is None for x in report.loops)
    assert report.memory is None
    assert {shape for name, shape, _ in seen if name == "prefill"} == {(1, 1), (1, 5), (1, 9)}


@pytest.mark.parametrize("limit", [40, 300])
def test_a_model_of_limited_length_is_measured_within_it(limit: int) -> None:
    spec = replace(SPEC, decay="tables", decay_rows=limit)
    runner = ToyRunner(ToyModel.random(spec))
    highest = 0

    def watch(name: str, a: dict) -> None:
        nonlocal highest
        highest = max(highest, int((a["positions"] + a["seq_lens"]).max()))

    runner.tamper = watch
    report = bench_runner(runner, "float32", lengths=(16, 64), batches=(1, 2), effort=QUICK)
    assert highest <= limit
    assert [p.length for p in report.prefill if p.batch == 1] == ([16] if limit < 64 else [16, 64])
    assert all(x.position + x.steps < limit for x in report.loops)
    assert len({(x.batch, x.position) for x in report.loops}) == len(report.loops) >= 2
    assert report.notes
    assert report.flatness is None or len({s.position for s in report.steps if s.batch == 1}) == 2


def test_progress_has_one_unit_for_each_figure() -> None:
    from contextlib import contextmanager

    state = {"total": 0.0, "done": 0.0}

    @contextmanager
    def bar(description: str, total: float, unit: str):
        state["total"] = total

        class Bar:
            def advance(self, amount: float = 1) -> None:
                state["done"] += amount

        yield Bar()

    bench_runner(ToyRunner(ToyModel.random(SPEC)), "float32", lengths=(4,), effort=QUICK, progress=bar)
    assert state["total"] == state["done"] == 1 + 2 * (4 + 1)


def test_prefills_of_several_rows_are_no_larger_than_the_longest_of_one() -> None:
    runner = ToyRunner(ToyModel.random(SPEC))
    report = bench_runner(runner, "float32", lengths=(4, 8, 16), batches=(1, 2, 4, 8), effort=QUICK)
    found = [(p.batch, p.length) for p in report.prefill]
    assert found == [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 4)]
    assert report.prefill[3].tokens_per_second == pytest.approx(8 / report.prefill[3].timing.median)


class GpuRunner(ToyRunner):
    """Offers what a runner on a GPU may: its own times and memory; takes at most two rows."""

    asked: list[tuple[int, int, int]]

    def new_state(self, batch: int) -> list[np.ndarray]:
        if batch > 2:
            raise RunnerError("too many rows", got=batch)
        return super().new_state(batch)

    def import_state(self, layers) -> list[np.ndarray]:
        self.new_state(layers[0].shape[0])
        return super().import_state(layers)

    def step_gpu_seconds(self, batch: int, position: int, calls: int) -> list[float]:
        self.asked.append((batch, position, calls))
        return [batch * 1e-6] * (calls - 1) + [1.0]

    def memory(self) -> dict[str, int]:
        return {"weights": 100, "state": 20}


def test_a_runner_on_a_gpu_tells_more() -> None:
    runner = GpuRunner(ToyModel.random(SPEC))
    runner.asked = []
    report = bench_runner(runner, "float32", lengths=(4,), batches=(1, 2), positions=(7, 90), effort=QUICK)
    assert runner.asked == [(1, 7, 3), (1, 90, 3), (2, 7, 3)]
    assert [s.gpu.median for s in report.steps if s.gpu] == [1e-6, 1e-6, 2e-6]
    for loop, gpu in zip(report.loops, (1e-6, 1e-6, 2e-6), strict=True):
        assert loop.gpu == gpu
        assert loop.overhead == pytest.approx(loop.timing.median - gpu)
        assert loop.overhead > 0
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["memory"] == {"weights": 100, "state": 20}
    assert data["loops"][2]["overhead"] == report.loops[2].overhead
    assert data["steps"][0]["gpu"]["calls"] == 3


def test_a_gpu_is_not_asked_beyond_the_models_last_position() -> None:
    spec = replace(SPEC, decay="tables", decay_rows=40)
    runner = GpuRunner(ToyModel.random(spec))
    runner.asked = []
    effort = Effort(seconds=0.0, least=30, most=30)
    bench_runner(runner, "float32", lengths=(4,), batches=(1,), positions=(100,), effort=effort)
    [(_, position, calls)] = runner.asked
    assert position + calls + bench.WARM_UP_STEPS == 40


def test_what_a_runner_refuses_is_left_out_with_a_note() -> None:
    runner = GpuRunner(ToyModel.random(SPEC))
    runner.asked = []
    report = bench_runner(runner, "float32", lengths=(4, 16), batches=(1, 3), positions=(7,), effort=QUICK)
    assert [s.batch for s in report.steps] == [x.batch for x in report.loops] == [1]
    assert [(p.batch, p.length) for p in report.prefill] == [(1, 4), (1, 16)]
    assert report.notes == (
        "prefill of 3 rows of 4 tokens, left out: too many rows (3)",
        "steps of 3 rows of one token, left out: too many rows (3)",
        "the loop of 3 rows of one token at 7, left out: too many rows (3)",
    )


def test_a_token_of_the_loop_is_the_time_between_the_first_and_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that each step of the runner moves by one second, whatever the rows."""
    runner, now = ToyRunner(ToyModel.random(SPEC)), [0.0]

    def tick(name: str, arrays: dict) -> None:
        now[0] += 1.0

    runner.tamper = tick
    monkeypatch.setattr("dijiang_engines.bench.loop.time.perf_counter", lambda: now[0])
    for batch in (1, 3):
        assert Loop(runner, batch, 50, None).seconds_per_step() == pytest.approx(1.0)


@pytest.mark.parametrize(("limit", "steps"), [(None, LOOP_STEPS), (1000, LOOP_STEPS), (20, 19), (1, 0)])
def test_the_loop_stays_within_the_model(limit: int | None, steps: int) -> None:
    assert loop_steps(limit) == steps
    start = loop_start(10_000, limit)
    assert start == (10_000 if limit is None else limit - 1 - steps)
    assert loop_start(0, limit) == 0


def test_overhead_is_what_the_gpu_does_not_take() -> None:
    assert LoopTime(2, 100, 64, timing(0.003), gpu=0.001).overhead == pytest.approx(0.002)
    assert LoopTime(2, 100, 64, timing(0.003)).overhead is None
    assert LoopTime(2, 100, 64, timing(0.004)).tokens_per_second == pytest.approx(500)


class FakeCuda:
    """A GPU whose copies take 2 ms, the first 9 ms."""

    def __init__(self) -> None:
        self.copied: list[tuple[int, int, int]] = []

    def buffer(self, size: int) -> object:
        self.next = getattr(self, "next", 0) + 1000
        return type("Buffer", (), {"address": self.next, "size": size})()

    def stream(self) -> FakeCuda:
        return self

    def fill(self, target: int, value: int, size: int) -> None:
        pass

    def copy(self, target: int, source: int, size: int) -> None:
        self.copied.append((target, source, size))

    def record(self, event: object) -> None:
        pass

    def event(self, *, timing: bool = False) -> object:
        assert timing
        cuda = self

        class Event:
            def wait(self) -> None:
                pass

            def seconds_since(self, earlier: object) -> float:
                return 2e-3 if len(cuda.copied) > 1 else 1e-3

        return Event()


def test_a_gpus_copies_are_timed_by_its_events() -> None:
    cuda = FakeCuda()
    found = measure_gpu_bandwidth(CudaCopy(cuda, 1 << 20), rounds=4)  # type: ignore[arg-type]
    assert cuda.copied == [(2000, 1000, 1 << 20)] * 5
    assert found == Bandwidth(0, (2 << 20) / 2e-3, (2 << 20) / 2e-3)  # the first, faster here, does not count


def test_bandwidth_is_plausible() -> None:
    found = measure_bandwidth(1, buffer_bytes=8 << 20, rounds=2)
    assert found.threads == 1
    assert 1e8 < found.read < 1e13
    assert 1e8 < found.copy < 1e13


# -- the command ---------------------------------------------------------------------------------------

FAST = ["--seconds", "0.01", "--length", "8", "--batch", "1", "--batch", "2", "--threads", "1"]


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    from dijiang_export.bench import bundle as bench_bundle

    def small(threads: int) -> Bandwidth:
        return measure_bandwidth(threads, buffer_bytes=4 << 20, rounds=1)

    monkeypatch.setattr(bench_bundle, "measure_bandwidth", small)


@pytest.mark.usefixtures("small_buffers")
def test_the_command_measures_and_saves(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "bench.json"
    assert main(["bench", str(recorded), *FAST, "--save", str(saved), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown == json.loads(saved.read_text())
    assert shown["validated"].startswith("validated: largest logit error")
    assert shown["versions"]["onnxruntime"]
    assert shown["machine"]["cpu"]
    assert shown["command"]
    assert shown["threads"] == 1
    assert shown["reference"] is None
    assert shown["startup"] is None
    assert [row["batch"] for row in shown["bench"]["steps"]] == [1, 1, 2]
    assert [(row["batch"], row["position"]) for row in shown["bench"]["loops"]] == [
        (1, 100), (1, 100_000), (2, 100)
    ]  # fmt: skip
    assert (shown["kind"], shown["device"]) == ("bench", "cpu")
    assert shown["bench"]["derived"]["bandwidth_share"] > 0


@pytest.mark.usefixtures("small_buffers")
def test_batches_without_single_sequences(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What follows from steps of one sequence is then left out."""
    words = ["--seconds", "0.01", "--length", "8", "--batch", "2", "--threads", "1"]
    assert main(["bench", str(recorded), *words]) == 0
    out = capfd.readouterr().out
    assert "2 sequences" in out
    assert "reached by steps" not in out


@pytest.mark.usefixtures("small_buffers")
def test_run_is_what_bench_does_without_a_command(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["bench", "run", str(recorded)], ["bench", str(recorded)], ["bench", "-q", str(recorded)]):
        assert main([*words, *FAST]) == 0
        out = capfd.readouterr().out
        assert "prefill of 8 tokens" in out
        assert "step at position 100,000" in out
        assert "`generate`, a token from 100,000 on" in out


@pytest.mark.usefixtures("small_buffers")
def test_positions_can_be_chosen(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--position", "3", "--position", "700", "--position", "0", "--json"]
    assert main(["bench", str(recorded), *FAST, *words]) == 0
    found = json.loads(capfd.readouterr().out)["bench"]
    assert [(s["batch"], s["position"]) for s in found["steps"]] == [(1, 3), (1, 700), (1, 0), (2, 3)]
    assert [(x["batch"], x["position"]) for x in found["loops"]] == [(1, 3), (1, 700), (1, 0), (2, 3)]


def test_help_shows_the_options_and_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capfd.readouterr().out
    for words in ("--checkpoint", "--save", "export", "Example:"):
        assert words in out
    assert main(["bench", "export", "--help"]) == 0
    assert "--shape" in capfd.readouterr().out


@pytest.mark.usefixtures("small_buffers")
def test_wrong_results_are_not_timed(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = toy_case(ToyModel.random(SPEC), [9, 4], [0, 0])
    case["logits"] *= 1.01
    write_reference(recorded / "reference.safetensors", {"short": case})
    write_manifest(recorded, SPEC)
    saved = tmp_path / "bench.json"
    assert main(["bench", str(recorded), *FAST, "--save", str(saved)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "checks on onnxruntime-cpu failed" in err
    assert not saved.exists()


@pytest.mark.usefixtures("small_buffers")
def test_a_bundle_without_a_record_says_so(
    toy: tuple[Path, ToyModel], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(toy[0]), *FAST, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["validated"].startswith("not validated")
    # This one has a tokenizer, so that `generate` can be started.
    assert len(found["startup"]["runs"]) == 3
    assert 0 < found["startup"]["first_output_seconds"] <= max(found["startup"]["runs"])
    assert 10 << 20 < found["startup"]["peak_rss"] < 500 << 20


@pytest.mark.usefixtures("small_buffers")
def test_a_result_that_cannot_be_saved(
    recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "no" / "such" / "folder.json"
    assert main(["bench", str(recorded), *FAST, "--save", str(target)]) == 1
    assert "there is no folder" in capfd.readouterr().err


def test_no_bundle(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "absent")]) == 1
    assert "there is no bundle" in capfd.readouterr().err


def test_the_engines_side_imports_no_torch() -> None:
    code = "import sys, dijiang_engines.bench.runner; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("small_buffers")
def test_a_python_without_torch_measures_too(recorded: Path, tmp_path: Path) -> None:
    """TensorRT's may be one."""
    blocked = ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "scipy", "matplotlib")
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from dijiang_export.cli import main\nsys.exit(main())"
    )
    saved = tmp_path / "b.json"
    words = ["bench", "run", str(recorded), *FAST, "--save", str(saved)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(saved.read_text())["bench"]["loops"]


# -- random checkpoints, PyTorch, exports --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_random_checkpoint_is_a_good_checkpoint(tmp_path: Path, dtype: str) -> None:
    from dijiang_export.checkpoint.checkpoint import open_checkpoint

    path = write_random_checkpoint(tmp_path / "c", TINY, dtype=dtype)  # type: ignore[arg-type]
    with open_checkpoint(path.parent) as checkpoint:
        assert checkpoint.storage_dtype == dtype
        assert checkpoint.spec.decay == "geometric"
        assert (checkpoint.spec.num_layers, checkpoint.spec.head_dim) == (2, 16)
        parameters = checkpoint.load_state_dict()
    weight = parameters["layers.1.mlp.up.weight"].numpy()
    assert weight.std() == pytest.approx(1 / math.sqrt(64), rel=0.1)
    other = parameters["layers.0.mlp.up.weight"].numpy()
    assert not np.array_equal(weight, other)


def test_pythias_shapes_have_the_published_sizes() -> None:
    # EleutherAI/pythia-*: parameters in millions as published, plus one W_G a layer.
    published = {"pythia-70m": 70.4, "pythia-160m": 162.3, "pythia-410m": 405.3, "pythia-1b": 1011.8,
                 "pythia-1.4b": 1414.6, "pythia-2.8b": 2775.2, "pythia-6.9b": 6857.3}  # fmt: skip
    assert set(SHAPES) == set(published)
    for name, shape in SHAPES.items():
        tensors = random_checkpoint._tensors(shape, np.random.default_rng(0))
        count = sum(
            math.prod(t.shape) for t in tensors if not t.name.endswith((".D1", ".D2", ".W_G", "proj_matrix"))
            and "group_norm" not in t.name
        )  # fmt: skip
        assert count / 1e6 == pytest.approx(published[name], rel=2e-3), name


def test_pytorch_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    from dijiang_export.bench.reference import measure_in_subprocess

    path = write_random_checkpoint(tmp_path / "c", TINY)
    found = measure_in_subprocess(path.parent, threads=1, lengths=[8], effort=QUICK)
    assert found["threads"] == 1
    assert found["step"]["calls"] == 3
    assert found["step"]["median"] > 0
    assert [(p["form"], p["length"]) for p in found["prefill"]] == [("parallel", 8), ("chunked", 8)]


def test_a_checkpoint_that_pytorch_cannot_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from dijiang_export.bench.reference import measure_in_subprocess

    with pytest.raises(RunnerError, match="PyTorch"):
        measure_in_subprocess(tmp_path / "absent", threads=1, lengths=[8], effort=QUICK)
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_an_export_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    saved = tmp_path / "export.json"
    words = ["bench", "export", "--shape", "tiny", "--folder", str(tmp_path / "work"), "--save", str(saved)]
    assert main([*words, "--dtype", "float32", "--cases", "none"]) == 0
    assert "peak resident memory above torch" in capfd.readouterr().out
    found = json.loads(saved.read_text())["export"]
    assert (
        found["checkpoint_bytes"] == (tmp_path / "work" / "checkpoint" / "model.safetensors").stat().st_size
    )
    assert (tmp_path / "work" / "tiny.bundle" / "manifest.json").exists()
    assert 0 < found["copy_seconds"] < found["export_seconds"]
    assert found["seconds_without_cases"] <= found["export_seconds"]
    assert found["peak_rss"] > found["baseline_rss"] > 50 << 20
    assert 0 < found["rss_above"] < 1 << 30
    assert found["peak_anonymous"] > 0
    assert not (tmp_path / "work" / "copy.safetensors").exists()


def test_exports_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no shape"):
        bench_export.measure_export("pythia-0b", tmp_path)
    monkeypatch.setattr(bench_export, "COPIES_ON_DISK", 1e9)
    with pytest.raises(OutputError, match="too little room"):
        bench_export.measure_export("pythia-70m", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_export_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(RunnerError, match="the measured export failed") as info:
        bench_export._run_child(tmp_path / "checkpoint", tmp_path / "x.bundle", "float32", "none")
    assert "config.json" in str(info.value)
    assert "Traceback" not in str(info.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
