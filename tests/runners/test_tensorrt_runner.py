"""The TensorRT runner on a fake machine: the right tensors in the right places, refusals before harm is done.

fakes/tensorrt.py runs a bundle's standard graph where TensorRT would run the plan; fakes/cuda.py runs work
as late as it may. That the plan and the kernels are right, only a GPU shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import cuda as fake_cuda
from support.fakes import tensorrt as fake_tensorrt
from support.fakes.tensorrt import MAGIC, FakeMachine
from support.makers.checkpoints import neox
from support.makers.engine_folders import SMALL, Made, Open, edit_manifest, spoil, tokens
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines import io_names
from dijiang_engines.errors import BundleError, PluginError, PositionError, RunnerError, UsageError
from dijiang_engines.formats.engine import open_engine, write_engine_manifest
from dijiang_engines.formats.folder import spec_sha256
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.base import Runner
from dijiang_engines.runners.tensorrt import cublaslt
from dijiang_engines.runners.tensorrt.contexts import KEPT_CONTEXTS
from dijiang_engines.spec import ModelSpec
from dijiang_engines.validation.validate import validate

A = np.array
VERSIONS = ["8.6.0", "10.3.0", "10.13.3", "11.1.0"]


@pytest.fixture
def engine(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage, on its machine."""
    folder, _, machine = made("8.6.0", **SMALL)
    machine.enter(monkeypatch)
    return Path(shutil.copytree(folder, tmp_path / "e"))


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * max(1.0, float(np.std(expected))))


def test_what_products_of_many_rows_need(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for before the plugin does, and said where it is missing: of engines that have such products."""
    asked: list[str] = []
    monkeypatch.setattr(cublaslt, "load_from_wheels", lambda: asked.append("load"))
    monkeypatch.setattr(cublaslt, "missing", lambda library: asked.append(library.name) or "prompts are slow")
    runner: Any = open_runner(open_engine(engine))
    assert not asked and "prompts are slow" not in runner.notes()
    monkeypatch.setattr(cublaslt, "is_wanted", lambda engine: True)
    runner = open_runner(open_engine(engine))
    assert asked == ["load"]
    assert runner.notes()[-1] == "prompts are slow" and asked[1:] == ["libdijiang_kernels.so"]


# Numbers


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("layout", ["one", "two"])
def test_prefill_and_steps(opened: Open, version: str, layout: str) -> None:
    """Unequal rows, an empty row, a row that waits, state out and in, and a row that begins anew."""
    runner, oracle = opened(version, layout=layout)
    assert isinstance(runner, Runner) and (runner.name, runner.max_batch) == ("tensorrt", 6)
    assert runner.gpu.integers == (np.int32 if version.startswith("8") else np.int64)
    ids, lens = tokens(3, 5), A([5, 3, 0])
    state, expected = runner.new_state(3), oracle.new_state(3)
    zeros = A([0, 0, 0])
    got = runner.prefill(ids, zeros, lens, state)
    assert got.shape == (3, 1, 256) and got.dtype == np.float32
    close(got[:2], oracle.prefill(ids, zeros, lens, expected)[:2])
    assert not any(layer[2].any() for layer in runner.export_state(state))
    for n in range(4):
        counts = A([1, 0, 1]) if n == 1 else A([1, 1, 1])
        step = tokens(3, 1, seed=n + 1)
        rows = counts > 0
        got = runner.step(step, lens, counts, state)
        close(got[rows], oracle.step(step, lens, counts, expected)[rows])
        lens = lens + counts
    moved = runner.import_state(runner.export_state(state))
    runner.reset_rows(moved, [1])
    oracle.reset_rows(expected, [1])
    lens[1] = 0
    last = tokens(3, 1, seed=9)
    close(runner.step(last, lens, A([1, 1, 1]), moved), oracle.step(last, lens, A([1, 1, 1]), expected))
    for layer, other in zip(runner.export_state(moved), expected, strict=True):
        close(layer, other)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_prompts_longer_than_the_profile_are_read_in_pieces(opened: Open, logits: str) -> None:
    runner, oracle = opened(export={"logits": logits})
    oracle = NumpyRunner(oracle.spec, oracle.weights, all_logits=logits == "all")
    ids, lens, starts = tokens(4, 21), A([21, 8, 3, 17]), A([0, 5, 0, 2])
    state, expected = runner.new_state(4), oracle.new_state(4)
    got = runner.prefill(ids, starts, lens, state)
    right = oracle.prefill(ids, starts, lens, expected)
    assert got.shape == right.shape == (4, 21 if logits == "all" else 1, 256)
    for row, count in enumerate(lens):
        part = slice(0, count) if logits == "all" else slice(0, 1)
        close(got[row, part], right[row, part])
    for layer, other in zip(runner.export_state(state), expected, strict=True):
        close(layer, other)


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
def test_the_recorded_cases(opened: Open, version: str) -> None:
    """Every replay of `validate`, on one plan with two profiles."""
    runner, _ = opened(version)
    report = validate(runner, runner.engine.reference())
    report.raise_on_mismatch()
    assert sum(result.checks for result in report.results) > 100


def test_steps_with_and_without_a_recorded_graph_are_the_same(opened: Open) -> None:
    results = []
    for graph in (True, False):
        runner, _ = opened(cuda_graph=graph)
        state = runner.new_state(2)
        runner.prefill(tokens(2, 5), A([0, 0]), A([5, 4]), state)
        results.append([runner.step(tokens(2, 1, n), A([5, 4]) + n, A([1, 1]), state) for n in range(3)])
        assert (state.graph is not None) == graph
    np.testing.assert_array_equal(results[0], results[1])


def test_one_buffer_is_past_and_present(opened: Open) -> None:
    """In place: the memory of a state is its size, and a step moves nothing."""
    runner, oracle = opened()
    state = runner.new_state(3)
    bound = state.addresses()
    for layer in range(oracle.spec.num_layers):
        assert bound[io_names.past_state(layer)] == bound[io_names.present_state(layer)]
    assert state.memory.size == 3 * oracle.spec.state_bytes
    before = sum(len(buffer) for buffer in fake_cuda.DEVICE.memory.values())
    runner.step(tokens(3, 1), A([0] * 3), A([1] * 3), state)
    between = sum(len(buffer) for buffer in fake_cuda.DEVICE.memory.values())
    for n in range(20):
        runner.step(tokens(3, 1), A([n + 1] * 3), A([1] * 3), state)
    assert sum(len(buffer) for buffer in fake_cuda.DEVICE.memory.values()) == between == before


def test_recording_a_step_changes_no_state(opened: Open) -> None:
    runner, oracle = opened()
    layers = [
        np.random.default_rng(0).standard_normal((2, *oracle.spec.state_shape)).astype(np.float32)
        for _ in range(oracle.spec.num_layers)
    ]
    state = runner.import_state(layers)
    runner.step(tokens(2, 1), A([7, 7]), A([0, 0]), state)
    for got, expected in zip(runner.export_state(state), layers, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_states_of_many_batch_sizes_at_once(opened: Open) -> None:
    """More sizes than there are contexts: what was recorded first still runs with its own."""
    runner, oracle = opened()
    batches = [1, 2, 3, 4, 5, 6, 2]
    assert len(set(batches)) > KEPT_CONTEXTS
    states = [(b, runner.new_state(b), oracle.new_state(b)) for b in batches]
    for n in range(3):
        for index, (batch, state, expected) in enumerate(states):
            call = tokens(batch, 1, 10 * n + index), A([n] * batch), A([1] * batch)
            close(runner.step(*call, state), oracle.step(*call, expected))
        new, right = runner.new_state(1), oracle.new_state(1)  # for which an old context may serve
        runner.prefill(tokens(1, 3), A([0]), A([3]), new)
        oracle.prefill(tokens(1, 3), A([0]), A([3]), right)
        close(
            runner.step(tokens(1, 1), A([3]), A([1]), new), oracle.step(tokens(1, 1), A([3]), A([1]), right)
        )
    assert len(runner.contexts.step_batches) == KEPT_CONTEXTS


@pytest.mark.parametrize("layout", ["one", "two"])
def test_steps_run_in_the_profile_that_was_made_for_them(opened: Open, layout: str) -> None:
    runner, _ = opened(layout=layout)
    runner.warm_up()
    assert runner.contexts.step_batches == (1,)
    prefill, step = runner.contexts.for_prefill(), runner.contexts.for_steps(1)
    assert (prefill.profile, step.profile) == ((0, 1) if layout == "one" else (0, 0))
    assert (step.engine is prefill.engine) == (layout == "one")


def test_nothing_is_left_on_the_gpu(opened: Open) -> None:
    runner, _ = opened()
    state = runner.new_state(2)
    runner.prefill(tokens(2, 3), A([0, 0]), A([3, 3]), state)
    runner.step(tokens(2, 1), A([3, 3]), A([1, 1]), state)
    assert fake_cuda.DEVICE.memory
    del state, runner
    import gc

    gc.collect()
    assert fake_cuda.DEVICE.memory == {}


def test_validate_names_the_layer_that_makes_a_nan(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = opened()
    spoil(monkeypatch, layer=1, row=0, after=0)
    report = validate(runner, runner.engine.reference(), replays=["steps"])
    first = report.first_failure
    assert not report.passed and first is not None
    assert (first.layer, first.row, first.tokens) == (1, 0, 1)
    assert "nor is the state of layer 1, while that of layer 0 is" in first.comparison.reason


# Refused before anything is loaded


@pytest.mark.parametrize(
    ("key", "value", "what", "got"),
    [
        ("tensorrt", "8.6.1", "another TensorRT", "8.6.0"),
        ("tensorrt", "10.13.3", "another TensorRT", "8.6.0"),
        ("gpu", "NVIDIA H200", "another GPU", "NVIDIA Test, sm_90"),
        ("compute_capability", 87, "another GPU", "NVIDIA Test, sm_90"),
        ("plugin_sources", "0" * 64, "another plugin", None),
    ],
)
def test_an_engine_for_another_machine(
    engine: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, what: str, got: str | None
) -> None:
    edit_manifest(engine, ("made_for", key), value)
    monkeypatch.setattr(fake_tensorrt._Runtime, "deserialize_cuda_engine", None)  # must not be reached
    with pytest.raises(RunnerError, match=f"was made for {what}") as info:
        open_runner(open_engine(engine))
    assert got is None or info.value.got == got
    assert info.value.exit_code == 1 and "build-engine BUNDLE -o ENGINE --force" in str(info.value.hint)
    assert "\n" not in info.value.what


def test_a_plan_that_was_changed_after_the_folder_was_opened(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (engine / "model.plan").read_bytes()
    (engine / "model.plan").write_bytes(data[:-1] + b" ")
    monkeypatch.setattr(fake_tensorrt._Runtime, "deserialize_cuda_engine", None)
    with pytest.raises(BundleError, match="is corrupt"):
        open_runner(open_engine(engine, verify=False))


def rewrite(engine: Path, data: bytes) -> None:
    """Another plan, with the right hash: what a faulty build or a stranger would have left."""
    (engine / "model.plan").write_bytes(data)
    facts = json.loads((engine / "engine.json").read_text())
    for key in ("format", "format_version", "files"):
        del facts[key]
    write_engine_manifest(engine, facts)


@pytest.mark.parametrize("cut", [1, 20, 600])
def test_a_plan_that_tensorrt_cannot_read(engine: Path, cut: int) -> None:
    rewrite(engine, (engine / "model.plan").read_bytes()[:cut])
    with pytest.raises(RunnerError, match=r"TensorRT 8\.6\.0 cannot load .*model\.plan") as info:
        open_runner(open_engine(engine))
    assert "Serialization" in str(info.value.got) and "build the engine again" in str(info.value.hint)


def test_an_empty_plan(engine: Path) -> None:
    rewrite(engine, b"")
    with pytest.raises(RunnerError, match="cannot load") as info:
        open_runner(open_engine(engine))
    assert "the plan is empty" in str(info.value.got) and "build the engine again" in str(info.value.hint)


def test_a_plan_of_another_version_under_this_one_s_name(engine: Path) -> None:
    facts = json.loads((engine / "model.plan").read_bytes()[len(MAGIC) :])
    rewrite(engine, MAGIC + json.dumps(facts | {"tensorrt": "10.3.0"}).encode())
    with pytest.raises(RunnerError, match="cannot load") as info:
        open_runner(open_engine(engine))
    assert "not compatible with this version of TensorRT" in str(info.value.got)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 128}, "logits [-1, 1, 256]"),
        ({"vocab_size": 2**31 - 1}, "logits [-1, 1, 256]"),
        ({"num_layers": 1}, "1.recurrent_state in model.plan only"),
        ({"num_layers": 9}, "2.recurrent_state in engine.json only"),
        ({"head_dim": 8}, "recurrent_state [-1, 4, 16, 16]"),
    ],
)
def test_a_plan_of_another_model(engine: Path, change: dict[str, int], words: str) -> None:
    """TensorRT would write beside buffers of the manifest's sizes."""
    spec = json.loads((engine / "engine.json").read_text())["spec"] | change
    edit_manifest(engine, ("spec",), spec)
    edit_manifest(engine, ("source", "spec_sha256"), spec_sha256(ModelSpec.from_json(spec)))
    with pytest.raises(BundleError, match="do not describe the same model") as info:
        open_runner(open_engine(engine))
    assert words in str(info.value.got)


def test_no_plugin(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIJIANG_PLUGIN")
    with pytest.raises(PluginError, match="is not built") as info:
        open_runner(open_engine(engine))
    assert info.value.hint == "dijiang-export build-plugin"


def test_no_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(engine.parent / "bare", gpus=0).enter(monkeypatch)
    with pytest.raises(RunnerError, match="no NVIDIA GPU"):
        open_runner(open_engine(engine))


def test_engines_run_on_tensorrt_and_bundles_do_not(
    engine: Path, exported: Callable[..., tuple[Path, NumpyRunner]]
) -> None:
    from dijiang_engines.formats.bundle import open_bundle

    with pytest.raises(UsageError, match="runs on TensorRT only") as info:
        open_runner(open_engine(engine), "cpu")
    assert "bundle" in str(info.value.hint)
    with pytest.raises(UsageError, match="TensorRT runs engines") as info:
        open_runner(open_bundle(exported()[0]), "trt")
    assert "build-engine" in str(info.value.hint)
    with pytest.raises(UsageError, match="there is no runner") as info:
        open_runner(open_engine(engine), "tensort")
    assert "tensorrt" in str(info.value.expected)


# Sizes


def test_more_sequences_than_it_was_built_for(opened: Open) -> None:
    runner, _ = opened()
    with pytest.raises(RunnerError, match="so many sequences at once") as info:
        runner.new_state(7)
    assert (info.value.got, info.value.expected) == ("7", "at most 6")
    assert "--max-batch 7" in str(info.value.hint) and "--batch 6" in str(info.value.hint)
    with pytest.raises(RunnerError, match="at least one sequence"):
        runner.new_state(0)


def test_a_plan_that_takes_less_than_the_manifest_says(engine: Path) -> None:
    edit_manifest(engine, ("profiles", "max_batch"), 100)
    edit_manifest(engine, ("profiles", "max_length"), 100)
    runner = open_runner(open_engine(engine))
    for call in (
        lambda: runner.prefill(tokens(1, 50), A([0]), A([50]), runner.new_state(1)),
        lambda: runner.step(tokens(7, 1), A([0] * 7), A([1] * 7), runner.new_state(7)),
    ):
        with pytest.raises(RunnerError, match="not built for this size") as info:
            call()
        assert "--max-batch" in str(info.value.hint) and "--max-length" in str(info.value.hint)


def test_the_gpu_is_full(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = opened()
    monkeypatch.setattr(fake_cuda.DEVICE, "limit", 20_000)
    with pytest.raises(RunnerError, match="the GPU is out of memory") as info:
        runner.new_state(6)
    assert "--max-batch" in str(info.value.hint)
    monkeypatch.setattr(fake_cuda.DEVICE, "limit", None)
    runner.step(tokens(1, 1), A([0]), A([1]), runner.new_state(1))  # and it goes on


# Calls that make no sense


@pytest.mark.parametrize(
    ("ids", "positions", "lens", "words"),
    [
        ([[1, 2]], [0, 0], [2, 2], "do not fit the state"),
        ([[1], [256]], [0, 0], [1, 1], "row 1 holds a token id"),
        ([[1], [-1]], [0, 0], [1, 1], "row 1 holds a token id"),
        ([[1], [1]], [0, 0], [1, 2], "seq_lens out of range"),
        ([[1], [1]], [0, -1], [1, 1], "positions must not be negative"),
    ],
)
def test_bad_calls(opened: Open, ids: Any, positions: Any, lens: Any, words: str) -> None:
    runner, _ = opened()
    state = runner.new_state(2)
    for call in (runner.prefill, runner.step):
        with pytest.raises(RunnerError, match=words):
            call(A(ids), A(positions), A(lens), state)


def test_bad_states(opened: Open) -> None:
    runner, _ = opened()
    other, _ = opened()
    state = runner.new_state(2)
    with pytest.raises(RunnerError, match="belongs to the runner that made it"):
        other.step(tokens(2, 1), A([0, 0]), A([1, 1]), state)
    with pytest.raises(RunnerError, match="there is no such row"):
        runner.reset_rows(state, [0, 2])
    with pytest.raises(RunnerError, match="a step takes one token"):
        runner.step(tokens(2, 3), A([0, 0]), A([1, 1]), state)
    layers = runner.export_state(state)
    for bad in ([], layers[:-1], [layer[:, :1] for layer in layers], [layers[0], layers[1][:1]]):
        with pytest.raises(RunnerError, match="does not fit the model"):
            runner.import_state(bad)


def test_past_a_trained_table(opened: Open) -> None:
    runner, oracle = opened(model=neox(positions=16).with_trained_decay())
    assert oracle.spec.max_positions == 16
    state = runner.new_state(1)
    runner.prefill(tokens(1, 12), A([0]), A([12]), state)
    with pytest.raises(PositionError, match="past the last position"):
        runner.prefill(tokens(1, 5), A([12]), A([5]), state)
