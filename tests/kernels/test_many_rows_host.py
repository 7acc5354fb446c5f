"""dijiang_linear_with_workspace on the host: sizes, refusals, which cuBLASLt there is. No GPU is needed."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.test_linear_host import GIB, floats, linear, quantised

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels.linear import LinearKernels, linear_call

LEAST_ROWS = 17
MIB = 1 << 20


@pytest.fixture(scope="session")
def kernels(kernels_library: Path) -> LinearKernels:
    return LinearKernels(kernels_library)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 60000), min_size=1, max_size=4), st.integers(1, 400),
    st.lists(st.integers(1, 400000), min_size=2, max_size=2), st.sampled_from(["same", "int8", "int4"]),
    st.booleans(),
)  # fmt: skip
def test_more_rows_never_need_less(
    kernels: LinearKernels, widths: list[int], blocks: int, rows: list[int], form: Any, norm: bool
) -> None:
    """A plan reserves what its largest call needs, and smaller calls have room in it."""
    inner = 32 * blocks

    def size(rows: int) -> int:
        named = {"norm": "rms_norm", "norm_weight": floats(inner), "epsilon": 1e-5} if norm else {}
        make = linear if form == "same" else lambda *it, **more: quantised(*it, form, **more)
        return kernels.workspace_size([make(rows, inner, width, **named) for width in widths])

    less, more = sorted(rows)
    assert size(less) <= size(more)
    assert (size(more) > 0) == (more >= LEAST_ROWS)


def test_workspaces_are_bounded(kernels: LinearKernels) -> None:
    """A head of 2.8B's shape is never widened, nor its sums kept, as a whole."""
    assert kernels.workspace_size([quantised(2048, 2560, 50304, "int4")]) < 200 * MIB
    assert kernels.workspace_size([quantised(LEAST_ROWS - 1, 2560, 50304, "int4")]) == 0


def test_a_workspace_is_for_biases_of_any_numbers(kernels: LinearKernels) -> None:
    """A plan does not know them when it reserves memory."""
    plain = [quantised(200, 1024, width, "int4") for width in (3072, 1000, 64)]
    marked = [replace(it, terms=[replace(it.terms[0], bias_is_rounded=True)]) for it in plain]
    assert kernels.workspace_size(plain) == kernels.workspace_size(marked)


def test_a_workspace_that_cannot_be(kernels: LinearKernels) -> None:
    output = quantised(128, 1024, 64, "int4")
    call, size = linear_call([output], False), kernels.workspace_size([output])

    def refused(place: int, bytes_: int) -> str:
        with pytest.raises(KernelError) as caught:
            kernels.call("dijiang_linear_with_workspace", ctypes.byref(call), place, bytes_, 0)
        return str(caught.value)

    assert "workspace_size is too small" in refused(10000 * GIB, size - 1)
    assert "workspace" in refused(10000 * GIB + 16, size) and "aligned" in refused(10000 * GIB + 16, size)
    place = call.terms[0].input
    assert "overlap" in refused(place, size)
    with pytest.raises(KernelError, match="wrong number of terms"):
        kernels.workspace_size([replace(output, activation="swiglu")])


def test_which_library_there_is(kernels: LinearKernels) -> None:
    """Either one with a version, or a sentence that says where it was looked for."""
    try:
        name, version = kernels.library().rsplit(" ", 1)
    except KernelError as error:
        looked_for = [f"libcublasLt.so.{major}" in str(error) for major in (11, 12, 13)]
    else:
        looked_for = ["cublasLt" in name, int(version) >= 110000]
    assert all(looked_for)
