"""Packed weights element by element, as plugins/include/dijiang/linear.h says where each lies."""

from __future__ import annotations

from typing import Any

import numpy as np


def unpacked(form: str, packed: Any, width: int, inner: int) -> tuple[Any, Any]:
    """q and scale of every element that a packed weight has room for.

    Args:
        form: "int8" or "int4".
        packed: uint8.
        width, inner: N and K.

    Returns:
        int64 and float64, both [N up to whole tiles, K up to whole chunks].
    """
    chunk = {"int8": 64, "int4": 128}[form]
    blocks, chunks = chunk // 32, -(-inner // chunk)
    n, k = np.indices((-(-width // 8) * 8, chunks * chunk))
    at = (n // 8 * chunks + k // chunk) * (512 + 16 * blocks)
    block, pair, of_pair, second = k % chunk // 32, k % 32 // 8, k % 8 // 2, k % 2
    lane = at + 16 * (4 * (n % 8) + of_pair)
    if form == "int8":
        q = packed[lane + 8 * block + 2 * pair + second].astype(np.int64) - 128
    else:
        bit = 4 * pair + 16 * second
        q = (packed[lane + 4 * block + bit // 8].astype(np.int64) >> (bit % 8) & 15) - 8
    place = at + 512 + 2 * ((n % 8 // 2 * blocks + block) * 2 + n % 2)
    scales = (packed[place].astype(np.uint16) | packed[place + 1].astype(np.uint16) << 8).view(np.float16)
    return q, scales.astype(np.float64)
