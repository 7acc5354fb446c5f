"""Rows of a state: out, in, and from one state to another, with every runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners import Runner


def filled(runner: Runner, batch: int, seed: int = 0, calls: int = 1) -> Any:
    """A state that has read three tokens; after an even number of calls in the other of two buffers."""
    rng = np.random.default_rng(seed)
    state = runner.new_state(batch)
    for _ in range(calls):
        runner.prefill(rng.integers(1, 200, (batch, 3)), np.zeros(batch, np.int64), np.full(batch, 3), state)
    return state


def same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("calls", [1, 2])
def test_out_and_in(runner: Runner, calls: int) -> None:
    state, other = filled(runner, 4, calls=calls), filled(runner, 3, seed=1)
    before, theirs = runner.export_state(state), runner.export_state(other)
    rows = runner.get_rows(state, [2, 0, 2])
    same(rows, [layer[[2, 0, 2]] for layer in before])
    for layer in rows:
        layer[:] = 7  # copies
    same(runner.export_state(state), before)
    runner.put_rows(state, [3, 1], runner.get_rows(other, [0, 2]))
    now = runner.export_state(state)
    same([layer[[3, 1]] for layer in now], [layer[[0, 2]] for layer in theirs])
    same([layer[[0, 2]] for layer in now], [layer[[0, 2]] for layer in before])


def test_from_one_state_to_another(runner: Runner) -> None:
    source, target = filled(runner, 2), filled(runner, 5, seed=1, calls=2)
    old, before = runner.export_state(source), runner.export_state(target)
    runner.copy_rows(source, [1, 1, 0], target, [4, 0, 2])
    now = runner.export_state(target)
    same([layer[[4, 0, 2]] for layer in now], [layer[[1, 1, 0]] for layer in old])
    same([layer[[1, 3]] for layer in now], [layer[[1, 3]] for layer in before])
    same(runner.export_state(source), old)
    runner.copy_rows(source, [], target, [])
    same(runner.export_state(target), now)


def test_a_copied_row_goes_on_as_the_original(runner: Runner) -> None:
    source, target = filled(runner, 2), runner.new_state(3)
    runner.copy_rows(source, [1], target, [2])
    step, zeros = np.full((3, 1), 9), np.zeros(3, np.int64)
    got = runner.step(step, zeros, np.array([0, 0, 1]), target)[2]
    expected = runner.step(step[:2], zeros[:2], np.array([0, 1]), source)[1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not any(layer[:2].any() for layer in runner.export_state(target))


def test_what_is_refused_changes_nothing(runner: Runner) -> None:
    state, other = filled(runner, 2), filled(runner, 2, seed=1)
    before = runner.export_state(state)
    one = runner.get_rows(other, [0])
    bad: list[Callable[[], object]] = [
        lambda: runner.get_rows(state, [2]),
        lambda: runner.get_rows(state, [-1]),
        lambda: runner.put_rows(state, [2], one),
        lambda: runner.put_rows(state, [0, 1], one),
        lambda: runner.put_rows(state, [0, 0], runner.get_rows(other, [0, 1])),
        lambda: runner.put_rows(state, [0], one[:1]),
        lambda: runner.put_rows(state, [0], [layer[:, :1] for layer in one]),
        lambda: runner.copy_rows(other, [0], state, [2]),
        lambda: runner.copy_rows(other, [2], state, [0]),
        lambda: runner.copy_rows(other, [0, 1], state, [1, 1]),
        lambda: runner.copy_rows(other, [0, 1], state, [1]),
        lambda: runner.copy_rows(state, [0], state, [1]),
    ]
    for call in bad:
        with pytest.raises(RunnerError):
            call()
        same(runner.export_state(state), before)
