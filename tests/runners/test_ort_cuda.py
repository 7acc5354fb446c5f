"""What the CUDA runner does around ONNX Runtime's CUDA graphs, with a session on the CPU in their place.

`GraphSession` keeps ONNX Runtime's rules: a run with a new `gpu_graph_id` runs the step several times, and a
captured graph works on the addresses that it was captured with. It can also break in the ways that are known.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners.onnxruntime import cuda as ort_cuda
from dijiang_engines.runners.onnxruntime import sessions as ort_sessions
from dijiang_engines.runners.onnxruntime import state as ort_state
from dijiang_engines.runners.onnxruntime.config import OrtConfig
from dijiang_engines.runners.onnxruntime.providers import CUDA
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.onnxruntime.sessions import Sessions, Tensors
from dijiang_engines.validation.replay import REPLAYS
from dijiang_engines.validation.validate import validate

A = np.array


class GraphSession:
    """A session for steps that captures; `fault` names how it is wrong."""

    made: ClassVar[list[GraphSession]] = []

    def __init__(self, session: Any, fault: str | None) -> None:
        self._session, self._fault = session, fault
        self._captured: dict[str, Any] = {}
        self.runs: list[str] = []
        GraphSession.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        name = "none" if options is None else options.get_run_config_entry("gpu_graph_id")
        self.runs.append(name)
        if name == "-1":
            self._session.run_with_iobinding(binding)
        elif name not in self._captured:
            if self._fault == "capture fails":
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            self._captured[name] = binding
            for _ in range(3):
                self._session.run_with_iobinding(binding)
        elif self._fault != "stale":
            assert self._captured[name] is binding, (
                "a graph works on other addresses than it was captured with"
            )
            self._session.run_with_iobinding(binding)


Make = Callable[..., OrtRunner]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """The CUDA runner gets its tensors and sessions on the host; called, it says how steps are wrong."""
    faults: list[str | None] = [None]

    def load(self: Sessions, path: Path, name: str, cuda_graph: bool) -> Any:
        if cuda_graph and faults[0] == "session fails":
            raise RunnerError("cannot load", got="not partitioned to the CUDAExecutionProvider")
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return GraphSession(session, faults[0]) if cuda_graph else session

    monkeypatch.setattr(GraphSession, "made", [])
    monkeypatch.setattr("dijiang_engines.runners.onnxruntime.runner.check_provider", lambda ort, name: None)
    monkeypatch.setattr(OrtConfig, "tensors_on", "cpu")
    monkeypatch.setattr(Sessions, "load", load)
    return lambda fault: faults.__setitem__(0, fault)


@pytest.fixture
def make(variants: Path, no_gpu: Callable[[str | None], None]) -> Make:
    def runner(fault: str | None = None, **options: Any) -> OrtRunner:
        no_gpu(fault)
        return OrtRunner(open_bundle(variants), CUDA, **options)

    return runner


def tokens(runner: OrtRunner, batch: int, count: int, state: Any = None) -> np.ndarray:
    """Logits of `count` steps in a new state."""
    state = runner.new_state(batch) if state is None else state
    rows = [
        runner.step(
            A([[7 + n + row] for row in range(batch)]), np.full(batch, n), np.ones(batch, np.int64), state
        )
        for n in range(count)
    ]
    return np.stack(rows)


def test_recorded_cases_pass_through_graphs(make: Make) -> None:
    runner = make()
    assert runner.config.lowering == "ort-step"
    report = validate(runner, runner.bundle.reference())
    assert report.passed, report.failures[:3]
    assert {r.replay for r in report.results} <= set(REPLAYS)
    assert runner.cuda_graphs.enabled
    assert runner.cuda_graphs.note is None
    (session,) = GraphSession.made
    assert sum(not name.startswith("-") for name in session.runs) > 100
    assert "none" not in session.runs  # every run says which graph it is


def test_graphs_change_nothing(make: Make) -> None:
    with_graphs, without = make(), make(cuda_graph=False)
    for batch in (1, 3):
        np.testing.assert_array_equal(tokens(with_graphs, batch, 6), tokens(without, batch, 6))
    assert with_graphs.cuda_graphs.enabled
    assert (without.cuda_graphs.enabled, without.cuda_graphs.note) == (False, "not wanted")


def test_capturing_leaves_a_state_as_it_was(make: Make) -> None:
    """A state that holds something is captured at its first step, from either set."""
    runner, plain = make(), make(cuda_graph=False)
    ids, zero, lens = A([[5, 6, 7], [8, 9, 0]]), np.zeros(2, np.int64), A([3, 2])
    for pieces in (1, 2):
        both = []
        for one in (runner, plain):
            state = one.new_state(2)
            for _ in range(pieces):
                one.prefill(ids, zero, lens, state)
            steps = [one.step(A([[4], [3]]), lens + n, np.ones(2, np.int64), state) for n in range(3)]
            both.append((steps, one.export_state(state)))
        for got, expected in zip(*both, strict=True):
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    assert runner.cuda_graphs.captured == 2


def test_states_of_one_size_share_graphs_one_after_the_other(make: Make) -> None:
    runner = make()
    first = tokens(runner, 2, 4)
    gc.collect()
    for _ in range(3):
        np.testing.assert_array_equal(tokens(runner, 2, 4), first)  # also: the slot was zeroed
        gc.collect()
    assert runner.cuda_graphs.captured == 2
    one, two = runner.new_state(2), runner.new_state(2)  # at the same time: each its own
    assert one.slot is not two.slot
    for state in (one, two):
        np.testing.assert_array_equal(tokens(runner, 2, 4, state), first)
    assert runner.cuda_graphs.captured == 4


def test_few_slots_wait(make: Make) -> None:
    runner = make()
    for batch in range(1, 8):
        tokens(runner, batch, 1)
    gc.collect()
    assert [slot.batch for slot in runner.slots.idle] == [4, 5, 6, 7]


def test_beyond_the_most_graphs_steps_run_plainly(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "MAX_CAPTURES", 3)
    runner, plain = make(), make(cuda_graph=False)
    states = [runner.new_state(1) for _ in range(2)]
    for state in states:
        np.testing.assert_array_equal(tokens(runner, 1, 4, state), tokens(plain, 1, 4))
    assert runner.cuda_graphs.captured == 3
    assert runner.cuda_graphs.enabled
    assert GraphSession.made[0].runs[-1] == "-1"


@pytest.mark.parametrize("fault", ["session fails", "capture fails", "stale"])
def test_what_cannot_be_a_graph_runs_without(
    make: Make, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens(make(cuda_graph=False), 2, 5)
    words = {"session fails": "not partitioned", "capture fails": "CUDA failure 900", "stale": "differ"}
    runner = make(fault)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(tokens(runner, 2, 5), expected)
        np.testing.assert_array_equal(tokens(runner, 2, 5), expected)
    assert not runner.cuda_graphs.enabled
    assert words[fault] in str(runner.cuda_graphs.note)
    assert [words[fault] in r.message for r in caplog.records] == [True]  # said once


def test_a_failed_capture_leaves_a_state_as_it_was(make: Make) -> None:
    runner = make("stale")
    state = runner.new_state(1)
    runner.prefill(A([[5, 6, 7]]), A([0]), A([3]), state)
    before = runner.export_state(state)
    assert state.ready_step().session is runner.sessions.get("step")
    assert not runner.cuda_graphs.enabled
    for got, expected in zip(runner.export_state(state), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_other_states_go_on_when_graphs_are_given_up(make: Make) -> None:
    runner, plain = make(), make(cuda_graph=False)
    old, plain_old = runner.new_state(1), plain.new_state(1)
    np.testing.assert_array_equal(tokens(runner, 1, 3, old), tokens(plain, 1, 3, plain_old))
    GraphSession.made[0]._fault = "capture fails"
    np.testing.assert_array_equal(tokens(runner, 2, 3), tokens(plain, 2, 3))
    assert not runner.cuda_graphs.enabled
    np.testing.assert_array_equal(tokens(runner, 1, 3, old), tokens(plain, 1, 3, plain_old))


def test_large_states_are_compared_in_three_layers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_state, "_SMALL_STATE", 1)
    runner, plain = make(), make(cuda_graph=False)
    np.testing.assert_array_equal(tokens(runner, 2, 5), tokens(plain, 2, 5))
    assert runner.cuda_graphs.enabled


def test_reset_rows_of_a_captured_state(make: Make) -> None:
    runner = make()
    state = runner.new_state(3)
    tokens(runner, 3, 3, state)
    before = runner.export_state(state)
    runner.reset_rows(state, (2, 0))
    for got, old in zip(runner.export_state(state), before, strict=True):
        assert not got[[0, 2]].any()
        np.testing.assert_array_equal(got[1], old[1])
    with pytest.raises(RunnerError, match="no such row"):
        runner.reset_rows(state, [3])


def test_zeroing_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ort_cuda.ctypes, "CDLL", missing)
    assert not ort_cuda.zero_device_memory([(4096, 16)], 0)


def test_rows_are_zeroed_through_the_host_if_the_driver_cannot(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the driver is given the rows' addresses."""
    runner = make(cuda_graph=False)
    state = runner.new_state(3)
    tokens(runner, 3, 2, state)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ort_sessions, "zero_device_memory", lambda spans, device: bool(asked.extend(spans)))
    Tensors(runner.spec, "cuda", 0).zero_rows(state.past, [2])
    for layer in runner.export_state(state):
        assert not layer[2].any()
        assert layer[:2].any()
    size = 4 * int(np.prod(runner.spec.state_shape))
    assert asked == [(value.data_ptr() + 2 * size, size) for value in state.past]


# -- which graphs ----------------------------------------------------------------------------------------


def test_a_standard_bundle_runs_without_graphs(sample_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    silent = OrtRunner(open_bundle(sample_bundle), CUDA)
    assert (silent.config.lowering, silent.cuda_graphs.enabled) == ("standard", False)
    assert "--variant" in str(silent.cuda_graphs.note)
    assert not caplog.records
    OrtRunner(open_bundle(sample_bundle), CUDA, cuda_graph=True)  # asked for: say why not
    assert "--variant" in caplog.records[0].message


def test_options_that_the_bundle_or_the_runtime_cannot_meet(
    sample_bundle: Path, variants: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunnerError, match="no graph 'step_capture'") as caught:
        OrtRunner(open_bundle(sample_bundle), CUDA, lowering="capture")
    assert "--variant capture" in str(caught.value)
    with pytest.raises(UsageError, match="unknown value"):
        OrtRunner(open_bundle(sample_bundle), CUDA, lowering="trt")  # type: ignore[arg-type]
    monkeypatch.setattr("dijiang_engines.runners.onnxruntime.config.has_linear_attention", lambda: False)
    with pytest.raises(RunnerError, match="no LinearAttention"):
        OrtRunner(open_bundle(variants), CUDA, lowering="ort")
    assert OrtRunner(open_bundle(variants), CUDA).config.lowering == "capture"


def test_the_provider_s_options(variants: Path) -> None:
    runner = OrtRunner(open_bundle(variants), CUDA, device=1)
    name, options = runner.sessions.provider(True)
    assert name == "CUDAExecutionProvider"
    assert options["enable_cuda_graph"] == "1"
    assert (options["device_id"], options["use_tf32"]) == ("1", "0")
    assert "enable_cuda_graph" not in runner.sessions.provider(False)[1]


def test_threads_take_turns_on_the_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture fails if another thread of the process copies or waits meanwhile."""
    inside, most = 0, 0
    plain = Sessions.run

    def call(self: Sessions, session: Any, binding: Any, options: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        plain(self, session, binding, options)
        inside -= 1

    monkeypatch.setattr(Sessions, "run", call)

    def work(_: int) -> list[npt.NDArray[np.float32]]:
        runner = make()
        state = runner.new_state(1)
        found = [runner.step(A([[3 + i]]), A([i]), A([1]), state) for i in range(4)]
        assert runner.cuda_graphs.captured == 2 and runner.cuda_graphs.note is None
        return found

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(work, range(3))
    assert most == 1
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_threads_print_is_not_lost_while_libraries_are_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ONNX Runtime's loader prints what it misses: other threads' output must not vanish with that."""
    module = types.ModuleType("ort")
    exec(
        "import time\n"
        "def set_default_logger_severity(level): pass\n"
        "def preload_dlls():\n"
        "    print('Failed to load libcudnn')\n"
        "    time.sleep(0.02)\n",
        module.__dict__,
    )
    stdout = sys.stdout
    with ThreadPoolExecutor(8) as pool:
        loading = [pool.submit(ort_cuda.find_cuda_libraries, module) for _ in range(16)]
        for number in range(100):
            print(number)
            time.sleep(0.002)
    assert all(future.result() is None for future in loading)
    assert sys.stdout is stdout
    assert capsys.readouterr().out.split() == [str(number) for number in range(100)]
