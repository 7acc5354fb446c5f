"""Why dijiang_step may multiply int4 and int8 weights with a constant in them: what its sums lose.

A model of plugins/kernels/step/quantised/{product,integers}.cuh in float64, which rounds where they do.
Tensor cores add sixteen products and an accumulator: aligned to the largest, each is cut off where that one's
float32 ends, and so is the sum (newer ones keep bits more).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

FIRST = [column for column in range(32) if column % 8 < 4]
"""Columns whose bits one mask finds, as float16's; the others' lie four bits higher."""
LAST = [column for column in range(32) if column % 8 >= 4]
ROWS, CHUNKS = 48, 80
INPUTS = ("normal", "positive", "of mean 10", "outliers", "tiny")


def cut_off(x: Any, largest: Any) -> Any:
    unit = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23)
    return np.trunc(x / unit) * unit


def tensor_cores(products: Any, c: Any) -> Any:
    """Sums over the last axis, and c."""
    terms = np.concatenate([products, c[..., None]], -1)
    total = cut_off(terms, np.abs(terms).max(-1, keepdims=True)).sum(-1)
    return cut_off(total, np.abs(total))


def single(x: Any) -> Any:
    return x.astype(np.float32).astype(np.float64)


def scaled(sums: Any, scales: Any) -> Any:
    """Adds up sums of blocks, scaled, one block after the other."""
    total = np.zeros(len(sums))
    for block in range(sums.shape[1]):
        total = single(total + scales[:, block] * sums[:, block])
    return total


def product(q: Any, scales: Any, x: Any, constant: float) -> Any:
    """[rows] of q [rows, blocks, 32], scales [rows, blocks], x [blocks, 32], multiplied as q + constant."""
    none = np.zeros(scales.shape)
    products = (q + constant) * x
    first = tensor_cores(products[..., FIRST], none)
    if constant == 0:
        return scaled(tensor_cores(products[..., LAST], first), scales)
    sums = single(scaled(first, scales) + scaled(tensor_cores(products[..., LAST], none), scales))
    share = np.zeros(len(q))
    for unit in range(0, x.shape[0], 16):  # a product of sixteen blocks' scales with an element of each
        for column in range(0, 32, 16):
            for n in range(8):
                blocks = slice(unit, unit + 16)
                c = tensor_cores(scales[:, blocks] * x[blocks, column + n], np.zeros(len(q)))
                share = single(share + tensor_cores(scales[:, blocks] * x[blocks, column + n + 8], c))
    return single(sums - constant * share)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", INPUTS)
def test_a_constant_costs_less_than_rounding_activations(kind: str, bits: int) -> None:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((CHUNKS, 32))
    if kind == "outliers":
        x[::7, 3] = 300
    x = {"positive": np.abs(x), "of mean 10": x + 10, "tiny": 1e-4 * x}.get(kind, x)
    most = 2 ** (bits - 1)
    q = np.clip(np.round(generator.standard_normal((ROWS, CHUNKS, 32)) * most / 3), -most, most - 1)
    scales = np.exp(generator.standard_normal((ROWS, CHUNKS)) / 3).astype(np.float16).astype(np.float64)
    rounded = x.astype(np.float16).astype(np.float64)
    weights = q * scales[..., None]
    exact, meant = (weights * rounded).sum((1, 2)), (weights * x).sum((1, 2))

    def error(got: Any, expected: Any = exact) -> float:
        return float(np.linalg.norm(got - expected) / np.linalg.norm(meant))

    itself, kept, usual = (error(product(q, scales, rounded, c)) for c in (0, most, 1024 + most))
    rounding = error(exact, meant)
    assert itself < 1e-6
    assert itself < kept < min(5e-5, rounding / 4)
    assert usual > 4 * kept, "1024 + u, without subnormals, would lose what this does not"
