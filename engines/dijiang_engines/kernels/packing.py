"""Quantised weights in the order in which dijiang_linear reads them (plugins/include/dijiang/linear.h)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dijiang_engines.errors import KernelError
from dijiang_engines.weight_formats import BLOCK, ZERO, ZERO_BYTE

TILE = 8
"""Output elements that lie together."""
CHUNK = {"int8": 64, "int4": 128}
"""Elements of K that lie together."""


def packed_bytes(weight_format: str, width: int, inner: int) -> int:
    """How many bytes `pack` makes of a weight of `width` rows of `inner` elements."""
    chunk = CHUNK[weight_format]
    return -(-width // TILE) * -(-inner // chunk) * (512 + 2 * TILE * chunk // BLOCK)


def pack(weight_format: str, values: Any, scales: Any) -> Any:
    """Reorder a weight of N rows of K elements, w = q * scale.

    Args:
        weight_format: "int8" or "int4".
        values: uint8 [N, K/32, 32] of q + 128, or [N, K/32, 16] where byte j of a block has q + 8 of its
            element 2 j in the low four bits and of 2 j + 1 in the high ones.
        scales: float16 [N, K/32].

    Returns:
        uint8 [packed_bytes].

    Raises:
        KernelError: a shape or type is wrong.
    """
    each = {"int8": BLOCK, "int4": BLOCK // 2}[weight_format]
    values, scales = np.asarray(values), np.asarray(scales)
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[2] != each or 0 in values.shape:
        raise KernelError(
            f"{weight_format} weights have the wrong shape", got=f"{values.dtype} {list(values.shape)}",
            expected=f"uint8 [N, K/32, {each}]",
        )  # fmt: skip
    if scales.dtype != np.float16 or scales.shape != values.shape[:2]:
        raise KernelError(
            "scales have the wrong shape", got=f"{scales.dtype} {list(scales.shape)}",
            expected=f"float16 {list(values.shape[:2])}",
        )  # fmt: skip
    of_chunk = CHUNK[weight_format] // BLOCK
    more = [(0, -values.shape[0] % TILE), (0, -values.shape[1] % of_chunk)]
    values = np.pad(values, [*more, (0, 0)], constant_values=ZERO_BYTE[weight_format])
    scales = np.pad(scales, more)
    tiles, chunks = values.shape[0] // TILE, values.shape[1] // of_chunk
    # [tile, g, chunk, block, p, c, elements 8 p + 2 c and + 1] -> [tile, chunk, g, c, block, p, ..]
    values = values.reshape(tiles, TILE, chunks, of_chunk, 4, 4, each // 16).transpose(0, 2, 1, 5, 3, 4, 6)
    values = values.reshape(*values.shape[:5], each // 4)
    words = values if weight_format == "int8" else _nibbles(values)
    # [tile, c, 2, chunk, block] -> [tile, chunk, c, block, 2]
    scales = scales.reshape(tiles, 4, 2, chunks, of_chunk).transpose(0, 3, 1, 4, 2)
    parts = [np.ascontiguousarray(x).view(np.uint8).reshape(tiles, chunks, -1) for x in (words, scales)]
    return np.concatenate(parts, axis=2).reshape(-1)


def as_int8(values: Any) -> Any:
    """int4 values of `pack` as int8 ones, the same integers: uint8 [N, K/32, 32] from [N, K/32, 16]."""
    values = np.asarray(values)
    wide = np.empty((*values.shape[:2], BLOCK), np.uint8)
    wide[..., 0::2] = (values & 15) + (ZERO["int8"] - ZERO["int4"])
    wide[..., 1::2] = (values >> 4) + (ZERO["int8"] - ZERO["int4"])
    return wide


def _nibbles(pairs: Any) -> Any:
    """Four bytes of two neighbouring elements each -> one word with the even elements in its low half."""
    word = np.zeros(pairs.shape[:-1], np.uint32)
    for p in range(4):
        byte = pairs[..., p].astype(np.uint32)
        word |= (byte & 15) << (4 * p) | (byte >> 4) << (16 + 4 * p)
    return word.astype("<u4")
