"""What a runner computes from a bundle, whichever runtime it has: a toy whose numbers have a closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.makers.toy_bundle import SPEC, ToyModel, make_bundle
from support.openvino_runner import openvino_runner

from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import Runner, open_runner

A = np.array
Toy = tuple[Path, ToyModel]
Make = Callable[[Path], Runner]


@pytest.fixture(params=["onnxruntime", "openvino, steps of any size", "openvino"])
def make(request: pytest.FixtureRequest) -> Make:
    """A runner of a bundle's folder."""
    if request.param == "onnxruntime":
        return lambda folder: open_runner(open_bundle(folder), "onnxruntime-cpu", threads=1)
    fixed = 4 if request.param == "openvino" else 0
    return lambda folder: openvino_runner(folder, fixed_batches=fixed)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.std(expected))))


def test_prefill_then_steps(toy: Toy, make: Make) -> None:
    folder, model = toy
    runner = make(folder)
    state = runner.new_state(1)
    close(runner.prefill(A([[5, 6, 7]]), A([0]), A([3]), state)[0, 0], model.logits([5, 6, 7]))
    tokens = [5, 6, 7]
    for token in (8, 9, 10, 11):
        logits = runner.step(A([[token]]), A([len(tokens)]), A([1]), state)
        tokens.append(token)
        assert logits.shape == (1, 1, SPEC.vocab_size)
        close(logits[0, 0], model.logits(tokens))
    for got, expected in zip(runner.export_state(state), model.states(tokens), strict=True):
        close(got[0], expected)
    # And a prefill goes on from where steps came to.
    close(runner.prefill(A([[1, 2]]), A([7]), A([2]), state)[0, 0], model.logits([*tokens, 1, 2]))
    close(runner.step(A([[3]]), A([9]), A([1]), state)[0, 0], model.logits([*tokens, 1, 2, 3]))


def test_padding_and_empty_rows(toy: Toy, make: Make) -> None:
    folder, model = toy
    runner = make(folder)
    state = runner.new_state(3)
    logits = runner.prefill(A([[5, 6, 7], [8, 1, 2], [3, 3, 3]]), A([0, 4, 0]), A([3, 1, 0]), state)
    close(logits[0, 0], model.logits([5, 6, 7]))
    close(logits[1, 0], model.logits([8], 4))
    layers = runner.export_state(state)
    assert not layers[0][2].any()
    # Row 0 is done: it must keep its state bit for bit while row 1 goes on.
    logits = runner.step(A([[9], [9], [0]]), A([3, 5, 0]), A([0, 1, 0]), state)
    close(logits[1, 0], model.logits([8, 9], 4))
    after = runner.export_state(state)
    for before_layer, after_layer in zip(layers, after, strict=True):
        np.testing.assert_array_equal(after_layer[[0, 2]], before_layer[[0, 2]])


def test_results_are_the_caller_s(toy: Toy, make: Make) -> None:
    """Later calls must not change what earlier calls returned, nor what was imported or exported."""
    runner = make(toy[0])
    state = runner.new_state(1)
    read = runner.prefill(A([[4, 5]]), A([0]), A([2]), state)
    first = runner.step(A([[5]]), A([2]), A([1]), state)
    kept, exported = [first.copy(), read.copy()], runner.export_state(state)
    copies = [layer.copy() for layer in exported]
    other = runner.import_state(exported)
    for n in range(3):
        runner.step(A([[6]]), A([n + 3]), A([1]), state)
        runner.step(A([[7]]), A([n + 3]), A([1]), other)
        runner.prefill(A([[1, 9]]), A([n + 3]), A([2]), runner.new_state(1))
    runner.reset_rows(other, [0])
    for got, expected in zip((first, read, *exported), (*kept, *copies), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_exported_layers_may_be_written_to(toy: Toy, make: Make) -> None:
    folder, model = toy
    runner = make(folder)
    state = runner.new_state(1)
    runner.step(A([[5]]), A([0]), A([1]), state)
    given = runner.export_state(state)
    other = runner.import_state(given)
    for layers in (given, runner.export_state(state), runner.export_state(other)):
        for layer in layers:
            layer[...] = np.nan
    for one in (state, other):
        close(runner.step(A([[8]]), A([1]), A([1]), one)[0, 0], model.logits([5, 8]))


def test_states_are_independent(toy: Toy, make: Make) -> None:
    folder, model = toy
    runner = make(folder)
    a, b, c = runner.new_state(1), runner.new_state(2), runner.new_state(1)
    runner.step(A([[5]]), A([0]), A([1]), a)
    runner.step(A([[6], [7]]), A([0, 0]), A([1, 1]), b)
    runner.step(A([[9]]), A([0]), A([1]), c)
    close(runner.step(A([[8]]), A([1]), A([1]), a)[0, 0], model.logits([5, 8]))
    close(runner.step(A([[8], [9]]), A([1, 1]), A([1, 1]), b)[1, 0], model.logits([7, 9]))
    close(runner.step(A([[8]]), A([1]), A([1]), c)[0, 0], model.logits([9, 8]))


def test_export_import_and_reset(toy: Toy, make: Make) -> None:
    folder, model = toy
    runner, again = make(folder), make(folder)
    state = runner.new_state(3)
    runner.prefill(A([[5, 6], [7, 8], [9, 9]]), A([0, 0, 0]), A([2, 2, 2]), state)
    moved = again.import_state(runner.export_state(state))
    close(again.step(A([[9]] * 3), A([2] * 3), A([1] * 3), moved)[1, 0], model.logits([7, 8, 9]))
    before = again.export_state(moved)
    again.reset_rows(moved, [])
    again.reset_rows(moved, [2, 0])
    for layer, old in zip(again.export_state(moved), before, strict=True):
        assert not layer[[0, 2]].any()
        np.testing.assert_array_equal(layer[1], old[1])
    logits = again.step(A([[4], [1], [4]]), A([0, 3, 0]), A([1, 1, 1]), moved)
    close(logits[0, 0], model.logits([4]))
    close(logits[1, 0], model.logits([7, 8, 9, 1]))
    with pytest.raises(RunnerError, match="no such row"):
        again.reset_rows(moved, [3])


def test_all_logits(tmp_path: Path, make: Make) -> None:
    model = make_bundle(tmp_path / "b", logits="all")
    runner = make(tmp_path / "b")
    assert runner.all_logits
    logits = runner.prefill(A([[5, 6, 7], [8, 9, 0]]), A([0, 0]), A([3, 2]), runner.new_state(2))
    assert logits.shape == (2, 3, SPEC.vocab_size)
    for t in range(3):
        close(logits[0, t], model.logits([5, 6, 7][: t + 1]))
    close(logits[1, 1], model.logits([8, 9]))
