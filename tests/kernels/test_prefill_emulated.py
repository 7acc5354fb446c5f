"""Prefill's kernels for compute capability 9.0 on a CPU, thread by thread, against float64.

Their own sources, compiled by a C++ compiler against plugins/tests/emulator, which has what PTX does there:
products of four warps read the very bytes that their descriptors name. It shows that the kernel computes the
right thing wherever a sequence is cut; what a GPU makes of it is test_kernels_gpu.py's to show.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.linear_emulator import compiled
from support.makers.kernel_cases import Case, make_call
from support.oracles.kernel_bounds import compare

SOURCES = ("tests/emulator/prefill.cpp", "kernels/attention/prefill/schedule.cpp")
INTEGERS = ("batch", "length", "num_heads", "num_kv_heads", "head_dim", "rotary_dim", "table_rows")
POINTERS = (
    "qkv", "gate", "past_state", "positions", "seq_lens", "proj", "norm_weight", "norm_bias", "inv_freq",
    "log_decay", "gain", "read_scale", "output", "present_state",
)  # fmt: skip
STRIDES = tuple(f"{name}_{axis}_stride" for name in ("qkv", "gate", "output") for axis in ("batch", "token"))
NUMBERS = {torch.float16: 1, torch.bfloat16: 2}


class Params(ctypes.Structure):
    """AttentionParams of plugins/kernels/attention/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in INTEGERS), ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in (*STRIDES, "past_batch_stride", "present_batch_stride")),
        ("workspace", ctypes.c_void_p), ("sync", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("emulated") / "prefill.so"
    library = ctypes.CDLL(str(compiled(target, SOURCES, "-DDIJIANG_SM90A", "-O2")))
    library.workspace_of_prefill.restype = ctypes.c_int64
    return library


def run(
    emulated: Any, case: Case, multiprocessors: int, *, backwards: bool = False, eager: bool = False,
    in_place: bool = True,
) -> int:  # fmt: skip
    """How many blocks computed it; fails where a result is wrong, or the sync memory is not left zero."""
    call = make_call(case, "cpu")
    output = torch.full_like(call.gate, float("nan"))
    past = call.past_state.clone()
    present = past if in_place else torch.full_like(past, float("nan"))
    workspace = torch.full((emulated.workspace_of_prefill(),), 255, dtype=torch.uint8)
    sync = torch.zeros(4096, dtype=torch.uint8)
    tensors = call.tensors() | {"past_state": past, "output": output, "present_state": present}
    params = Params(
        call.batch, call.length, *(getattr(call.geometry, name) for name in INTEGERS[2:6]), call.table_rows,
        call.geometry.epsilon,
        *(tensors[name].data_ptr() if name in tensors else None for name in POINTERS),
        *(tensors[name].stride(axis) for name in ("qkv", "gate", "output") for axis in (0, 1)),
        past.stride(0), present.stride(0), workspace.data_ptr(), sync.data_ptr(),
    )  # fmt: skip
    blocks = int(
        emulated.emulate_prefill(
            ctypes.byref(params), NUMBERS[call.dtype], multiprocessors, int(backwards), int(eager)
        )
    )
    if blocks == 0:
        return 0
    errors = compare(call, output, present)
    assert errors.worst <= 1, f"{case}: {errors.where}"
    assert not sync.any()
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "d"), [(8, 64), (16, 64), (16, 80), (8, 128)])
def test_every_shape_and_length(emulated: Any, heads: int, d: int, dtype: str) -> None:
    base = Case(heads=heads, d=d, dtype=dtype, rotary=d // 4, seed=d)
    assert run(emulated, replace(base, length=2, lens=(2,)), 8) == heads // (2 if d == 80 else 1)
    case = replace(base, length=70, batch=3, magnitude="peaked", kv_heads=4, rotary=d, position=999_990)
    run(emulated, case, 8, eager=True, in_place=False)
    case = replace(base, length=130, lens=(130,), magnitude="small", decay="mixed", rotary=0)
    if d == 80:
        run(emulated, case, 8, backwards=True)
    elif heads == 8:
        assert run(emulated, case, 4 * heads, backwards=True) == 3 * heads  # segments of one chunk


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_spans_of_four_chunks(emulated: Any, dtype: str) -> None:
    """Heads of 64: the last span in part; segments of two spans; one whose first walk has read its span."""
    base = Case(heads=8, d=64, dtype=dtype, rotary=16, decay="mixed")
    assert run(emulated, replace(base, length=330, lens=(330,)), 8, eager=True) == 8
    case = replace(base, length=700, lens=(700,), magnitude="peaked", kv_heads=2)
    assert run(emulated, case, 16, backwards=True) == 16
    assert run(emulated, replace(base, length=500, batch=2, decay="official"), 40, in_place=False) == 32


def test_groups_of_channels_in_two_heads(emulated: Any) -> None:
    run(emulated, Case(heads=32, d=80, dtype="float16", rotary=20, length=70, lens=(70,)), 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_heads_of_256(emulated: Any, dtype: str) -> None:
    """Features first, then four blocks a head: rows of many lengths; segments of one chunk."""
    base = Case(heads=8, d=256, dtype=dtype, rotary=64, seed=256)
    lens = (2, 63, 0, 64, 65, 70)
    case = replace(
        base, length=70, batch=6, lens=lens, magnitude="peaked", kv_heads=2, rotary=256, position=999_990
    )
    assert run(emulated, case, 8, eager=True, in_place=False) == 4 * 8 * 6
    case = replace(base, length=130, lens=(130,), magnitude="small", decay="mixed", rotary=0)
    assert run(emulated, case, 96, backwards=True) == 3 * 32


@pytest.mark.slow
def test_segments_of_heads_of_256(emulated: Any) -> None:
    """What they leave each other; a row that ends before the second; a last one that is shorter."""
    base = Case(heads=8, d=256, rotary=64, dtype="bfloat16", seed=256)
    case = replace(base, length=330, batch=2, lens=(330, 100), decay="slowest", rotary=192)
    assert run(emulated, case, 128, eager=True, backwards=True) == 2 * 64
    case = replace(base, length=700, lens=(700,), kv_heads=4, dtype="float16")
    assert run(emulated, case, 132, in_place=False) == 4 * 32


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "dtype"), [(16, "bfloat16"), (32, "float16")])
def test_wide_groups_of_heads_of_256(emulated: Any, heads: int, dtype: str) -> None:
    """GroupNorm's groups of 16 and 32 channels are several lanes."""
    case = Case(heads=heads, d=256, dtype=dtype, rotary=64, length=70, lens=(70,), decay="mixed")
    assert run(emulated, case, 132) == 4 * heads * (2 if heads == 16 else 1)


def test_a_state_beyond_float16(emulated: Any) -> None:
    case = Case(heads=8, d=64, dtype="float16", length=130, lens=(130,), magnitude="large-v", decay="none")
    run(emulated, case, 8)
    run(emulated, case, 24)


@pytest.mark.slow
def test_a_state_of_256_beyond_float16(emulated: Any) -> None:
    case = Case(heads=8, d=256, dtype="float16", length=130, lens=(130,), magnitude="large-v", decay="none")
    run(emulated, case, 32)
    run(emulated, case, 96)


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=8, d=64, dtype="float16", length=70, decay="trained"),
        Case(heads=12, d=64, dtype="float16", length=70),
        Case(heads=8, d=64, dtype="float16", length=70, rotary=6),
        Case(heads=8, d=96, dtype="float16", length=70),
        Case(heads=12, d=256, dtype="float16", length=70),
        Case(heads=8, d=256, dtype="float16", length=70, rotary=6),
        Case(heads=8, d=240, dtype="float16", length=70),
        Case(heads=16, d=80, dtype="float16", length=70, rotary=20),
    ],
    ids=str,
)
def test_what_is_left_to_the_other_kernels(emulated: Any, case: Case) -> None:
    assert run(emulated, replace(case, lens=(70,)), 16) == 0
