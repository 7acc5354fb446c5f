"""Products of many rows on a CPU: their own sources, on emulated threads, with a stand-in for cuBLASLt.

It shows that calls are cut, widened, normalised and finished as they should be, and what happens where the
library is not there or lacks something. The stand-in (plugins/tests/emulator/cublaslt.cpp) multiplies for
real but is no cuBLASLt: that is test_many_rows_gpu.py's.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.linear_cases import Case, make
from support.linear_emulator import compiled, host_call

from dijiang_engines.kernels import abi

MANY = "kernels/linear/many"
SOURCES = (
    "tests/emulator/many.cpp",
    "kernels/linear/quantized/cut.cpp",
    *(f"{MANY}/{name}.cpp" for name in ("run", "plan", "product", "cublaslt")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return compiled(folder / "many.so", SOURCES, "-ldl")


@pytest.fixture(scope="module")
def emulated(library: Path, folder: Path) -> Any:
    """With the stand-in, which the process then keeps."""
    stand_in = compiled(folder / "cublaslt.so", ("tests/emulator/cublaslt.cpp",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIJIANG_CUBLASLT", str(stand_in))
        loaded = ctypes.CDLL(str(library))
        loaded.workspace_of_many.restype = ctypes.c_int64
        case = many(torch.float16, 17, [32], 8)
        run(loaded, [case])  # finds the stand-in
    loaded.choices_made = ctypes.c_int.in_dll(ctypes.CDLL(str(stand_in)), "choices_made")
    return loaded


def many(dtype: Any, rows: int, inner: list[int], width: int, **more: Any) -> Case:
    return make(dtype, rows, inner, width, device="cpu", rounded=True, **more)


def run(emulated: Any, cases: list[Case], backwards: bool = False) -> str:
    """How the call was cut; fails if an output is wrong, or anything beside the workspace is written."""
    call = host_call(cases)
    size = emulated.workspace_of_many(ctypes.byref(call))
    memory = torch.full((size + 512,), 255, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    memory[start + size :] = 7
    done, text = ctypes.c_int32(), ctypes.create_string_buffer(512)
    status = emulated.emulate_many(
        ctypes.byref(call), ctypes.c_void_p(memory.data_ptr() + start), int(backwards), ctypes.byref(done),
        text, len(text),
    )  # fmt: skip
    assert status == 0 and done.value == 1, text.value
    assert (memory[start + size :] == 7).all()
    for case in cases:
        case.check()
    return text.value.decode()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["same", "int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "inner", "width", "more"),
    [
        (17, 160, 40, {"bias": False}),
        (18, 96, 19, {"norm": "layer_norm", "activation": "gelu", "residual": True}),
        (35, 288, 9, {"norm": "rms_norm", "bias": False, "residual": True}),
    ],
)
def test_a_product(
    emulated: Any, dtype: Any, form: str, rows: int, inner: int, width: int, more: dict[str, Any]
) -> None:
    case = many(dtype, rows, [inner], width, weight_format=form, seed=rows, **more)
    run(emulated, [case], backwards=rows % 2 == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["same", "int4"])
def test_biases_of_the_types_numbers(emulated: Any, dtype: Any, form: str) -> None:
    """The library adds them; those of sums that have something else to come are added as others are."""
    kinds: dict[str, Any] = {"bias": "rounded", "weight_format": form}
    run(emulated, [many(dtype, 18, [96], 300, residual=True, **kinds)])
    run(emulated, [
        many(dtype, 18, [96], 300, **kinds), many(dtype, 18, [96], 24, norm="layer_norm", seed=1, **kinds),
        many(dtype, 18, [96], 40, activation="gelu", seed=2, **kinds),
        many(dtype, 18, [96], 9, weight_format=form, seed=3),
    ])  # fmt: skip
    run(emulated, [many(dtype, 18, [96, 64], 40, residual=True, **kinds)])
    run(emulated, [many(dtype, 18, [96], 40, activation="relu", **kinds)])
    run(emulated, [many(dtype, 18, [96], 40, activation="relu", residual=True, **kinds)])
    run(emulated, [many(dtype, 18, [96], 43, **kinds)])


@pytest.mark.parametrize("forms", [["same", "same"], ["int4", "int8"]])
def test_two_terms(emulated: Any, forms: list[str]) -> None:
    run(emulated, [many(torch.float16, 20, [96, 160], 24, weight_format=forms, residual=True)])
    run(emulated, [many(torch.float16, 19, [64, 64], 24, weight_format=forms, activation="swiglu")])


def test_several_outputs(emulated: Any) -> None:
    plan = run(emulated, [
        many(torch.float16, 17, [128], 136, weight_format="int4", norm="rms_norm"),
        many(torch.float16, 17, [128], 24, weight_format="int8", bias=False, seed=1),
        many(torch.float16, 17, [128], 40, weight_format="int4", norm="rms_norm", activation="relu", seed=2),
    ])  # fmt: skip
    assert "pieces=3 widened=1" in plan


def test_an_algorithm_is_chosen_once(emulated: Any) -> None:
    case = many(torch.float16, 21, [32], 48, weight_format="int4")
    run(emulated, [case])
    before = emulated.choices_made.value
    assert before > 0
    run(emulated, [case])
    assert emulated.choices_made.value == before


@pytest.mark.parametrize(
    ("rows", "inner", "widths", "form", "pays"),
    [
        (64, [1024], [3072, 1024, 4096], 2, False), (64, [1024, 4096], [1024], 2, True),
        (17, [1024], [3072, 1024, 4096], 1, False), (17, [1024, 4096], [1024], 1, True),
        (128, [2560], [7680, 2560, 10240], 2, False), (128, [2560, 10240], [2560], 2, True),
        (256, [2560], [7680, 2560, 10240], 2, True), (17, [2560], [7680, 2560, 10240], 0, True),
    ],
)  # fmt: skip
def test_few_rows_go_the_way_that_was_faster(
    emulated: Any, rows: int, inner: list[int], widths: list[int], form: int, pays: bool
) -> None:
    """At the sizes of docs/evidence/many-rows-h100.txt, with that GPU's multiprocessors."""
    call = abi.LinearCallStruct(
        dtype=1, rows=rows, term_count=len(inner) * len(widths), output_count=len(widths)
    )
    for o, width in enumerate(widths):
        call.outputs[o] = abi.LinearOutputStruct(width=width)
        for t, size in enumerate(inner):
            call.terms[o * len(inner) + t] = abi.LinearTermStruct(inner=size, output=o)
            call.weight_formats |= form << 8 * (o * len(inner) + t)
    device = abi.DeviceStruct(90, 132, 232448)
    assert emulated.many_pays(ctypes.byref(call), ctypes.byref(device)) == pays


SCRIPT = """
import ctypes, json, sys
from dijiang_engines.kernels import abi
library = ctypes.CDLL(sys.argv[1])
rows, inner, width = 17, 32, 8
call = abi.LinearCallStruct(dtype=1, rows=rows, term_count=1, output_count=1)
memory = (ctypes.c_char * (64 << 20))()
place = ctypes.addressof(memory) + -ctypes.addressof(memory) % 256
call.terms[0] = abi.LinearTermStruct(input=place, weight=place + 8192, inner=inner)
call.outputs[0] = abi.LinearOutputStruct(output=place + 16384, width=width)
done, text = ctypes.c_int32(7), ctypes.create_string_buffer(1024)
status = library.emulate_many(
    ctypes.byref(call), ctypes.c_void_p(place + 32768), 0, ctypes.byref(done), text, len(text)
)
print(json.dumps([status, done.value, text.value.decode()]))
"""


def in_another_process(library: Path, cublaslt: str | None) -> tuple[int, int, str]:
    """Status, whether cuBLASLt did it, and the plan or why not."""
    environment = {name: value for name, value in os.environ.items() if name != "DIJIANG_CUBLASLT"}
    if cublaslt is not None:
        environment["DIJIANG_CUBLASLT"] = cublaslt
    command = [sys.executable, "-c", SCRIPT, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    status, was_done, text = json.loads(done.stdout)
    return status, was_done, text


def test_without_the_library_nothing_is_enqueued(library: Path, tmp_path: Path) -> None:
    assert in_another_process(library, "none") == (0, 0, "DIJIANG_CUBLASLT is none")
    missing = str(tmp_path / "nowhere.so")
    status, done, why = in_another_process(library, missing)
    assert (status, done) == (0, 0) and why.startswith(f"{missing}: ") and "cannot open" in why
    (tmp_path / "text.so").write_text("no library")
    assert in_another_process(library, str(tmp_path / "text.so"))[:2] == (0, 0)


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("-DNO_MATMUL", "it has no cublasLtMatmul"),
        ("-DOLD_VERSION", "it is version 10200, older than 11.0"),
        ("-DNO_ALGORITHM_FOR=8", "has no algorithm for it"),
        ("-DFAILS_TO_CREATE", "failed; got cublasStatus_t 1"),
    ],
)
def test_a_library_that_cannot(library: Path, tmp_path: Path, flag: str, why: str) -> None:
    stand_in = compiled(tmp_path / "cublaslt.so", ("tests/emulator/cublaslt.cpp",), flag)
    found = in_another_process(library, str(stand_in))
    assert found[:2] == (0, 0) and why in found[2], found


def test_what_the_process_has_already_is_taken(library: Path, tmp_path: Path) -> None:
    """As in a process where PyTorch or TensorRT has loaded its own from a folder that nobody searches."""
    flags = ("-Xlinker=-soname=libcublasLt.so.12",)
    stand_in = compiled(tmp_path / "elsewhere.so", ("tests/emulator/cublaslt.cpp",), *flags)
    loaded = f"import ctypes\nkept = ctypes.CDLL({str(stand_in)!r})\n"
    environment = {name: value for name, value in os.environ.items() if name != "DIJIANG_CUBLASLT"}
    done = subprocess.run(
        [sys.executable, "-c", loaded + SCRIPT, str(library)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    status, was_done, plan = json.loads(done.stdout)
    assert (status, was_done) == (0, 1) and "products many" in plan
