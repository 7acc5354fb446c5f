"""The numbers of a token against PyTorch's own functions, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from dijiang_engines.scoring import losses as module
from dijiang_engines.scoring.losses import differences, first_not_finite, losses


def some(rows: int, vocab: int, scale: float, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(dtype)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4, 3e37])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_losses_are_cross_entropy(scale: float, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 500)  # several blocks, the last one smaller
    logits = some(23, 97, min(scale, 1e4) if dtype == "float16" else scale, dtype)
    logits = np.clip(logits, -60000, 60000) if dtype == "float16" else logits
    targets = np.random.default_rng(1).integers(0, 97, 23)
    with torch.no_grad():
        expected = functional.cross_entropy(
            torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
        )
    np.testing.assert_allclose(losses(logits, targets), expected.numpy(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("scale", "apart"), [(1, 1.0), (5, 5.0), (30, 400.0), (1000, 1000.0), (3, 0.0)])
def test_differences_are_kl_div_and_argmax(
    scale: float, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", 500)
    this = some(23, 97, scale, "float64")
    other = this + some(23, 97, apart, "float64", seed=2)
    targets = np.random.default_rng(1).integers(0, 97, 23)
    own, found = differences(this, other, targets)
    log_q, log_p = (torch.from_numpy(x).log_softmax(-1) for x in (this, other))
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.agree, (log_p.argmax(-1) == log_q.argmax(-1)).numpy())
    np.testing.assert_allclose(own, losses(this, targets), rtol=1e-13)
    np.testing.assert_allclose(found.loss, losses(other, targets), rtol=1e-13)


def test_nearly_equal_predictions_do_not_drown_in_rounding() -> None:
    """KL of predictions that are e apart is of the order of e²."""
    this = some(5, 1000, 3.0, "float64")
    nudge = some(5, 1000, 1.0, "float64", seed=3)
    targets = np.zeros(5, np.int64)
    near, nearer = (differences(this, this + e * nudge, targets)[1].kl for e in (1e-3, 1e-5))
    np.testing.assert_allclose(near / nearer, 1e4, rtol=1e-2)
    assert (differences(this, this, targets)[1].kl < 1e-14).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite(value: float) -> None:
    logits = some(9, 11, 1.0)
    assert first_not_finite(logits) is None
    logits[4, 7] = logits[6, 0] = value
    assert first_not_finite(logits) == 4
