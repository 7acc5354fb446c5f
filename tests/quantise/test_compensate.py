"""Error compensation: against its definition with explicit inverses, and what it is for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dijiang_export.quantise.blocks import dequantise, quantise, round_to_scale, scales
from dijiang_export.quantise.compensate import DAMPING, compensate, factor, pieces

Array = npt.NDArray[np.float64]


def inputs(columns: int, tokens: int = 400, seed: int = 0) -> Array:
    """Correlated, as hidden vectors are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns // 2)) @ rng.standard_normal((columns // 2, columns))
    return mixed * 0.2 + rng.standard_normal((tokens, columns)) * 0.5


def by_elimination(weights: Array, hessian: Array) -> Array:
    """One column after another; what it leaves is made up for by all later ones, and the column is eliminated
    from the inverse (Frantar et al., equations 2 and 3), in float64."""
    w, columns = weights.copy(), weights.shape[1]
    inverse = np.linalg.inv(hessian + DAMPING * np.diag(hessian).mean() * np.eye(columns))
    out = np.zeros_like(w)
    for start in range(0, columns, 32):
        scale = scales(torch.from_numpy(w[:, start : start + 32]).float(), "int4", "w")
        for i in range(start, start + 32):
            q = round_to_scale(torch.from_numpy(w[:, i]).float(), scale, "int4")
            out[:, i] = q.double().numpy() * scale.double().numpy()
            w -= np.outer((w[:, i] - out[:, i]) / inverse[i, i], inverse[i])
            inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


def test_is_elimination_column_by_column() -> None:
    x = inputs(96)
    weights = np.random.default_rng(1).standard_normal((8, 96))
    expected = by_elimination(weights, x.T @ x)
    q, scale = compensate(
        torch.from_numpy(weights).float(), factor(torch.from_numpy(x.T @ x).float()), "int4", "w"
    )
    found = dequantise(q, scale).double().numpy()
    step = np.repeat(np.abs(scale.double().numpy()), 32, axis=1)
    # float32 may round a value between two integers the other way, and what follows makes up for that.
    assert (np.abs(found - expected) <= 0.01 * step).mean() > 0.95
    ours, theirs = (np.square(x @ (w - weights).T).sum() for w in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_change_less_than_by_rounding_each_weight(kind: str) -> None:
    x = inputs(128)
    weights = torch.from_numpy(np.random.default_rng(2).standard_normal((32, 128))).float()
    upper = factor(torch.from_numpy(x.T @ x).float())
    plain = dequantise(*quantise(weights, kind, "w"))  # type: ignore[arg-type]
    better = dequantise(*compensate(weights.clone(), upper, kind, "w"))  # type: ignore[arg-type]
    unseen = torch.from_numpy(inputs(128, seed=0)[:200]).float()
    loss = [float((unseen @ (w - weights).T).square().mean()) for w in (plain, better)]
    assert loss[1] < 0.5 * loss[0]


def test_columns_that_saw_nothing_and_few_tokens_are_no_trouble() -> None:
    weights = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 64))).float()
    nothing = factor(torch.zeros(64, 64))
    q, scale = compensate(weights.clone(), nothing, "int4", "w")
    expected, wanted = quantise(weights, "int4", "w")
    assert torch.equal(q, expected) and torch.equal(scale, wanted)
    x = torch.from_numpy(inputs(64, tokens=2)).float()
    x[:, 10:20] = 0
    q, scale = compensate(weights.clone(), factor(x.T @ x), "int4", "w")
    assert bool(torch.isfinite(dequantise(q, scale)).all())


def test_wide_matrices_are_cut() -> None:
    assert [(p.start, p.stop) for p in pieces(10240)] == [(0, 4096), (4096, 8192), (8192, 10240)]
    assert [(p.start, p.stop) for p in pieces(256)] == [(0, 256)]
