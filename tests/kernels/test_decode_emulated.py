"""Decode of many states on a CPU: its own kernel, on emulated threads, against the float64 reference."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from support.linear_emulator import compiled
from support.makers.kernel_arena import Arena, Layout
from support.makers.kernel_cases import Call, Case, make_call
from support.makers.kernel_engine import CudaEngine
from support.oracles.kernel_bounds import compare
from torch import Tensor


class Emulated(CudaEngine):
    """The kernel of heads, whatever the batch."""

    device = "cpu"
    backwards = False

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def workspace_size(self, call: Call) -> int:
        return 0

    def sync_size(self, call: Call) -> int:
        return 0

    def launch(self, call: Call, buffers: dict[str, Tensor], stream: int) -> None:
        geometry, given = self.geometry(call), self.arguments(call, buffers)
        self.library.emulate_decode(
            ctypes.byref(geometry), call.batch, ctypes.byref(given), int(self.backwards)
        )


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    target = tmp_path_factory.mktemp("decode") / "decode.so"
    return Emulated(compiled(target, ("tests/emulator/decode.cpp",)))


GAPS = Layout(token_gap=24, batch_gap=40)
CASES: dict[str, tuple[Case, Layout]] = {
    "16 heads of 64": (Case(heads=16, dtype="float16", batch=2, lens=(1, 1)), Layout(in_place=True)),
    "a row without a token": (Case(heads=4, dtype="bfloat16", batch=3, lens=(1, 0, 1), kv_heads=2), GAPS),
    "the same in place": (Case(heads=4, dtype="float16", batch=2, lens=(0, 1)), Layout(in_place=True)),
    "groups that leave their heads": (Case(heads=6, d=80, rotary=20, dtype="float16", kv_heads=3), GAPS),
    "sets of three heads": (Case(heads=12, rotary=64, dtype="bfloat16", decay="trained", position=290), GAPS),
    "parts of a head": (
        Case(heads=4, d=256, rotary=0, dtype="float16", decay="mixed"),
        Layout(in_place=True),
    ),
    "an odd half": (Case(heads=2, d=80, rotary=6, dtype="bfloat16", position=999_990), Layout()),
    "four heads of 128": (Case(heads=4, kv_heads=1, d=128, rotary=32, dtype="bfloat16", decay="mixed"), GAPS),
    "heads of 128 and a row without a token": (
        Case(heads=2, d=128, rotary=128, dtype="float16", batch=2, lens=(0, 1)),
        GAPS,
    ),
    "numbers of many sizes": (Case(heads=8, dtype="float16", magnitude="large-v", past=False), Layout()),
    "peaks": (Case(heads=8, dtype="float16", magnitude="peaked", decay="trained", position=11), Layout()),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(emulated: Emulated, name: str) -> None:
    case, layout = CASES[name]
    call = make_call(case)
    emulated.backwards = len(name) % 2 == 0
    output, state = Arena(emulated, call, layout).run()
    errors: Any = compare(call, output, state)
    print(name, errors.output, errors.state)
    assert errors.worst <= 1, errors.where
