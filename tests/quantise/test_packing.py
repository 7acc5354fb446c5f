"""Quantised weights in the kernel's order, element by element as plugins/include/dijiang/linear.h says it."""

from __future__ import annotations

import numpy as np
import pytest
from support.oracles.packed_weights import unpacked

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels.packing import pack, packed_bytes


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize(("width", "inner"), [(1, 32), (9, 96), (16, 128), (13, 352)])
def test_every_element_is_where_the_header_says(form: str, width: int, inner: int) -> None:
    rng = np.random.default_rng(width)
    zero = 128 if form == "int8" else 8
    u = rng.integers(0, 2 * zero, (width, inner // 32, 32)).astype(np.uint8)
    scales = rng.normal(size=(width, inner // 32)).astype(np.float16)
    packed = pack(form, u if form == "int8" else u[..., 0::2] | u[..., 1::2] << 4, scales)
    assert packed.dtype == np.uint8 and packed.shape == (packed_bytes(form, width, inner),)
    q, scale = unpacked(form, packed, width, inner)
    expected = u.reshape(width, inner).astype(int) - zero
    assert np.array_equal(q[:width, :inner], expected)
    assert np.array_equal(scale[:width, :inner], np.repeat(scales.astype(np.float64), 32, axis=1))
    for each in (q, scale):
        assert not each[width:].any() and not each[:, inner:].any()


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
