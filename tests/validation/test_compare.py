"""compare.py: what fails, in which order, and what the numbers are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dijiang_engines.errors import UsageError
from dijiang_engines.op_contract import T_TYPES
from dijiang_engines.validation.compare import (
    compare_bits,
    compare_logits,
    compare_state,
    kl_divergence,
    log_softmax,
)
from dijiang_engines.validation.tolerances import Tolerance, tolerance

LOOSE = Tolerance(max_error=1e9, min_cosine=None, max_kl=None, reason="test")
TIGHT = tolerance("float32", "logits")
STATE = tolerance("float32", "state")


def vector(n: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def test_equal_arrays_pass_with_exact_metrics() -> None:
    x = vector()
    result = compare_logits(x, x.copy(), TIGHT)
    assert result.passed
    assert result.reason == ""
    assert result.max_abs_error == 0
    assert result.relative_error == 0
    assert result.cosine == pytest.approx(1, abs=1e-15)
    assert result.top1 == 1
    assert result.kl == 0
    assert result.scale == pytest.approx(float(x.astype(np.float64).std()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("compare", [compare_logits, compare_state])
def test_non_finite_fails_whatever_the_tolerance(value: float, compare) -> None:
    x = vector(2 * 4 * 4).reshape(2, 4, 4)
    y = x.copy()
    y[1, 2, 3] = value
    for got, reference in ((y, x), (x, y), (y, y)):
        result = compare(got, reference, LOOSE)
        assert not result.passed
        assert "non-finite" in result.reason
        assert result.worst == (1, 2, 3)
        assert result.relative_error is None


def test_non_finite_is_reported_before_the_shape_and_the_shape_before_the_error() -> None:
    x = vector(10)
    bad = np.full(7, np.nan, np.float32)
    assert "non-finite" in compare_logits(bad, x, LOOSE).reason
    assert compare_logits(x[:7] + 5, x, TIGHT).reason == "shape is [7], expected [10]"
    assert compare_state(x.reshape(1, 5, 2), x.reshape(1, 2, 5), LOOSE).reason.startswith("shape is")


def test_nan_tolerance_or_scale_cannot_pass() -> None:
    x = vector()
    nothing = Tolerance(max_error=math.nan, min_cosine=None, max_kl=None, reason="test")
    assert not compare_logits(x, x, nothing).passed
    assert not compare_logits(x + 1, x, LOOSE, scale=math.nan).passed


def test_bounds_are_inclusive() -> None:
    reference = np.array([0.0, 1.0, 0.0, 1.0], np.float64)  # standard deviation exactly 0.5
    got = reference + np.array([0.25, 0, 0, 0])
    at = Tolerance(max_error=0.5, min_cosine=None, max_kl=None, reason="test")
    below = Tolerance(max_error=0.499, min_cosine=None, max_kl=None, reason="test")
    result = compare_logits(got, reference, at)
    assert result.passed
    assert result.relative_error == 0.5
    assert result.worst == (0,)
    failed = compare_logits(got, reference, below)
    assert not failed.passed
    assert "relative error 0.5, at most 0.499" in failed.reason


def test_metrics_against_straightforward_formulas() -> None:
    reference = np.stack([vector(50, 1), vector(50, 2)]).astype(np.float64)
    reference[:, 7] = 5
    got = reference + 0.1 * np.stack([vector(50, 3), vector(50, 4)])
    got[1] = reference[1][::-1]
    result = compare_logits(got, reference, LOOSE)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (reference, got))
    kl = (p * np.log(p / q)).sum(-1)
    cosine = [(a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(got, reference, strict=True)]
    assert result.kl == pytest.approx(kl.max())
    assert result.cosine == pytest.approx(min(cosine))
    assert result.max_abs_error == pytest.approx(np.abs(got - reference).max())
    assert result.relative_error == pytest.approx(np.abs(got - reference).max() / reference.std())
    assert result.top1 == 0.5


def test_each_bound_alone_can_fail() -> None:
    reference = vector(1000).astype(np.float64) * 4
    noise = vector(1000, 1)
    got = reference + noise
    assert "cosine" in compare_logits(got, reference, Tolerance(1e9, 1 - 1e-6, None, "test")).reason
    assert "KL" in compare_logits(got, reference, Tolerance(1e9, None, 1e-6, "test")).reason
    assert compare_logits(got, reference, Tolerance(1e9, 0.9, 1.0, "test")).passed


def test_kl_is_finite_and_shift_invariant_at_extremes() -> None:
    a = np.array([1e4, 0.0, -1e4])
    b = np.array([-1e4, 0.0, 1e4])
    assert kl_divergence(a, b) == pytest.approx(2e4)
    assert kl_divergence(a + 77, a) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(log_softmax(np.array([3e38, -3e38], np.float32))).all()


def test_a_constant_reference_has_no_unit_so_only_equality_passes() -> None:
    flat = np.full(8, 3.0, np.float32)
    assert compare_logits(flat, flat, TIGHT).passed
    result = compare_logits(flat + np.float32(1e-6), flat, LOOSE)
    assert not result.passed
    assert result.relative_error is None
    json.dumps(result.to_json(), allow_nan=False)
    zeros = np.zeros((2, 3, 3), np.float32)
    assert compare_state(zeros, zeros, STATE).passed
    assert not compare_state(zeros + np.float32(1e-30), zeros, STATE).passed


def test_states_are_judged_head_by_head() -> None:
    reference = np.stack([vector(16, 1).reshape(4, 4) * 100, vector(16, 2).reshape(4, 4)])
    got = reference.copy()
    got[1] *= 1 + 5e-4  # 5e-6 of the large head: invisible if all heads shared a unit
    result = compare_state(got, reference, STATE)
    assert not result.passed
    assert result.worst is not None
    assert result.worst[0] == 1
    assert result.relative_error == pytest.approx(5e-4, rel=1e-2)
    assert result.scale == pytest.approx(float(np.abs(reference[1]).max()))


def test_a_head_that_holds_nearly_nothing_is_not_judged_by_its_rounding() -> None:
    reference = np.stack([vector(16, 1).reshape(4, 4), vector(16, 2).reshape(4, 4) * 1e-9])
    got = reference.copy()
    got[1] *= 1.01
    assert compare_state(got, reference, STATE).passed


@pytest.mark.parametrize("change", [1e-45, -0.0, np.nan])
def test_bits(change: float) -> None:
    x = np.zeros((2, 3, 3), np.float32)
    assert compare_bits(x.copy(), x).passed
    y = x.copy()
    y[1, 0, 2] = change
    result = compare_bits(y, x)
    assert not result.passed
    assert result.worst == (1, 0, 2)


def test_bits_also_compares_types_and_shapes() -> None:
    x = np.ones((1, 2, 2), np.float32)
    assert not compare_bits(x.astype(np.float64), x).passed
    assert not compare_bits(x[:, :1], x).passed
    assert compare_bits(x, x).passed


def test_integers_and_empty_arrays_fail() -> None:
    x = vector(4)
    assert not compare_logits(x.astype(np.int64), x, LOOSE).passed
    assert not compare_logits(x[:0], x[:0], LOOSE).passed


@pytest.mark.filterwarnings("error")
def test_huge_and_tiny_values_do_not_warn_or_overflow() -> None:
    big = np.full((1, 2, 2), 3e38, np.float32)
    result = compare_state(big, -big, STATE)
    assert not result.passed
    assert result.cosine == pytest.approx(-1)
    tiny = np.full((1, 2, 2), 1e-42, np.float32)
    assert compare_state(tiny, tiny, STATE).cosine == pytest.approx(1)


def test_half_precision_input_is_compared_in_float64() -> None:
    x = np.array([60000, 1, -60000], np.float16)
    result = compare_logits(x, -x, LOOSE)
    assert result.max_abs_error == 120000
    assert np.isfinite(result.max_abs_error)


def test_results_are_json_and_frozen() -> None:
    result = compare_logits(vector(), vector(seed=1), TIGHT)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["passed"] is False
    with pytest.raises(AttributeError):
        result.passed = True  # type: ignore[misc]


def test_the_table_is_complete_ordered_and_reasoned() -> None:
    table = {(d, q): tolerance(d, q) for d in T_TYPES for q in ("logits", "state", "padding")}  # type: ignore[arg-type]
    assert tolerance("float32", "logits").max_error == 1e-4
    for row in table.values():
        assert len(row.reason) > 40
        assert 0 < row.max_error < 1
    for quantity in ("logits", "state", "padding"):
        errors = [tolerance(d, quantity).max_error for d in T_TYPES]  # type: ignore[arg-type]
        assert errors == sorted(errors)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="tolerance"):
        tolerance("int4", "logits")
