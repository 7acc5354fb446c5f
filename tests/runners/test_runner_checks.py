"""What every runner refuses, and in the same words; positions are right up to the last that is taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.fakes.runner import ToyRunner
from support.makers.checkpoints import RandomCheckpoint, llama, neox
from support.makers.toy_bundle import SPEC, ToyModel

from dijiang_engines.errors import PositionError, RunnerError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners import Runner, open_runner
from dijiang_engines.runners.base import (
    MAX_POSITIONS,
    CountsMemory,
    HasSettings,
    LimitsBatch,
    LimitsPositions,
    TimesSteps,
    WarmsUp,
)
from dijiang_engines.runners.checks import (
    check_call,
    check_decoding,
    last_position,
)
from dijiang_engines.runners.decoding import DecodeRequest, Decodes
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.tensorrt.runner import KERNEL_POSITIONS, TensorRTRunner
from dijiang_engines.sampling import SamplingOptions

A = np.array


ONE = (A([[1]]), A([0]), A([1]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ((A([[3.7]]), A([0]), A([1])), "input_ids must be whole numbers"),
        ((A([[3.0]]), A([0]), A([1])), "input_ids must be whole numbers"),
        ((A([[True]]), A([0]), A([1])), "input_ids must be whole numbers"),
        ((A([["5"]]), A([0]), A([1])), "input_ids must be whole numbers"),
        (([[2**70]], A([0]), A([1])), "input_ids must be whole numbers"),
        ((A([[2**64 - 1]], np.uint64), A([0]), A([1])), "input_ids must be whole numbers"),
        (([[1, 2], [3]], A([0]), A([1])), "input_ids is not an array"),
        ((A([[1]]), A([0.5]), A([1])), "positions must be whole numbers"),
        ((A([[1]]), A([None]), A([1])), "positions must be whole numbers"),
        ((A([[1]]), A([0]), A([np.nan])), "seq_lens must be whole numbers"),
        ((A([[1]]), A([-1]), A([1])), "must not be negative"),
        ((A([[1]]), A([0]), A([2])), "seq_lens out of range"),
        ((A([[SPEC.vocab_size]]), A([0]), A([1])), "token id"),
        ((A([[1], [1]]), A([0]), A([1])), "do not fit the state"),
        ((A([[1]]), A([2**31]), A([1])), "right"),
        ((A([[1]]), A([MAX_POSITIONS]), A([1])), "right"),
        ((A([[1]]), A([2**63 - 1]), A([1])), "right"),
        ((A([[1]]), A([2**40]), A([0])), "right"),
    ],
)
@pytest.mark.parametrize("which", ["prefill", "step"])
def test_bad_calls(runner: Runner, which: str, call: tuple[Any, Any, Any], words: str) -> None:
    state = runner.new_state(1)
    before = [layer.copy() for layer in runner.export_state(state)]
    with pytest.raises(RunnerError, match=words) as caught:
        getattr(runner, which)(*call, state)
    assert isinstance(caught.value, PositionError) == (words == "right")
    for old, new in zip(before, runner.export_state(state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_step_of_two_tokens(runner: Runner) -> None:
    with pytest.raises(RunnerError, match="a step takes one token a row") as caught:
        runner.step(A([[1, 2]]), A([0]), A([2]), runner.new_state(1))
    assert (caught.value.got, caught.value.expected) == ("input_ids [1, 2]", "[1, 1]")


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_whole_numbers_of_any_size_are_taken(runner: Runner, kind: Any) -> None:
    if isinstance(runner, ToyRunner):
        pytest.skip("it checks that our own callers pass int64")
    expected = runner.step(*ONE, runner.new_state(1))
    got = runner.step(*(array.astype(kind) for array in ONE), runner.new_state(1))
    np.testing.assert_array_equal(got, expected)


def test_bad_states(runner: Runner) -> None:
    state = runner.new_state(2)
    layers = runner.export_state(state)
    bad: list[list[Any]] = [
        layers[:1], [], [layer[:, :1] for layer in layers], [layers[0], layers[1][:1]],
        [layer[:0] for layer in layers], [layer.astype(np.int64) for layer in layers], ["x", "y"],
    ]  # fmt: skip
    for one in bad:
        with pytest.raises(RunnerError, match="does not fit the model"):
            runner.import_state(one)
    for rows in ([2], [-1], [0, 5], [0.5], [True]):
        with pytest.raises(RunnerError, match=r"no such row|whole numbers"):
            runner.reset_rows(state, rows)  # type: ignore[arg-type]
    runner.reset_rows(state, [])
    for batch in (0, -1, 1.5, True):
        with pytest.raises(RunnerError, match="at least one sequence"):
            runner.new_state(batch)  # type: ignore[arg-type]


def test_states_of_others(toy: tuple[Path, ToyModel]) -> None:
    one = open_runner(open_bundle(toy[0]), "cpu", threads=1)
    other = open_runner(open_bundle(toy[0]), "cpu", threads=1)
    for state in (other.new_state(1), ToyRunner(toy[1]).new_state(1), None, "state"):
        for call in (
            lambda s=state: one.prefill(*ONE, s), lambda s=state: one.step(*ONE, s),
            lambda s=state: one.export_state(s), lambda s=state: one.reset_rows(s, [0]),
        ):  # fmt: skip
            with pytest.raises(RunnerError, match="belongs to the runner that made it"):
                call()


# -- positions -----------------------------------------------------------------------------------------------


def fake(spec: Any = SPEC, **attributes: Any) -> Any:
    return SimpleNamespace(spec=spec, name="fake", **attributes)


def test_the_widest_chunk_of_a_graph_is_known() -> None:
    sizes = {chunk_size(d) for d in (1, 16, 32, 64, 80, 96, 128, 192, 256, 512)}
    assert MAX_POSITIONS + max(sizes) == 2**31


def test_a_runner_s_own_limit() -> None:
    """The kernels' is 2^24: float32 holds every position up to there and not the next."""
    assert int(np.float32(KERNEL_POSITIONS - 1)) == KERNEL_POSITIONS - 1
    assert int(np.float32(KERNEL_POSITIONS + 1)) != KERNEL_POSITIONS + 1
    runner = fake(max_positions=KERNEL_POSITIONS)
    assert isinstance(runner, LimitsPositions)
    assert last_position(runner) == KERNEL_POSITIONS
    check_call(runner, A([[1, 2]]), A([KERNEL_POSITIONS - 2]), A([2]), 1)
    with pytest.raises(PositionError, match="this runner computes right") as caught:
        check_call(runner, A([[1, 2], [1, 2]]), A([0, KERNEL_POSITIONS - 1]), A([2, 2]), 2)
    assert "row 1" in caught.value.what
    assert (caught.value.got, caught.value.expected) == ("16777217 tokens", "at most 16777216")
    request = DecodeRequest(A([1]), A([KERNEL_POSITIONS - 5]), A([5]), SamplingOptions(), 0, A([0]), A([0]))
    check_decoding(runner, request, 1)
    longer = DecodeRequest(A([1]), request.positions, A([6]), SamplingOptions(), 0, A([0]), A([0]))
    with pytest.raises(PositionError, match="this runner computes right"):
        check_decoding(runner, longer, 1)


def test_padding_must_have_positions_too() -> None:
    check_call(fake(), A([[1]]), A([MAX_POSITIONS - 1]), A([1]), 1, step=True)
    check_call(fake(), A([[1]]), A([MAX_POSITIONS]), A([0]), 1, step=True)  # a row that has ended there
    check_call(fake(), A([[1] * 64]), A([MAX_POSITIONS - 64]), A([64]), 1)
    with pytest.raises(PositionError, match="with its padding"):
        check_call(fake(), A([[1] * 300]), A([MAX_POSITIONS - 64]), A([64]), 1)


def test_generate_stops_where_positions_end(toy: tuple[Path, ToyModel]) -> None:
    generator = Generator(open_runner(open_bundle(toy[0]), "cpu", threads=1))
    with pytest.raises(PositionError, match="computes right") as caught:
        generator.start([[1, 2]], GenerateOptions(max_tokens=2**31))
    assert f"--max-tokens {MAX_POSITIONS - 1}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (neox(vocab=260), {}),
        (llama(heads=4, kv_heads=2, vocab=260), {}),
        (neox(vocab=260, heads=6, hidden=96).with_trained_decay(), {"extend_decay": True}),
    ],
    ids=["neox", "llama", "tables"],
)
def test_positions_are_right_to_the_end(exported: Any, model: RandomCheckpoint, options: Any) -> None:
    """Prefill and steps that end at the last position, against the recurrence in float64."""
    folder, oracle = exported(model, **options)
    runner = open_runner(open_bundle(folder), "cpu", threads=1)
    assert runner.spec.rotary_dim > 0
    rng = np.random.default_rng(5)
    for end in (2**24 + 30, 10**9, MAX_POSITIONS):
        lens = A([20, 7])
        ids, done = rng.integers(0, 260, (2, 20)), end - 4 - lens
        states = runner.new_state(2), oracle.new_state(2)
        worst = _error(runner.prefill(ids, done, lens, states[0]), oracle.prefill(ids, done, lens, states[1]))
        for n in range(4):
            token = rng.integers(0, 260, (2, 1))
            calls = (
                one.step(token, done + lens + n, A([1, 1]), s)
                for one, s in zip((runner, oracle), states, strict=True)
            )
            worst = max(worst, _error(*calls))
        assert worst < 1e-4, f"off by {worst:.2g} before {end}"
        if end == MAX_POSITIONS:
            with pytest.raises(PositionError, match="computes right"):
                runner.step(token, A([end, end]), A([1, 0]), states[0])


def _error(got: Any, expected: Any) -> float:
    """In standard deviations of the logits."""
    return float(np.abs(got - expected).max() / np.std(expected))


# -- capabilities -----------------------------------------------------------------------------------------


def test_what_runners_offer(toy: tuple[Path, ToyModel]) -> None:
    onnxruntime = open_runner(open_bundle(toy[0]), "cpu", threads=1)
    offers = (WarmsUp, HasSettings, Decodes, LimitsBatch, LimitsPositions, TimesSteps, CountsMemory)
    assert [isinstance(onnxruntime, kind) for kind in offers] == [True, True, *[False] * 5]
    assert not any(isinstance(ToyRunner(toy[1]), kind) for kind in offers)
    for name in ("warm_up", "settings", "start_decoding", "step_gpu_seconds", "memory"):
        assert callable(vars(TensorRTRunner)[name])


def test_settings_are_those_in_force(toy: tuple[Path, ToyModel]) -> None:
    runner = OrtRunner(open_bundle(toy[0]), threads=2, spinning="off", prepack="none")
    assert runner.settings() == {
        "threads": 2, "spinning": "off", "prepack": "none", "optimization": "all", "lowering": "standard",
        "cuda_graph": False,
    }  # fmt: skip
