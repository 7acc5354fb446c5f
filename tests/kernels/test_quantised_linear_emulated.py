"""The kernels for quantised weights on a CPU, thread by thread, against float64.

Their own sources, compiled by a C++ compiler against plugins/tests/emulator, which has what PTX does there.
It shows that they compute the right thing wherever a call is cut; what a GPU makes of it, and races, are
test_quantised_linear_gpu.py's and compute-sanitizer's to show.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from support.linear_cases import Case, make
from support.linear_emulator import compiled, host_call

from dijiang_engines.kernels import abi

SOURCES = ("tests/emulator/quantized.cpp", "kernels/linear/quantized/cut.cpp")
H100, SMALL, ONE = (90, 132, 232448), (89, 4, 101376), (90, 1, 232448)
"""Devices: compute capability, multiprocessors, shared memory."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = compiled(tmp_path_factory.mktemp("emulated") / "quantized.so", SOURCES)
    return ctypes.CDLL(str(library)).emulate_quantized


def run(emulated: Any, cases: list[Case], device: tuple[int, int, int], backwards: bool = False) -> str:
    """How the call was cut; fails if an output is wrong."""
    call = host_call(cases)
    plan = ctypes.create_string_buffer(256)
    status = emulated(
        ctypes.byref(call), ctypes.byref(abi.DeviceStruct(*device)), int(backwards), plan, len(plan)
    )
    assert status == 0
    for case in cases:
        case.check()
    return plan.value.decode()


def product(rows: int, inner: list[int], width: int, form: Any, **more: Any) -> Case:
    dtype = more.pop("dtype", torch.float16)
    return make(dtype, rows, inner, width, weight_format=form, device="cpu", **more)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("int4", torch.float16), ("int8", torch.float16), ("int4", torch.bfloat16), ("int8", torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("rows", "inner", "width", "more"),
    [
        (1, 288, 9, {"norm": "layer_norm", "activation": "gelu", "residual": True}),
        (17, 160, 131, {"residual": True, "activation": "relu"}),
    ],
)
def test_a_product(
    emulated: Any, form: str, dtype: Any, rows: int, inner: int, width: int, more: dict[str, Any]
) -> None:
    case = product(rows, [inner], width, form, dtype=dtype, seed=rows, **more)
    run(emulated, [case], SMALL, backwards=rows % 2 == 1)


@pytest.mark.parametrize(
    ("rows", "forms"),
    [(8, ["int4", "int8"]), (13, ["int8", "int4"]), (20, ["int4", "int4"]), (20, ["int8", "int4"])],
)
def test_two_terms(emulated: Any, rows: int, forms: list[str]) -> None:
    run(emulated, [product(rows, [96, 160], 40, forms, residual=True)], SMALL)
    gated = product(
        rows, [160, 160], 70, forms, activation="swiglu", norm="rms_norm" if rows < 17 else "norm_none"
    )
    run(emulated, [gated], SMALL)


def test_outputs_of_several_formats(emulated: Any) -> None:
    for rows in (2, 130):  # the latter in blocks of 128
        norm = "layer_norm" if rows < 20 else "norm_none"
        run(emulated, [
            product(rows, [128], 40, "int4", norm=norm, seed=1),
            product(rows, [128], 24, "int8", norm=norm, seed=2),
            product(rows, [128], 30, "int4", norm=norm, seed=3, activation="gelu"),
        ], ONE if rows > 128 else H100)  # fmt: skip


def test_every_way_to_cut(emulated: Any) -> None:
    """Several rounds of tiles; fewer rows to a block than there are; warps that share K."""
    plans = [
        run(emulated, [product(1, [64], 700, "int4")], (90, 2, 30000)),
        run(emulated, [product(8, [2048], 24, "int8")], (90, 3, 40000)),
        run(emulated, [product(2, [1536], 16, "int4")], H100),
    ]
    found = [{name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", plan)} for plan in plans]
    assert found[0]["rounds"] > 1
    assert found[1]["passes"] > 1
    assert found[2]["warps"] > 1
