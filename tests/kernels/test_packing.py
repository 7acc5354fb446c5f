"""Quantised weights in the kernel's order, element by element as plugins/include/dijiang/linear.h says it."""

from __future__ import annotations

import numpy as np
import pytest

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels.packing import CHUNK, pack, packed_bytes


def unpacked(form: str, packed: bytes, n: int, k: int, inner: int) -> tuple[int, float]:
    """q and scale of one element, from the header's words."""
    chunk = CHUNK[form]
    blocks = chunk // 32
    bytes_ = 512 + 16 * blocks
    at = (n // 8 * -(-inner // chunk) + k // chunk) * bytes_
    block, within = k % chunk // 32, k % 32
    lane = 4 * (n % 8) + within // 8
    mine = packed[at + 16 * lane :]
    if form == "int8":
        q = mine[8 * block + within % 8] - 128
    else:
        word = int.from_bytes(mine[4 * block : 4 * block + 4], "little")
        q = (word >> (within % 8 // 2 * 4 + 16 * (within % 2)) & 15) - 8
    place = at + 512 + 2 * ((n % 8 // 2 * blocks + block) * 2 + n % 2)
    return q, float(np.frombuffer(packed[place : place + 2], np.float16)[0])


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(("width", "inner"), [(1, 32), (9, 96), (16, 128), (13, 352)])
def test_every_element_is_where_the_header_says(form: str, width: int, inner: int) -> None:
    rng = np.random.default_rng(width)
    zero = 128 if form == "int8" else 8
    u = rng.integers(0, 2 * zero, (width, inner // 32, 32)).astype(np.uint8)
    scales = rng.normal(size=(width, inner // 32)).astype(np.float16)
    packed = pack(form, u if form == "int8" else u[..., 0::2] | u[..., 1::2] << 4, scales)
    assert packed.dtype == np.uint8 and packed.shape == (packed_bytes(form, width, inner),)
    raw = packed.tobytes()
    for n in range(-(-width // 8) * 8):
        for k in range(-(-inner // CHUNK[form]) * CHUNK[form]):
            inside = n < width and k < inner
            expected = (int(u[n, k // 32, k % 32]) - zero, float(scales[n, k // 32])) if inside else (0, 0.0)
            assert unpacked(form, raw, n, k, inner) == expected


def test_what_is_no_such_weight_is_refused() -> None:
    scales = np.zeros((8, 2), np.float16)
    for form, values, given, text in (
        ("int8", np.zeros((8, 2, 16), np.uint8), scales, "weights have the wrong shape"),
        ("int4", np.zeros((8, 2, 16), np.int8), scales, "weights have the wrong shape"),
        ("int4", np.zeros((8, 2, 16), np.uint8), scales[:, :1], "scales have the wrong shape"),
        ("int4", np.zeros((8, 2, 16), np.uint8), scales.astype(np.float32), "scales have the wrong shape"),
    ):
        with pytest.raises(KernelError, match=text):
            pack(form, values, given)
