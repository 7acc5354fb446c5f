"""dijiang_linear on the host: what it refuses, and how it cuts the work. No GPU is needed.

Addresses in these tests point nowhere: each call is refused before anything would be launched.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels.library import Device
from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm, linear_call
from dijiang_engines.kernels.packing import packed_bytes

GIB = 1 << 30
H200, ORIN, L4 = Device(90, 132, 232448), Device(87, 16, 166912), Device(89, 58, 101376)
SHARED_RESERVED = 1024
"""Bytes of a multiprocessor's shared memory that CUDA takes of each block."""


class Array:
    """An array of a shape and type at an address that nobody reads."""

    place = 0

    def __init__(self, *shape: int, kind: str = "<f2") -> None:
        Array.place += 1
        self.__cuda_array_interface__ = {
            "data": (Array.place * GIB, False), "shape": shape, "typestr": kind, "version": 3,
        }  # fmt: skip


def floats(*shape: int) -> Array:
    return Array(*shape, kind="<f4")


def ceiling(size: int, by: int) -> int:
    return -(-size // by)


def linear(rows: int, inner: int, width: int, **named: Any) -> LinearOutput:
    term = LinearTerm(Array(rows, inner), Array(width, inner), floats(width))
    return LinearOutput(Array(rows, width), [term], **named)


def quantised(rows: int, inner: int, width: int, form: Any, **named: Any) -> LinearOutput:
    weight = Array(packed_bytes(form, width, inner), kind="|u1")
    term = LinearTerm(Array(rows, inner), weight, floats(width), form)
    return LinearOutput(Array(rows, width), [term], **named)


@pytest.fixture(scope="session")
def kernels(kernels_library: Path) -> LinearKernels:
    return LinearKernels(kernels_library)


def refused(kernels: LinearKernels, outputs: list[LinearOutput]) -> str:
    with pytest.raises(KernelError) as caught:
        kernels.linear(outputs)
    return str(caught.value)


def numbers(plan: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", plan)}


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 64), st.integers(1, 400), st.lists(st.integers(1, 60000), min_size=1, max_size=4),
    st.sampled_from([H200, ORIN, L4]),
)  # fmt: skip
def test_every_output_element_has_a_block(
    kernels: LinearKernels, rows: int, chunks: int, widths: list[int], device: Device
) -> None:
    plan = numbers(kernels.linear_plan([linear(rows, 32 * chunks, width) for width in widths], device))
    tiles = [-(-width // 8) for width in widths]
    each = plan["tiles"] * plan["rounds"]
    assert plan["blocks"] == sum(-(-n // each) for n in tiles)
    assert plan["passes"] * plan["rows"] >= rows
    assert plan["threads"] == 32 * plan["warps"] * plan["tiles"] <= 512
    assert plan["shared"] <= device.shared_memory
    # All blocks are there at once: a second wave would wait for the first.
    resident = min((device.shared_memory + SHARED_RESERVED) // (plan["shared"] + SHARED_RESERVED),
                   1024 // plan["threads"])  # fmt: skip
    assert plan["blocks"] <= device.multiprocessors * max(resident, 1) + len(widths)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 16), st.integers(1, 400), st.lists(st.integers(1, 60000), min_size=1, max_size=4),
    st.sampled_from([H200, ORIN, L4]), st.sampled_from(["int8", "int4"]),
)  # fmt: skip
def test_every_output_element_of_few_quantised_rows_has_a_block(
    kernels: LinearKernels, rows: int, blocks: int, widths: list[int], device: Device, form: str
) -> None:
    line = kernels.linear_plan([quantised(rows, 32 * blocks, width, form) for width in widths], device)
    plan = numbers(line)
    assert line.startswith("quantized few")
    each = plan["tiles"] * plan["rounds"]
    assert plan["blocks"] == sum(ceiling(ceiling(width, 8), each) for width in widths)
    assert plan["passes"] * plan["rows"] >= rows
    assert plan["threads"] == 32 * plan["warps"] * plan["tiles"] <= 512
    assert plan["shared"] <= device.shared_memory


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("device", [H200, ORIN, L4])
def test_many_quantised_rows_have_a_kernel_of_their_own(
    kernels: LinearKernels, form: str, device: Device
) -> None:
    for rows, width, each in ((17, 9, 64), (2048, 1024, 64), (2048, 50304, 128)):
        line = kernels.linear_plan([quantised(rows, 2560, width, form)], replace(device, multiprocessors=132))
        plan = numbers(line)
        assert line.startswith("quantized many") and plan["rows"] == each
        assert plan["blocks"] == ceiling(rows, each) * ceiling(width, 128)
        assert plan["shared"] <= device.shared_memory
    norm: dict[str, Any] = {"norm": "rms_norm", "norm_weight": floats(2560), "epsilon": 1e-5}
    assert kernels.linear_plan([quantised(2048, 2560, 64, form, **norm)], device).startswith("quantized few")


def test_weight_formats_that_cannot_be(kernels: LinearKernels) -> None:
    good = quantised(2, 96, 20, "int4")
    assert "wrong shape" in refused(kernels, [replace(good, output=Array(2, 30))])
    mixed = replace(good, terms=[good.terms[0], linear(2, 64, 20).terms[0]])
    assert "expected one kind in a call" in refused(kernels, [mixed])
    for formats in (3, 2 | 1 << 8, 255):
        call = linear_call([good], False)
        call.weight_formats = formats
        with pytest.raises(KernelError, match="weight_formats"):
            kernels.call("dijiang_linear", ctypes.byref(call), 0)


def test_biases_of_terms_that_are_not_there(kernels: LinearKernels) -> None:
    call = linear_call([linear(2, 64, 8)], False)
    for field, value in (("rounded_biases", 2), ("reserved", 1)):
        setattr(call, field, value)
        with pytest.raises(KernelError, match=f"{field} is out of range"):
            kernels.call("dijiang_linear", ctypes.byref(call), 0)
        setattr(call, field, 0)


def test_rows_that_do_not_fit_are_split(kernels: LinearKernels) -> None:
    assert numbers(kernels.linear_plan([linear(8, 1024, 64)], L4))["passes"] == 1
    assert numbers(kernels.linear_plan([linear(8, 12800, 2560)], L4))["passes"] > 1
    with pytest.raises(KernelError, match="too wide for this GPU"):
        kernels.linear_plan([linear(1, 65536, 64)], L4)


@pytest.mark.parametrize(
    ("inner", "expected"), [(33, "multiple of 32"), (16, "multiple of 32"), (2**21, "multiple of 32")]
)
def test_inner_sizes(kernels: LinearKernels, inner: int, expected: str) -> None:
    assert expected in refused(kernels, [linear(1, inner, 8)])


def test_what_does_not_fit_is_refused(kernels: LinearKernels) -> None:
    good = linear(2, 64, 8)
    term = good.terms[0]
    norm: dict[str, Any] = {"norm": "layer_norm", "norm_weight": floats(64), "epsilon": 1e-5}
    cases: list[tuple[list[LinearOutput], str]] = [
        ([], "nothing to compute"),
        ([good] * 5, "too much for one call"),
        ([replace(good, output=Array(2, 8, kind="<f4"))], "float16 or bfloat16"),
        ([replace(good, terms=[replace(term, input=Array(3, 64))])], "2 rows of 64"),
        ([replace(good, terms=[replace(term, weight=Array(9, 64), bias=None)])], "as many rows as"),
        ([replace(good, terms=[replace(term, bias=Array(8))])], "bias has the wrong type"),
        ([replace(good, terms=[term, linear(2, 64, 8).terms[0], term])], "wrong number of terms"),
        ([replace(good, activation="swiglu")], "2, for DIJIANG_SWIGLU"),
        ([replace(good, norm="layer_norm", epsilon=1e-5)], "norm_weight is missing"),
        ([replace(good, **norm | {"epsilon": 0.0})], "epsilon is out of range"),
        ([replace(good, **norm | {"epsilon": float("nan")})], "epsilon is out of range"),
        ([replace(good, norm_weight=floats(64))], "has no norm"),
        ([replace(good, terms=[term, linear(2, 64, 8).terms[0]], **norm)], "different inputs"),
        ([replace(good, residual=Array(2, 9))], "2 rows of 8"),
        ([replace(good, residual=good.output)], "overlap"),
        ([good, good], "overlap"),
        ([replace(good, terms=[replace(term, input=GIB + 2)])], "not aligned"),
    ]  # fmt: skip
    for outputs, expected in cases:
        assert expected in refused(kernels, outputs), expected
