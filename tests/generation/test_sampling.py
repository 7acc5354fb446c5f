"""Sampling: what each filter keeps, exact distributions, and numbers that misbehave."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.oracles.kept_weights import keep

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.sampling import (
    SamplingOptions,
    Uniforms,
    draw,
    largest,
    likely_enough,
    nucleus,
    sample,
    uniform,
)

LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 300)),
    elements=st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -3e38, 3e38])),
)
WEIGHTS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 300)),
    elements=st.one_of(st.floats(1e-12, 1.0), st.sampled_from([0.0, 0.25, 1.0])),
).map(lambda w: np.where(np.arange(w.shape[1]) == 0, np.maximum(w, 1e-3), w))


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    wide = logits.astype(np.float64) / temperature
    e = np.exp(wide - wide.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# -- filters ---------------------------------------------------------------------------------------------


@given(WEIGHTS, st.integers(1, 400))
def test_top_k_keeps_k_of_the_largest(weights: np.ndarray, k: int) -> None:
    kept = keep(weights, lambda row: largest(row, k))
    for row, out in zip(weights, kept, strict=True):
        expected = np.zeros_like(row)
        order = np.argsort(-row, kind="stable")[:k]  # ties: lower ids first
        expected[order] = row[order]
        np.testing.assert_array_equal(out, expected)


@settings(max_examples=200)
@given(WEIGHTS, st.floats(0.001, 0.999))
def test_top_p_is_the_smallest_set_that_reaches_p(weights: np.ndarray, p: float) -> None:
    kept = keep(weights, lambda row: nucleus(row, p))
    for row, out in zip(weights, kept, strict=True):
        chosen = np.flatnonzero(out)
        np.testing.assert_array_equal(out[chosen], row[chosen])
        total, slack = row.sum(), 1e-9 * row.sum()
        assert chosen.size >= 1
        assert out.sum() >= p * total - slack
        assert out.sum() - out[chosen].min() < p * total + slack  # without the least it would not reach p
        left = np.delete(row, chosen)
        assert left.size == 0 or left.max() <= out[chosen].min()


def test_top_p_of_a_flat_distribution_over_a_large_vocabulary() -> None:
    kept = keep(np.ones((1, 50304)), lambda row: nucleus(row, 0.5))[0]
    assert np.flatnonzero(kept).tolist() == list(range(25152))


@given(WEIGHTS, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_enough(weights: np.ndarray, min_p: float) -> None:
    kept = keep(weights, lambda row: likely_enough(row, min_p))
    for row, out in zip(weights, kept, strict=True):
        np.testing.assert_array_equal(out, np.where(row >= min_p * row.max(), row, 0))
        assert out.max() == row.max()


# -- sample ----------------------------------------------------------------------------------------------


@given(LOGITS)
def test_temperature_zero_is_greedy_with_ties_to_the_lower_id(logits: np.ndarray) -> None:
    assert sample(logits, SamplingOptions()).tolist() == [int(np.argmax(row)) for row in logits]


@settings(max_examples=150, deadline=None)
@given(
    LOGITS,
    st.floats(1e-300, 1e6),
    st.integers(0, 20),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.1, 10.0),
    st.floats(0, 1, exclude_max=True),
)
def test_whatever_the_options_a_possible_token_comes_out(
    logits: np.ndarray, temperature: float, k: int, p: float, min_p: float, penalty: float, u: float
) -> None:
    options = SamplingOptions(temperature, k, p, min_p, penalty)
    seen = np.zeros(logits.shape, bool)
    seen[:, ::3] = True
    banned = np.arange(1, logits.shape[1], 2)
    before = logits.copy()
    chosen = sample(logits, options, np.full(len(logits), u), seen=seen, banned=banned)
    assert chosen.dtype == np.int64
    assert ((chosen >= 0) & (chosen < logits.shape[1])).all()
    assert not np.isin(chosen, banned).any()
    np.testing.assert_array_equal(logits, before)


@given(LOGITS, st.floats(0.1, 5.0), st.floats(0, 1, exclude_max=True))
def test_rows_do_not_depend_on_each_other(logits: np.ndarray, temperature: float, u: float) -> None:
    options = SamplingOptions(temperature, top_k=7, top_p=0.9, min_p=0.01)
    together = sample(logits, options, np.full(len(logits), u))
    alone = [int(sample(row[None], options, np.array([u]))[0]) for row in logits]
    assert together.tolist() == alone


def test_top_k_1_and_tiny_p_are_greedy() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    u = np.linspace(0, 0.999, 5)
    for options in (
        SamplingOptions(1.0, top_k=1),
        SamplingOptions(1.0, top_p=1e-9),
        SamplingOptions(1.0, min_p=1.0),
    ):
        np.testing.assert_array_equal(sample(logits, options, u), logits.argmax(1))


def test_repetition_penalty() -> None:
    logits = np.array([[2.0, 1.9, -1.0, -1.1]], np.float32)
    seen = np.array([[True, False, True, False]])
    assert sample(logits, SamplingOptions(repetition_penalty=1.2), seen=seen)[0] == 1  # 2.0 became 1.67
    assert sample(logits, SamplingOptions(repetition_penalty=1.01), seen=seen)[0] == 0
    low = np.array([[-1.0, -1.1]], np.float32)  # a negative logit must fall, not rise
    assert sample(low, SamplingOptions(repetition_penalty=1.2), seen=np.array([[True, False]]))[0] == 1


CASES = {
    "plain": SamplingOptions(1.0),
    "warm": SamplingOptions(1.7),
    "cold": SamplingOptions(0.5),
    "top-k": SamplingOptions(1.0, top_k=4),
    "top-p": SamplingOptions(0.9, top_p=0.8),
    "min-p": SamplingOptions(1.2, min_p=0.2),
    "all": SamplingOptions(1.3, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
}


def exact(logits: np.ndarray, options: SamplingOptions, seen: np.ndarray) -> np.ndarray:
    """The distribution, written down without the code under test."""
    penalised = [
        (x / options.repetition_penalty if x > 0 else x * options.repetition_penalty) if s else x
        for x, s in zip(logits.tolist(), seen.tolist(), strict=True)
    ]
    p = probabilities(np.array(penalised), options.temperature)
    order = sorted(range(p.size), key=lambda i: (-p[i], i))
    if options.top_k:
        order = order[: options.top_k]
    share, kept = 0.0, []
    for i in order:
        if share >= options.top_p * p[order].sum():
            break
        kept.append(i)
        share += p[i]
    kept = [i for i in kept if p[i] >= options.min_p * p[kept[0]]]
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_exact(name: str) -> None:
    """Chi-square of 40 000 draws; fixed seed, so this cannot fail by chance."""
    options, n = CASES[name], 40_000
    logits = (2 * np.random.default_rng(5).standard_normal(12)).astype(np.float32)
    seen = np.arange(12) % 4 == 0
    u = np.array([uniform(12, 0, i) for i in range(n)])
    chosen = sample(np.tile(logits, (n, 1)), options, u, seen=np.tile(seen, (n, 1)))
    counts, expected = np.bincount(chosen, minlength=12), n * exact(logits, options, seen)
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    chi_square = float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())
    freedom = int(used.sum()) - 1
    assert freedom > 0
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise(bad: float, temperature: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = bad
    with pytest.raises(RunnerError, match="row 1 are not finite"):
        sample(logits, SamplingOptions(temperature), np.zeros(2))


def test_a_single_token_may_be_impossible_but_not_all() -> None:
    logits = np.full((1, 4), -np.inf, np.float32)
    logits[0, 2] = -3e38
    assert sample(logits, SamplingOptions(1.0), np.array([0.7]))[0] == 2
    with pytest.raises(RunnerError, match="not finite"):
        sample(np.full((1, 4), -np.inf, np.float32), SamplingOptions())
    with pytest.raises(RunnerError, match="not finite"):
        sample(np.zeros((1, 4), np.float32), SamplingOptions(), banned=np.arange(4))


def test_sampling_without_random_numbers_is_a_mistake() -> None:
    with pytest.raises(UsageError):
        sample(np.zeros((1, 4), np.float32), SamplingOptions(1.0))


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0},
     {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0},
     {"repetition_penalty": math.inf}],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        SamplingOptions(**options)  # type: ignore[arg-type]


# -- random numbers --------------------------------------------------------------------------------------


def test_draw_at_the_edges() -> None:
    weights = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    just_below_one = np.nextafter(1.0, 0.0)
    assert [draw(weights, u) for u in (0.0, 0.4999, 0.5, just_below_one)] == [1, 1, 3, 3]


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**40), st.integers(0, 2**40))
def test_uniforms_are_uniforms(seed: int, stream: int, index: int) -> None:
    key = np.array([seed % 2**64, stream], np.uint64)
    numbers = Uniforms(seed, stream)
    for at in (index, index + 1, index + 90, max(index - 5, 0), index + 31, index + 32):
        raw = np.random.Philox(key=key, counter=np.array([at, 0, 0, 0], np.uint64)).random_raw()
        assert 0 <= numbers.at(at) < 1
        assert numbers.at(at) == uniform(seed, stream, at) == float(raw >> 11) * 2.0**-53


def test_streams_and_indices_differ() -> None:
    values = {uniform(1, s, i) for s in range(20) for i in range(20)} | {uniform(2, 0, 0)}
    assert len(values) == 401
    mean = np.mean([uniform(3, s, i) for s in range(50) for i in range(100)])
    assert abs(mean - 0.5) < 0.015


def test_random_numbers_never_change() -> None:
    """A seed is a promise: the same text with the next version, and on another machine."""
    assert [uniform(42, 0, i) for i in range(3)] == [
        0.8201981478608876,
        0.36812845090913937,
        0.8767979674463799,
    ]
