"""ONNX Runtime behind the Runner protocol: against NumPy, in every way that tokens can be fed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.makers.checkpoints import RandomCheckpoint, llama, neox
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle, write_manifest
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.errors import PositionError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import open_runner, registry
from dijiang_engines.runners.base import Runner
from dijiang_engines.runners.onnxruntime.runner import OrtRunner

Toy = tuple[Path, ToyModel]
A = np.array


def runner_of(folder: Path, **options: Any) -> OrtRunner:
    runner = open_runner(open_bundle(folder), "onnxruntime-cpu", threads=1, **options)
    assert isinstance(runner, OrtRunner)
    return runner


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.std(expected))))


def test_is_a_runner(toy: Toy) -> None:
    runner = runner_of(toy[0])
    assert isinstance(runner, Runner)
    assert (runner.name, runner.spec, runner.all_logits) == ("onnxruntime-cpu", SPEC, False)


def test_sessions_are_loaded_when_needed(toy: Toy) -> None:
    runner = runner_of(toy[0])
    assert not runner.sessions.loaded
    state = runner.new_state(1)
    runner.step(A([[5]]), A([0]), A([1]), state)
    assert set(runner.sessions.loaded) == {"step"}
    runner.warm_up()
    assert set(runner.sessions.loaded) == {"step", "prefill"}


def test_a_step_binds_once(toy: Toy) -> None:
    runner = runner_of(toy[0])
    state = runner.new_state(1)
    runner.step(A([[5]]), A([0]), A([1]), state)
    step = state.slot.step
    for n in range(1, 4):
        runner.step(A([[5]]), A([n]), A([1]), state)
    assert step is not None and state.slot.step is step


@pytest.mark.parametrize(
    ("ids", "positions", "lens", "words"),
    [
        ([[260]], [0], [1], "token id"),
        ([[-1]], [0], [1], "token id"),
        ([[1, 2]], [0], [3], "seq_lens out of range"),
        ([[1]], [0], [-1], "seq_lens out of range"),
        ([[1]], [-1], [1], "negative"),
        ([[1], [2]], [0], [1], "do not fit the state"),
        ([1], [0], [1], "do not fit the state"),
        ([[]], [0], [0], "do not fit the state"),
        ([[1]], [0, 0], [1], "do not fit the state"),
    ],
)
def test_bad_calls(toy: Toy, ids: Any, positions: Any, lens: Any, words: str) -> None:
    runner = runner_of(toy[0])
    with pytest.raises(RunnerError, match=words):
        runner.prefill(A(ids, np.int64), A(positions), A(lens), runner.new_state(1))


def test_a_step_takes_one_token(toy: Toy) -> None:
    runner = runner_of(toy[0])
    with pytest.raises(RunnerError, match="one token"):
        runner.step(A([[1, 2]]), A([0]), A([2]), runner.new_state(1))


def test_foreign_states_are_refused(toy: Toy) -> None:
    one, two = runner_of(toy[0]), runner_of(toy[0])
    with pytest.raises(RunnerError, match="belongs to the runner"):
        two.step(A([[1]]), A([0]), A([1]), one.new_state(1))
    with pytest.raises(RunnerError, match="another shape"):
        one.import_state([np.zeros((1, 2, 4, 4), np.float32)])
    with pytest.raises(RunnerError, match="another shape"):
        one.import_state([np.zeros((1, 2, 4, 5), np.float32)] * 2)
    with pytest.raises(RunnerError, match="at least one sequence"):
        one.new_state(0)


def test_past_a_trained_table(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", decay="tables", decay_rows=10)
    runner = runner_of(tmp_path / "b")
    state = runner.new_state(2)
    runner.prefill(A([[1] * 10, [1] * 10]), A([0, 0]), A([10, 10]), state)
    with pytest.raises(PositionError) as caught:
        runner.step(A([[1], [1]]), A([10, 10]), A([0, 1]), state)
    assert all(word in str(caught.value) for word in ("row 1", "11 tokens", "at most 10", "--extend-decay"))
    # A finished row may stand at the limit.
    runner.step(A([[1], [1]]), A([10, 9]), A([0, 1]), state)


def test_extended_tables_have_no_limit(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", decay="tables", decay_rows=10, decay_extended=True)
    runner = runner_of(tmp_path / "b")
    runner.step(A([[1]]), A([10**6]), A([1]), runner.new_state(1))


def test_past_learned_positions(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", position_embeddings=8, position_offset=2)
    runner = runner_of(tmp_path / "b")
    with pytest.raises(PositionError, match="row 0") as caught:
        runner.prefill(A([[1] * 9]), A([0]), A([9]), runner.new_state(1))
    assert "position embeddings" in str(caught.value)
    assert "--extend-decay" not in str(caught.value)


def test_bfloat16_on_the_cpu(toy: Toy) -> None:
    write_manifest(toy[0], SPEC, dtype="bfloat16")
    with pytest.raises(RunnerError, match="bfloat16") as caught:
        runner_of(toy[0])
    assert "--dtype float32" in str(caught.value)


def test_a_graph_that_onnx_runtime_cannot_load(toy: Toy) -> None:
    graph = onnx.load(toy[0] / "step.onnx", load_external_data=False)
    cast = next(node for node in graph.graph.node if node.op_type == "Cast")
    cast.attribute[0].i = onnx.TensorProto.INT64  # for a product with float32
    (toy[0] / "step.onnx").write_bytes(graph.SerializeToString())
    write_manifest(toy[0], SPEC)
    runner = runner_of(toy[0])
    with pytest.raises(RunnerError, match="cannot load") as caught:
        runner.step(A([[1]]), A([0]), A([1]), runner.new_state(1))
    assert "Mul" in str(caught.value)


def test_a_graph_that_fails_is_reported_once(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's own log would print the names of a stranger's graph as they are."""
    model = onnx.load(toy[0] / "step.onnx", load_external_data=False)
    gather = next(node for node in model.graph.node if node.op_type == "Gather")
    far = onnx.numpy_helper.from_array(np.int64(10**6), "a_million")
    model.graph.initializer.append(far)
    add = onnx.helper.make_node("Add", [gather.input[1], far.name], ["beyond"])
    model.graph.node.insert(list(model.graph.node).index(gather), add)
    gather.input[1], gather.name = "beyond", "\x1b[2Jgather"
    (toy[0] / "step.onnx").write_bytes(model.SerializeToString())
    write_manifest(toy[0], SPEC)
    runner = runner_of(toy[0])
    with pytest.raises(RunnerError, match="failed while running") as caught:
        runner.step(A([[1]]), A([0]), A([1]), runner.new_state(1))
    assert "gather" in str(caught.value)
    assert capfd.readouterr() == ("", "")


# -- which runner ----------------------------------------------------------------------------------------


def test_cuda_is_refused_by_a_build_without_it(toy: Toy) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    with pytest.raises(RunnerError, match="has no CUDAExecutionProvider") as caught:
        open_runner(open_bundle(toy[0]), "onnxruntime-cuda")
    assert "[gpu]" in str(caught.value)


def test_a_cuda_build_that_falls_back_to_the_cpu_is_refused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA when it was built with it, and runs on the CPU if its libraries are missing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, ["CPUExecutionProvider"]),
    )
    runner = open_runner(open_bundle(toy[0]), "cuda")
    assert isinstance(runner, OrtRunner)
    with pytest.raises(RunnerError, match="cannot use CUDA here"):
        runner.warm_up()


def test_unknown_runner(toy: Toy) -> None:
    with pytest.raises(UsageError, match="no runner 'tpu'") as caught:
        open_runner(open_bundle(toy[0]), "tpu")
    assert "onnxruntime-cpu" in str(caught.value)


def test_auto_prefers_cuda_only_where_it_works(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(toy[0])
    fake = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(registry, "cuda_devices", lambda: 0)
    assert registry._best(bundle) == "onnxruntime-cpu"
    monkeypatch.setattr(registry, "cuda_devices", lambda: 1)
    assert registry._best(bundle) == "onnxruntime-cuda"


def test_auto_is_the_cpu_here(toy: Toy) -> None:
    if registry.cuda_devices():
        pytest.skip("this machine has CUDA")
    assert open_runner(open_bundle(toy[0])).name == "onnxruntime-cpu"


def test_onnx_runtime_is_absent(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    with pytest.raises(RunnerError, match="is not installed") as caught:
        open_runner(open_bundle(toy[0]))
    assert "dijiang-export[cpu]" in str(caught.value)


def test_bad_options(toy: Toy) -> None:
    with pytest.raises(UsageError, match="threads"):
        OrtRunner(open_bundle(toy[0]), threads=0)
    with pytest.raises(UsageError, match="unknown value"):
        OrtRunner(open_bundle(toy[0]), prepack="maybe")  # type: ignore[arg-type]


def test_prepacking_yields_to_scarce_memory(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner_of(toy[0]).config.prepack == "step"
    monkeypatch.setattr("dijiang_engines.runners.onnxruntime.config.available_memory", lambda: 1000.0)
    assert runner_of(toy[0]).config.prepack == "none"
    assert runner_of(toy[0], prepack="step").config.prepack == "step"


# -- real bundles ----------------------------------------------------------------------------------------

Exported = Callable[..., tuple[Path, NumpyRunner]]


@pytest.mark.parametrize(
    "model",
    [
        neox(vocab=300).with_tokenizer(),
        neox(vocab=260, heads=6, hidden=96).with_trained_decay(),
        llama(heads=4, kv_heads=2, vocab=260),
    ],
    ids=["neox", "tables", "llama"],
)
def test_exported_bundles_compute_dijiang(exported: Exported, model: RandomCheckpoint) -> None:
    """Prefill in uneven pieces, steps and padding, against the recurrence in float64."""
    folder, oracle = exported(model)
    runner = runner_of(folder)
    rng = np.random.default_rng(3)
    lens = A([90, 37])
    ids = rng.integers(0, runner.spec.vocab_size, (2, 90))
    got_state, state = runner.new_state(2), oracle.new_state(2)
    done = A([0, 0])
    for size in (1, 64, 7, 1, 1, 16):
        chunk = np.take_along_axis(ids, np.minimum(done[:, None] + np.arange(size), 89), axis=1)
        take = np.minimum(size, lens - done)
        call = "step" if size == 1 else "prefill"
        got = getattr(runner, call)(chunk, done, take, got_state)
        expected = getattr(oracle, call)(chunk, done, take, state)
        assert np.isfinite(got).all()
        for row in np.flatnonzero(take):
            error = np.abs(got[row] - expected[row]).max() / expected[row].std()
            assert error < 1e-4, (size, row, error)
        done = done + take
    assert done.tolist() == lens.tolist()
    for got_layer, layer in zip(runner.export_state(got_state), state, strict=True):
        np.testing.assert_allclose(got_layer, layer, rtol=1e-4, atol=1e-5 * np.abs(layer).max())
