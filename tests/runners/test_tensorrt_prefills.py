"""Prefills that are recorded as CUDA graphs, on a fake machine: what is recorded when, on whose memory.

The fakes prove orchestration only; that a graph computes what the runtime does, `tests/gpu/engine.py` shows.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
from support.fakes import cuda as fake_cuda
from support.makers.engine_folders import Open, tokens

from dijiang_engines.runners.tensorrt import prefills
from dijiang_engines.runners.tensorrt.prefills import KEPT_GRAPHS, REMEMBERED

A = np.array
RECORDED_AT = 3


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls show what many would."""
    monkeypatch.setattr(prefills, "RECORDED_AT", RECORDED_AT)


@pytest.mark.parametrize("layout", ["one", "two"])
def test_the_same_with_and_without_graphs(opened: Open, layout: str) -> None:
    """Unequal rows, an empty row, states that already hold something: before, at and after the recording."""
    found = []
    for graphs in (True, False):
        runner, _ = opened(layout=layout, cuda_graph=graphs)
        state, results = runner.new_state(3), []
        starts = A([0, 0, 0])
        for n in range(RECORDED_AT + 2):
            lens = A([5, 3, 0]) if n % 2 else A([2, 5, 1])
            logits = runner.prefill(tokens(3, 5, n), starts, lens, state)
            results.append(logits[lens > 0])
            results += runner.export_state(state)
            starts = starts + lens
        assert runner.prefills.sizes == (((3, 5),) if graphs else ())
        found.append(results)
    for got, expected in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_states_of_others_are_left_alone(opened: Open) -> None:
    """One graph serves all states of its size; steps and prefills of other sizes go on between."""
    runner, oracle = opened()
    pairs = [(runner.new_state(2), oracle.new_state(2)) for _ in range(3)]
    starts = A([0, 0])
    for n in range(RECORDED_AT + 1):
        for index, (state, expected) in enumerate(pairs):
            call = tokens(2, 4, 10 * n + index), starts, A([4, 2 + index])
            np.testing.assert_allclose(
                runner.prefill(*call, state), oracle.prefill(*call, expected), rtol=1e-4, atol=1e-4
            )
            step = tokens(2, 1, 100 * n + index), A([9, 9]), A([1, 0])
            runner.step(*step, state)
            oracle.step(*step, expected)
        odd = runner.new_state(1)
        runner.prefill(tokens(1, 7, n), A([0]), A([7]), odd)
    for state, expected in pairs:
        for layer, other in zip(runner.export_state(state), expected, strict=True):
            np.testing.assert_allclose(layer, other, rtol=1e-4, atol=1e-4)
    assert (2, 4) in runner.prefills.sizes


def test_a_prompt_of_many_pieces_is_recorded(opened: Open) -> None:
    """Pieces of the longest size are one size; the rest is another."""
    runner, oracle = opened()
    length = runner.max_length * (RECORDED_AT + 1) + 3
    ids, state = tokens(1, length), runner.new_state(1)
    got = runner.prefill(ids, A([0]), A([length]), state)
    right = oracle.prefill(ids, A([0]), A([length]), oracle.new_state(1))
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)
    assert runner.prefills.sizes == ((1, runner.max_length),)


def test_sizes_used_once_or_twice_are_not_recorded(opened: Open) -> None:
    runner, _ = opened()
    state = runner.new_state(1)
    for length in (2, 3, 4, 2, 3, 4):
        runner.prefill(tokens(1, length), A([0]), A([length]), state)
    assert runner.prefills.sizes == ()
    before = sum(len(buffer) for buffer in fake_cuda.DEVICE.memory.values())
    assert runner.prefills.scratch_bytes == 0 and "state_scratch" not in runner.memory()
    runner.prefill(tokens(1, 3), A([0]), A([3]), state)
    assert runner.prefills.sizes == ((1, 3),)
    taken = sum(len(buffer) for buffer in fake_cuda.DEVICE.memory.values()) - before
    assert runner.memory()["state_scratch"] == runner.prefills.scratch_bytes > 0
    assert taken >= runner.prefills.scratch_bytes


def test_few_graphs_are_kept_and_their_memory_comes_back(opened: Open) -> None:
    runner, _ = opened()
    sizes = [(batch, length) for batch in (1, 2) for length in range(2, 2 + KEPT_GRAPHS)]
    most = 0
    for batch, length in sizes:
        state = runner.new_state(batch)
        for _ in range(RECORDED_AT):
            runner.prefill(tokens(batch, length), A([0] * batch), A([length] * batch), state)
        assert runner.prefills.sizes[-1] == (batch, length) and len(runner.prefills.sizes) <= KEPT_GRAPHS
        most = max(most, runner.prefills.scratch_bytes)
    assert runner.prefills.sizes == tuple(sizes[-KEPT_GRAPHS:])
    others = [runner.new_state(batch) for batch in (1, 2)]
    assert most < sum(other.memory.size for other in others) + 10_000
    state = runner.new_state(3)
    for length in range(REMEMBERED):  # counts of sizes that were used long ago are forgotten
        runner.prefill(tokens(3, 2 + length % 6), A([0] * 3), A([1] * 3), state)
    assert len(runner.prefills.sizes) == KEPT_GRAPHS
    del runner, state, others
    gc.collect()
    assert fake_cuda.DEVICE.memory == {}


def test_more_sizes_than_are_kept_do_not_take_turns(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is recorded after as many uses again, not at every one."""
    runner, _ = opened()
    made: list[tuple[int, int]] = []
    record = runner.prefills._record
    monkeypatch.setattr(runner.prefills, "_record", lambda size: made.append(size) or record(size))
    state, rounds = runner.new_state(1), 4 * RECORDED_AT
    for _ in range(rounds):
        for length in range(2, 3 + KEPT_GRAPHS):
            runner.prefill(tokens(1, length), A([0]), A([length]), state)
    assert len(set(made)) == KEPT_GRAPHS + 1
    assert len(made) <= (KEPT_GRAPHS + 1) * rounds // RECORDED_AT
    monkeypatch.setattr(
        prefills, "REMEMBERED", 2
    )  # others' uses are forgotten, not those of what is recorded
    two = runner.new_state(2)
    for length in (2, 3, 4, *[5] * RECORDED_AT):
        runner.prefill(tokens(2, length), A([0, 0]), A([length, length]), two)
    assert runner.prefills.sizes[-1] == (2, 5) and len(runner.prefills.sizes) == KEPT_GRAPHS


def test_without_memory_it_goes_on_without_graphs(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, oracle = opened()
    state, expected = runner.new_state(2), oracle.new_state(2)
    call = tokens(2, 5), A([0, 0]), A([5, 4])
    for n in range(RECORDED_AT + 2):
        if n == RECORDED_AT - 1:
            monkeypatch.setattr(fake_cuda.DEVICE, "limit", 0)
        got = runner.prefill(*call, state)
        np.testing.assert_allclose(got, oracle.prefill(*call, expected), rtol=1e-4, atol=1e-4)
    assert runner.prefills.sizes == ()
    monkeypatch.setattr(fake_cuda.DEVICE, "limit", None)
    for _ in range(RECORDED_AT):
        runner.prefill(*call, state)
    assert runner.prefills.sizes == ()  # once it failed, it is not tried at every call


def test_logits_of_all_tokens_are_not_recorded(opened: Open) -> None:
    runner, _ = opened(export={"logits": "all"})
    state = runner.new_state(1)
    for _ in range(RECORDED_AT + 1):
        assert runner.prefill(tokens(1, 4), A([0]), A([4]), state).shape == (1, 4, 256)
    assert runner.prefills.sizes == ()
