"""The decode loop on the GPU, against the host's: same tokens, same ends, same states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.fakes.kernels import FakeKernels
from support.makers.engine_folders import Open, spoil, tokens

from dijiang_engines.errors import RunnerError
from dijiang_engines.generation.generator import Generator
from dijiang_engines.generation.loop import GenerateOptions
from dijiang_engines.runners.decoding import DecodeRequest
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner
from dijiang_engines.sampling import SamplingOptions, sample
from dijiang_engines.spec import ModelSpec

A = np.array


class OnHost:
    """The same runner without a decode loop of its own."""

    def __init__(self, runner: TensorRTRunner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        if name == "start_decoding":
            raise AttributeError(name)
        return getattr(self._runner, name)


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(max_tokens=12),
        GenerateOptions(max_tokens=1),
        GenerateOptions(max_tokens=30, ignore_eos=True, sampling=SamplingOptions(repetition_penalty=1.3)),
        GenerateOptions(max_tokens=25, seed=5, sampling=SamplingOptions(1.5, top_k=40, top_p=0.9)),
    ],
    ids=["greedy", "one", "penalty", "drawn"],
)
def test_the_gpu_s_loop_is_the_host_s(
    opened: Open, monkeypatch: pytest.MonkeyPatch, version: str, options: GenerateOptions
) -> None:
    """Same tokens, same end, and the same state to go on from."""
    runner, _ = opened(version)
    monkeypatch.setattr("dijiang_engines.kernels.attention.load_kernels", lambda path: FakeKernels())
    prompts = [[5, 6, 7], [200, 1], list(range(30, 41))]
    results = []
    for way in (runner, OnHost(runner)):
        generation = Generator(way, None).start(prompts, options)
        for _ in generation:
            pass
        results.append((generation.completions, generation.session()))
    (on_gpu, left), (on_host, right) = results
    assert on_gpu == on_host
    np.testing.assert_array_equal(left.positions, right.positions)
    for a, b in zip(left.layers, right.layers, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_that_end_by_a_token_end_on_the_gpu(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = opened()
    monkeypatch.setattr("dijiang_engines.kernels.attention.load_kernels", lambda path: FakeKernels())
    endless = GenerateOptions(max_tokens=12, ignore_eos=True)
    free = Generator(OnHost(runner), None).start([[5, 6], [9]], endless)
    list(free)
    ends = free.completions[0].token_ids[4]
    spec = ModelSpec(**(vars(runner.spec) | {"eos_token_ids": (ends,)}))
    monkeypatch.setattr(runner, "spec", spec)
    found = []
    for way in (runner, OnHost(runner)):
        generation = Generator(way, None).start([[5, 6], [9]], GenerateOptions(max_tokens=12))
        list(generation)
        found.append((generation.completions, generation.session().positions.tolist()))
    assert found[0] == found[1]
    assert found[0][0][0].finish_reason == "eos"


def decode(runner: TensorRTRunner, request: DecodeRequest, stop_after: dict[int, int]) -> tuple[Any, Any]:
    """Each row's tokens, and the state after the last; rows of `stop_after` are stopped by the host."""
    state = runner.new_state(len(request.tokens))
    runner.prefill(tokens(len(request.tokens), 4), 0 * request.positions, request.positions, state)
    decoder = runner.start_decoding(state, request)
    left, found = request.remaining.copy(), [[] for _ in request.tokens]  # type: list[int], list[list[int]]
    while (left > 0).any():
        chosen = decoder.next()
        for row in np.flatnonzero(left > 0):
            found[row].append(int(chosen[row]))
            left[row] -= 1
            if stop_after.get(int(row)) == len(found[row]):
                decoder.stop_row(int(row))
                left[row] = 0
    decoder.close()
    return found, runner.export_state(state)


def on_host(runner: TensorRTRunner, request: DecodeRequest, counts: list[int]) -> tuple[Any, Any]:
    """The same by single steps: row r takes counts[r] tokens."""
    batch = len(counts)
    state = runner.new_state(batch)
    runner.prefill(tokens(batch, 4), 0 * request.positions, request.positions, state)
    last, positions, found = request.tokens.copy(), request.positions.copy(), [[] for _ in counts]
    for n in range(max(counts)):
        lens = A([int(n < count) for count in counts])
        logits = runner.step(last[:, None], positions, lens, state)[:, 0]
        chosen = sample(logits, request.sampling, banned=request.banned)
        positions += lens
        for row in np.flatnonzero(lens):
            found[row].append(int(chosen[row]))
            last[row] = chosen[row]
    return found, runner.export_state(state)


@pytest.mark.parametrize("version", ["8.6.0", "10.13.3"])
@pytest.mark.parametrize("ahead", [True, False])
def test_rows_end_by_their_own_number_of_tokens(
    opened: Open, monkeypatch: pytest.MonkeyPatch, version: str, ahead: bool
) -> None:
    """A row that has ended keeps its state to the bit, however long the others go on."""
    runner, _ = opened(version)
    monkeypatch.setattr("dijiang_engines.kernels.attention.load_kernels", lambda path: FakeKernels())
    zeros = np.zeros(4, np.int64)
    request = DecodeRequest(
        A([5, 6, 7, 8]), A([4, 2, 3, 1]), A([9, 3, 0, 1]), SamplingOptions(), 0, zeros, zeros, ahead=ahead
    )
    first, _ = on_host(runner, request, [1, 1, 1, 1])
    request = replace(request, banned=A([first[0][0], 3]))  # another is chosen instead
    stop_after = {} if ahead else {0: 4}
    found, layers = decode(runner, request, stop_after)
    right, expected = on_host(runner, request, [9 if ahead else 4, 3, 0, 1])
    assert found == right and found[0][0] != first[0][0]
    for got, layer in zip(layers, expected, strict=True):
        np.testing.assert_array_equal(got, layer)


def test_logits_that_are_not_finite_end_the_loop(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = opened()
    monkeypatch.setattr("dijiang_engines.kernels.attention.load_kernels", lambda path: FakeKernels())
    spoil(monkeypatch, layer=1, row=1, after=3)
    generation = Generator(runner, None).start([[5], [6]], GenerateOptions(max_tokens=20, ignore_eos=True))
    with pytest.raises(RunnerError, match="logits of row 1 cannot be sampled from") as info:
        list(generation)
    assert info.value.got == "not finite" and "validate" in str(info.value.hint)
