"""Quantised weights of a step in one launch, element by element, as plugins/include/dijiang/step.h says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dijiang_engines.kernels.step import StepModel

BITS = {"q": 0, "k": 1, "v": 2, "gate": 3, "dense": 4, "up": 5, "mlp_gate": 6, "down": 7}


def groups_of(model: StepModel, matrix: str, blocks: int) -> list[list[tuple[str, int] | None]]:
    """Of each packed group of a matrix its eight rows: whose, and which; None: of nobody."""
    sharing = model.num_heads // model.num_kv_heads
    if matrix == "attention":
        turn = ["q"] * sharing + ["k"] + ["gate"] * sharing + ["v"]
        dealt: list[tuple[str, int]] = []  # part, and which of its groups
        for i in range(model.num_kv_heads * model.head_dim // 8):
            for place, part in enumerate(turn):
                dealt.append((part, i * turn.count(part) + place - turn.index(part)))
        ends = [block * len(dealt) // blocks for block in range(blocks + 1)]
        groups: list[list[tuple[str, int] | None]] = []
        for begin, end in itertools.pairwise(ends):
            mine = sorted(dealt[begin:end], key=lambda it: (("q", "k", "gate", "v").index(it[0]), it[1]))
            groups += [[(part, 8 * which + i) for i in range(8)] for part, which in mine]
        return groups
    if matrix == "up" and model.activation == "swiglu":
        return [
            [(name, 4 * g + i) for name in ("mlp_gate", "up") for i in range(4)]
            for g in range(model.inner // 4)
        ]
    count = {"up": model.inner, "head": model.vocabulary}.get(matrix, model.hidden)
    return [
        [(matrix, i) if i < count else None for i in range(8 * g, 8 * g + 8)] for g in range(-(-count // 8))
    ]


def unit(packed: Any, at: int, eight: bool) -> tuple[Any, Any]:
    """q [8, blocks, 32] and scales [8, blocks] of the unit at a byte."""
    blocks = 8 if eight else 16
    row, block, column = np.indices((8, blocks, 32))
    word = block * (2 if eight else 1)  # a lane's first of a block; four lie together
    lane = at + word // 4 * 512 + word % 4 * 4 + 16 * (4 * row + column // 8)
    if eight:
        q = packed[lane + column % 8].astype(np.int64) - 128
    else:
        bit = column % 2 * 16 + column // 2 % 2 * 8 + column % 8 // 4 * 4
        q = (packed[lane + bit // 8].astype(np.int64) >> (bit % 8) & 15) - 8
    scales = np.ascontiguousarray(packed[at + 2048 : at + 2048 + 16 * blocks]).view(np.float16)
    return q, scales.reshape(8, 2, blocks // 2).transpose(0, 2, 1).reshape(8, blocks)


def stream(model: StepModel) -> Iterator[tuple[int, str]]:
    """Layers and matrices in the order of the packed weights."""
    order = ("attention", "up", "down", "dense") if model.parallel_residual else (
        "attention", "dense", "up", "down",
    )  # fmt: skip
    for layer in range(model.layers):
        yield from ((layer, matrix) for matrix in order)
    yield 0, "head"


def unpacked(model: StepModel, packed: Any, blocks: int) -> Mapping[tuple[int, str], Any]:
    """(layer, name of a matrix) -> q · scale, float64 [rows, K].

    Args:
        model: a quantised one.
        packed: uint8.
        blocks: that it is packed for.
    """
    widths = {"down": model.inner, "dense": model.num_heads * model.head_dim}
    found: dict[tuple[int, str], dict[int, Any]] = {}
    at = 0
    for layer, matrix in stream(model):
        chunks = widths.get(matrix, model.hidden) // 32
        for rows in groups_of(model, matrix, blocks):
            if matrix == "head":
                eight = model.head_format == "int8"
            else:
                eight = any(row and model.int8_matrices[layer] >> BITS[row[0]] & 1 for row in rows)
            each = 8 if eight else 16
            whole = np.zeros((8, chunks, 32))
            for number in range(-(-chunks // each)):
                q, scales = unit(packed, at, eight)
                at += 2048 + 16 * each
                first = max(min(number * each, chunks - each), 0)
                for b in range(each):
                    values = q[:, b] * scales[:, b, None].astype(np.float64)
                    if first + b < chunks and first + b >= number * each:
                        whole[:, first + b] = values
                    else:
                        assert not q[:, b].any() and not scales[:, b].any()
            for values, row in zip(whole, rows, strict=True):
                if row is None:
                    assert not values.any()
                else:
                    found.setdefault((layer, row[0]), {})[row[1]] = values.reshape(-1)
    return {name: np.stack([rows[i] for i in range(len(rows))]) for name, rows in found.items()}
