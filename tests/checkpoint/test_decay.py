"""Decay tables: γ found within rounding, and the overflow-free form equal to the official sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.makers.decay_tables import geometric_tables, trained_tables
from support.makers.decay_tables import official_gammas as reference_gammas
from support.makers.decay_tables import official_tables as reference_tables
from support.makers.weight_files import DTYPES

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.decay import (
    Geometric,
    Tables,
    classify,
    extend,
    find_gamma,
    geometric_as_tables,
    official_gammas,
    official_tables,
    stable_tables,
)

F64 = np.ndarray


def as_float64(*tables: torch.Tensor) -> list[F64]:
    return [t.double().reshape(t.shape[1:3]).numpy() for t in tables]


def float32_gammas(heads: int) -> F64:
    return reference_gammas(heads).double().numpy()


def float64_gammas(heads: int) -> F64:
    return 1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads))


@pytest.mark.parametrize("heads", [1, 4, 12, 32])
@pytest.mark.parametrize("rows", [2, 64, 2048, 4096])
def test_initial_tables_in_float32_are_the_official_gammas(heads: int, rows: int) -> None:
    d1, d2 = as_float64(*reference_tables(heads, rows))
    assert (rows == 4096) == bool(np.isinf(d2).any())  # float32 overflows too: head 0 from row 2795 on
    found = find_gamma(d1, d2, "float32")
    assert found is not None
    np.testing.assert_allclose(found.log_decay, np.log(float32_gammas(heads)), rtol=1e-12)
    assert "official" in found.origin


def test_a_single_row_says_nothing_and_is_taken_as_official() -> None:
    found = find_gamma(*as_float64(*reference_tables(4, 1)), "float32")
    assert found is not None
    np.testing.assert_allclose(found.log_decay, np.log(float64_gammas(4)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 300, 512, 2048])
def test_initial_tables_in_half_precision(dtype: str, rows: int) -> None:
    stored = [t.to(DTYPES[dtype]) for t in reference_tables(8, rows)]
    assert (dtype == "float16" and rows > 350) == bool(torch.isinf(stored[1]).any())
    found = find_gamma(*as_float64(*stored), dtype)
    assert found is not None
    np.testing.assert_allclose(found.log_decay, np.log(float64_gammas(8)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_gammas_are_fitted(dtype: str) -> None:
    gammas = torch.tensor([0.9, 0.99, 0.9987, 1.0, 0.5])
    powers = gammas[:, None] ** torch.arange(600)
    d1, d2 = as_float64(powers[None].to(DTYPES[dtype]), (1 / powers)[None].to(DTYPES[dtype]))
    found = find_gamma(d1, d2, dtype)
    assert found is not None
    assert "fitted" in found.origin
    exact = np.log(gammas.double().numpy())
    if dtype == "float32":
        np.testing.assert_allclose(found.log_decay, exact, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.log_decay, exact, atol=1e-4 if dtype == "bfloat16" else 1e-5)
    assert (found.log_decay <= 0).all()


def test_half_precision_inside_float32_files() -> None:
    for dtype in ("float16", "bfloat16"):
        stored = [t.to(DTYPES[dtype]).float() for t in reference_tables(4, 1024)]
        found = find_gamma(*as_float64(*stored), "float32")
        assert found is not None
        np.testing.assert_allclose(found.log_decay, np.log(float64_gammas(4)), rtol=1e-12)
    through_both = [t.bfloat16().half() for t in reference_tables(4, 1024)]
    assert find_gamma(*as_float64(*through_both), "float16") is not None


def test_powers_by_repeated_multiplication_and_by_exp_are_geometric_too() -> None:
    gammas = reference_gammas(4)
    running = torch.cumprod(torch.cat((torch.ones(1, 4), gammas.expand(199, 4))), 0).T
    through_exp = torch.exp(torch.arange(2048) * torch.log(gammas)[:, None])
    for powers in (running, through_exp):
        assert find_gamma(*as_float64(powers[None], (1 / powers)[None]), "float32") is not None


@pytest.mark.parametrize("change", [1e-5, -1e-5])
@pytest.mark.parametrize("at", [0, 1, 100])
@pytest.mark.parametrize("which", [0, 1])
def test_one_trained_step_is_noticed(change: float, at: int, which: int) -> None:
    tables = as_float64(*reference_tables(4, 128))
    tables[which][2, at] *= 1 + change
    assert find_gamma(tables[0], tables[1], "float32") is None
    assert isinstance(classify(tables[0], tables[1], "float32"), Tables)


@pytest.mark.parametrize("value", [-1.0, 0.0, np.nan, np.inf])
def test_not_geometric(value: float) -> None:
    d1, d2 = as_float64(*reference_tables(4, 128))
    d1[1, 50] = value
    assert find_gamma(d1, d2, "float32") is None
    growing, shrinking = geometric_tables(np.array([0.01]), 100)
    assert find_gamma(growing, shrinking, "float32") is None


def test_our_official_tables_are_the_reference_ones() -> None:
    for heads, rows in ((4, 100), (6, 2048)):
        for ours, theirs in zip(official_tables(heads, rows), reference_tables(heads, rows), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == torch.float32
            assert ours.shape == (1, heads, rows, 1)
    np.testing.assert_array_equal(official_gammas(5), float32_gammas(5))


def test_geometric_tables_undo_find_gamma() -> None:
    d1, d2 = geometric_tables(np.log(float64_gammas(3)), 50)
    np.testing.assert_allclose(d1[1], float64_gammas(3)[1] ** np.arange(50), rtol=1e-13)
    np.testing.assert_allclose(d1 * d2, np.ones((3, 50)), rtol=1e-13)


# The tables' form


def recurrence(t: Tables, x: F64) -> F64:
    """o [N, H] for inputs x [N, H], one number per token in place of φ(k) ⊗ v."""
    state = np.zeros(x.shape[1])
    out = np.empty_like(x)
    for n in range(len(x)):
        state = np.exp(t.log_decay[n]) * state + t.gain[n] * x[n]
        out[n] = t.read_scale[n] * state
    return out


def official_sum(d1: F64, d2: F64, x: F64) -> F64:
    """o[n] = Σ_{m<=n} D1[n] D2[m] x[m], and the same with magnitudes: the scale of rounding errors."""
    n = x.shape[0]
    weights = d1.T[:, None, :] * d2.T[None, :, :] * np.tril(np.ones((n, n)))[:, :, None]
    return np.einsum("nmh,mh->nh", weights, x), np.einsum("nmh,mh->nh", np.abs(weights), np.abs(x))


def check_form(t: Tables) -> None:
    assert (t.log_decay <= 0).all()
    assert (t.log_decay[0] == 0).all()
    assert (np.abs(t.gain) <= 1).all()
    for part in (t.log_decay, t.gain, t.read_scale):
        assert np.isfinite(part).all()
        assert np.isfinite(part.astype(np.float32)).all()


# magnitudes from 1e-15 to 1e15 of either sign, and zeros
entry = st.one_of(
    st.just(0.0),
    st.builds(lambda s, e: s * 10.0**e, st.sampled_from([-1.0, 1.0]), st.floats(-15, 15)),
    st.floats(-2, 2, width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tables_form_equals_the_official_sum(data: st.DataObject) -> None:
    heads, rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))

    def table(values: st.SearchStrategy[float]) -> F64:
        flat = data.draw(st.lists(values, min_size=heads * rows, max_size=heads * rows))
        return np.array(flat).reshape(heads, rows)

    d1, d2, x = table(entry), table(entry), table(st.floats(-3, 3)).T.copy()
    form = stable_tables(d1, d2)
    check_form(form)
    expected, scale = official_sum(d1, d2, x)
    assert (np.abs(recurrence(form, x) - expected) <= 1e-12 * scale + 1e-300).all()


def test_realistic_trained_tables() -> None:
    rng = torch.Generator().manual_seed(3)
    d1, d2 = as_float64(*trained_tables(6, 200, rng))
    assert (d1 < 0).any()
    assert (d2 < 0).any()
    found = classify(d1, d2, "float32")
    assert isinstance(found, Tables)
    check_form(found)
    x = np.random.default_rng(0).standard_normal((200, 6))
    expected, scale = official_sum(d1, d2, x)
    assert (np.abs(recurrence(found, x) - expected) <= 1e-12 * scale).all()
    as_float32 = Tables(*(p.astype(np.float32) for p in (found.log_decay, found.gain, found.read_scale)))
    assert (np.abs(recurrence(as_float32, x) - expected) <= 2e-5 * scale).all()


def test_a_prefix_of_zeros() -> None:
    d1, d2 = np.ones((2, 4)), np.array([[0.0, 0.0, -1e-30, 4.0], [0.0, 0.0, 0.0, 0.0]])
    form = stable_tables(d1, d2)
    check_form(form)
    np.testing.assert_array_equal(form.gain[:, 0], [0, 0, -1, 1])
    np.testing.assert_array_equal(form.gain[:, 1], np.zeros(4))
    x = np.ones((4, 2))
    np.testing.assert_allclose(recurrence(form, x), official_sum(d1, d2, x)[0], rtol=1e-15)


def test_geometric_layers_as_tables() -> None:
    log_gamma = np.log(float64_gammas(3))
    d1, d2 = geometric_tables(log_gamma, 60)
    form = geometric_as_tables(Geometric(log_gamma, ""), 60)
    check_form(form)
    x = np.random.default_rng(0).standard_normal((60, 3))
    np.testing.assert_allclose(recurrence(form, x), official_sum(d1, d2, x)[0], rtol=1e-9, atol=1e-11)


def test_keep_tables_reproduces_rounded_entries() -> None:
    d1, d2 = as_float64(*reference_tables(3, 100))
    form = classify(d1, d2, "float32", keep_tables=True)
    assert isinstance(form, Tables)
    x = np.random.default_rng(0).standard_normal((100, 3))
    expected, scale = official_sum(d1, d2, x)
    assert (np.abs(recurrence(form, x) - expected) <= 1e-13 * scale).all()


def test_extension() -> None:
    d1, d2 = as_float64(*trained_tables(4, 40, torch.Generator().manual_seed(1)))
    form = stable_tables(d1, d2)
    longer = extend(form)
    assert longer.gain.shape == (41, 4)
    np.testing.assert_array_equal(longer.gain[-1], form.gain[-1])
    np.testing.assert_array_equal(longer.read_scale[-1], form.read_scale[-1])
    np.testing.assert_allclose(longer.log_decay[-1], form.log_decay[30:].mean(axis=0), rtol=1e-15)
    np.testing.assert_array_equal(longer.log_decay[:-1], form.log_decay)
    assert extend(stable_tables(d1[:, :1], d2[:, :1])).log_decay.shape == (2, 4)


def test_infinite_tables_that_are_not_geometric() -> None:
    d1, d2 = as_float64(*reference_tables(4, 512))
    d1[0, 3] = -1.0
    stored = [torch.from_numpy(t).half().double().numpy() for t in (d1, d2)]
    row = int(np.argwhere(np.isinf(stored[1]).any(axis=0))[0, 0])
    with pytest.raises(CheckpointError, match=r"layer 7.* are not geometric") as caught:
        classify(*stored, "float16", where="layer 7's decay tables")
    assert f"--max-positions {row}" in str(caught.value)
    usable = classify(*stored, "float16", max_positions=row)
    assert isinstance(usable, Tables)
    assert usable.gain.shape == (row, 4)


def test_products_beyond_float32() -> None:
    d1, d2 = np.ones((1, 3)), np.ones((1, 3))
    d2[0, 1], d1[0, 2] = 1e25, 1e25
    with pytest.raises(CheckpointError, match="overflow float32"):
        stable_tables(d1, d2)
