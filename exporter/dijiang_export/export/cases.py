"""Which cases are recorded: random tokens, lengths around the chunk size, far positions, a long sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dijiang_engines.op_contract import chunk_size
from dijiang_engines.spec import ModelSpec

Cases = Literal["none", "short", "full"]
DRIFT = "drift"
DRIFT_TOKENS = 10_000
"""Length of `drift`, or as many as the model has positions."""


@dataclass(frozen=True)
class CaseInputs:
    """One case before it is computed: rows of random tokens and where to look at them."""

    name: str
    input_ids: list[npt.NDArray[np.int64]]
    """Per row, the valid tokens."""
    positions: list[int]
    """Per row, where it starts (the state is zero there all the same)."""
    marks: npt.NDArray[np.int64]
    """[B, M] token counts, not decreasing; the last is the row's length."""
    state_marks: list[int]
    """Columns of `marks` at which states are kept."""


def choose_cases(spec: ModelSpec, cases: Cases, seed: int = 0) -> list[CaseInputs]:
    """The cases of `--cases`: lengths around the chunk size, unequal rows, far positions."""
    if cases == "none":
        return []
    chunk = chunk_size(spec.head_dim)
    wanted: list[tuple[str, list[int], list[int]]] = [("short", [chunk + 6, chunk // 2 + 1, 1], [0, 0, 0])]
    limit = spec.max_positions
    if limit is None:
        wanted.append(("far", [9, 5], [100_000, 1_000_000]))
    else:
        wanted.append(("far", [9, 5], [max(limit - 9, 0), max(limit - 6, 0)]))
    if cases == "full":
        wanted.append(("long", [4 * chunk + 44, 2 * chunk + 1], [0, 3]))
        wanted.append((DRIFT, [DRIFT_TOKENS], [0]))
    rng = np.random.default_rng(seed)
    chosen = []
    for name, lengths, positions in wanted:
        if limit is not None:  # short tables
            lengths = [max(1, min(n, limit - start)) for n, start in zip(lengths, positions, strict=True)]
        rows = [rng.integers(0, spec.vocab_size, n) for n in lengths]
        if name == DRIFT:
            marks, state_marks = _drift_marks(lengths[0])
        else:
            marks = np.stack([_marks(n, rng) for n in lengths])
            state_marks = [1, marks.shape[1] - 1]
        chosen.append(CaseInputs(name, rows, positions, marks, state_marks))
    return chosen


def _marks(length: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Five token counts: the first token, two odd places, the last but one, and all."""
    inner = np.sort(rng.integers(1, length + 1, 2))
    return np.array([1, *inner, max(length - 1, inner[1]), length]).astype(np.int64)


def _drift_marks(length: int) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Powers of ten, then every thousandth token: marks [1, M], and at which of them states are kept."""
    wanted = [n for n in (1, 10, 100, 250, 500, *range(1000, length, 1000)) if n < length]
    marks = [*wanted, length]
    kept = [i for i, mark in enumerate(marks) if mark in (100, 1000, 5000, length)]
    return np.array([marks], np.int64), kept


def first_tokens(case: CaseInputs, count: int) -> CaseInputs:
    """`case` with the marks within the first `count` tokens of its rows, and only the tokens up to them."""
    kept = int((case.marks <= count).all(0).sum())
    if kept == case.marks.shape[1]:
        return case
    marks = case.marks[:, :kept]
    ids = [row[: marks[i, -1]] for i, row in enumerate(case.input_ids)]
    state_marks = [mark for mark in case.state_marks if mark < kept]
    return CaseInputs(case.name, ids, case.positions, marks, state_marks)
