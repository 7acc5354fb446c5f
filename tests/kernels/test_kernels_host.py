"""What the kernels' library does on the host: argument checks, sizes, plans, errors; and its binding.

No GPU is needed. Addresses in these tests point nowhere: each call is refused before anything would be
launched.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels import abi, step
from dijiang_engines.kernels.attention import AttentionBuffers, Geometry, Kernels, load_kernels
from dijiang_engines.kernels.device_arrays import device_array
from dijiang_engines.kernels.library import Device
from dijiang_engines.sampling import SamplingOptions

INCLUDE = ROOT / "plugins" / "include"
H200 = Device(90, 132, 232448)
ORIN = Device(87, 16, 166912)
GEOMETRY = Geometry(4, 2, 64, rotary_dim=16, dtype="float16")
TABLES = replace(GEOMETRY, table_rows=100)
B, L = 3, 5
GIB = 1 << 30
NAMES = ("qkv", "gate", "past_state", "positions", "seq_lens", "proj", "norm_weight", "norm_bias", "inv_freq",
         "log_decay", "output", "present_state")  # fmt: skip
BUFFERS = AttentionBuffers(**{name: (index + 1) * GIB for index, name in enumerate(NAMES)})

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")


@pytest.fixture(scope="session")
def kernels(kernels_library: Path) -> Kernels:
    return load_kernels(kernels_library)


def compile_c(source: str, output: Path, *options: str) -> None:
    file = output.with_suffix(".c")
    file.write_text(source)
    command = ["gcc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}", *options]
    done = subprocess.run(
        [*command, str(file), "-o", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def refused(call: Any, *arguments: Any, **named: Any) -> KernelError:
    with pytest.raises(KernelError) as caught:
        call(*arguments, **named)
    return caught.value


# -- the headers and their ctypes twins ----------------------------------------------------------------


@needs_gcc
def test_structs_and_numbers_are_those_of_the_headers(tmp_path: Path) -> None:
    lines, expected = [], []
    for name, struct in abi.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field in struct._fields_:
            place = f"offsetof({name}, {field[0]})"
            lines.append(
                f'printf("{name}.{field[0]} %zu %zu\\n", {place}, sizeof((({name}*)0)->{field[0]}));'
            )
            offset = getattr(struct, field[0])
            expected.append(f"{name}.{field[0]} {offset.offset} {offset.size}")
    numbers = {
        "DIJIANG_ABI_VERSION": abi.ABI_VERSION, "DIJIANG_OK": abi.OK, "DIJIANG_UNSUPPORTED": abi.UNSUPPORTED,
        "DIJIANG_INVALID_ARGUMENT": abi.INVALID_ARGUMENT, "DIJIANG_CUDA_ERROR": abi.CUDA_ERROR,
        "DIJIANG_INTERNAL_ERROR": abi.INTERNAL_ERROR, "DIJIANG_ROW_OK": 0,
        "DIJIANG_ROW_NOT_FINITE": abi.ROW_STATUS.index("not finite"),
        "DIJIANG_ROW_NOTHING_ALLOWED": abi.ROW_STATUS.index("nothing allowed"),
        "DIJIANG_ROW_BAD_OPTIONS": abi.ROW_STATUS.index("bad options"),
        "DIJIANG_LINEAR_MAX_TERMS": abi.LINEAR_MAX_TERMS,
        "DIJIANG_LINEAR_MAX_OUTPUTS": abi.LINEAR_MAX_OUTPUTS,
        "DIJIANG_LINEAR_INNER_STEP": abi.LINEAR_INNER_STEP,
        "DIJIANG_STEP_MAX_ROWS": step.MAX_ROWS, "DIJIANG_STEP_MAX_LAYERS": abi.STEP_MAX_LAYERS,
        **{f"DIJIANG_STEP_{name.upper()}": number for number, name in enumerate(abi.STEP_MATRICES)},
        **{
            f"DIJIANG_{name.upper()}": number
            for name, number in (
                abi.DTYPES | abi.INTEGERS | abi.NORMS | abi.ACTIVATIONS | abi.WEIGHT_FORMATS
            ).items()
        },
    }  # fmt: skip
    for name, number in numbers.items():
        lines.append(f'printf("{name} %d\\n", (int){name});')
        expected.append(f"{name} {number}")
    body = "\n    ".join(lines)
    includes = "#include <stdio.h>\n#include <dijiang/sampling.h>\n#include <dijiang/step.h>\n"
    source = f"{includes}int main(void) {{\n    {body}\n    return 0;\n}}\n"
    compile_c(source, tmp_path / "layout")
    output = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == expected


def test_every_declared_function_is_bound() -> None:
    text = "".join(
        (INCLUDE / "dijiang" / name).read_text() for name in ("kernels.h", "sampling.h", "linear.h", "step.h")
    )
    declared = re.findall(r"^DIJIANG_API [\w ]+?[ *]+(dijiang_\w+)\(([^;]*)\);", text, re.MULTILINE)
    assert {name for name, _ in declared} == set(abi.FUNCTIONS)
    for name, parameters in declared:
        count = 0 if parameters == "void" else parameters.count(",") + 1
        assert len(abi.FUNCTIONS[name][1]) == count, name


@needs_gcc
def test_libraries_of_another_abi_are_refused(tmp_path: Path) -> None:
    compile_c("int dijiang_abi_version(void);\nint dijiang_abi_version(void) { return 99; }\n",
              tmp_path / "other.so", "-shared", "-fPIC")  # fmt: skip
    error = refused(load_kernels, tmp_path / "other.so")
    assert (error.got, error.expected) == ("version 99", f"version {abi.ABI_VERSION}")
    assert "build-plugin" in str(error.hint)
    compile_c(
        "int unrelated(void);\nint unrelated(void) { return 0; }\n", tmp_path / "any.so", "-shared", "-fPIC"
    )
    assert "is not a library of these kernels" in refused(load_kernels, tmp_path / "any.so").what
    lacking = (
        f"int dijiang_abi_version(void);\nint dijiang_abi_version(void) {{ return {abi.ABI_VERSION}; }}\n"
    )
    compile_c(lacking, tmp_path / "lacking.so", "-shared", "-fPIC")
    assert "dijiang_version" in str(refused(load_kernels, tmp_path / "lacking.so").got)
    assert "cannot load" in refused(load_kernels, tmp_path / "absent.so").what


def test_the_environment_names_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIJIANG_KERNELS", str(tmp_path / "named.so"))
    assert "named.so" in refused(load_kernels).what


def test_it_says_what_it_is(kernels: Kernels) -> None:
    assert re.fullmatch(r"\d+[\w.+]*", kernels.version)
    assert re.fullmatch(r"(sm|compute)_\d+\w?( (sm|compute)_\d+\w?)*", kernels.architectures)
    name = kernels._library.dijiang_status_name
    assert [name(status) for status in range(5)] == [
        b"DIJIANG_OK", b"DIJIANG_INVALID_ARGUMENT", b"DIJIANG_UNSUPPORTED", b"DIJIANG_CUDA_ERROR",
        b"DIJIANG_INTERNAL_ERROR",
    ]  # fmt: skip
    assert name(77) == b"unknown status"


def test_the_example_compiles(tmp_path: Path) -> None:
    """plugins/README.md: as strictly as its readers may compile it."""
    cuda = next((path for path in (Path("/usr/local/cuda/include"), Path("/usr/include")) if
                 (path / "cuda_runtime_api.h").is_file()), None)  # fmt: skip
    if cuda is None or shutil.which("g++") is None:
        pytest.skip("no CUDA headers, or no g++")
    text = (INCLUDE.parent / "README.md").read_text()
    (tmp_path / "example.cpp").write_text(text.split("```cpp\n")[1].split("```")[0])
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{INCLUDE}",
        "-isystem",
    ]
    done = subprocess.run(
        [*command, str(cuda), str(tmp_path / "example.cpp")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- attention: what is refused ------------------------------------------------------------------------

WRONG_GEOMETRY = [
    ({"num_heads": 0}, "num_heads is out of range", "0", "1 or more"),
    ({"num_heads": 257, "num_kv_heads": 1}, "num_heads is more than the kernels support", "257", "1 to 256"),
    ({"num_kv_heads": 3}, "num_kv_heads does not divide num_heads", "3", "a divisor of 4"),
    ({"num_kv_heads": 0}, "num_kv_heads does not divide num_heads", "0", "a divisor of 4"),
    ({"head_dim": 0}, "head_dim is out of range", "0", "a multiple of 16 in 16 to 256"),
    ({"head_dim": 40}, "head_dim is not one that the kernels support", "40", "a multiple of 16 in 16 to 256"),
    ({"head_dim": 272}, "head_dim is not one that the kernels", "272", "a multiple of 16 in 16 to 256"),
    ({"rotary_dim": 15}, "rotary_dim is not possible", "15", "an even number in 0 to 64 (head_dim)"),
    ({"rotary_dim": 66}, "rotary_dim is not possible", "66", "an even number in 0 to 64 (head_dim)"),
    ({"rotary_dim": -2}, "rotary_dim is not possible", "-2", "an even number in 0 to 64 (head_dim)"),
    ({"table_rows": -1}, "table_rows is out of range", "-1", "0 (geometric) or more"),
    ({"epsilon": 0.0}, "epsilon is out of range", "0", "a finite number above 0"),
    ({"epsilon": float("nan")}, "epsilon is out of range", "nan", "a finite number above 0"),
    ({"epsilon": float("inf")}, "epsilon is out of range", "inf", "a finite number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what", "got", "expected"), WRONG_GEOMETRY)
def test_geometry(kernels: Kernels, change: dict[str, Any], what: str, got: str, expected: str) -> None:
    geometry = replace(GEOMETRY, **change)
    for call in (
        lambda: kernels.attention(geometry, B, L, BUFFERS),
        lambda: kernels.workspace_size(geometry, B, L, H200),
        lambda: kernels.sync_size(geometry, B, L, H200),
        lambda: kernels.plan(geometry, B, L, H200),
    ):
        error = refused(call)
        assert what in error.what
        assert (error.got, error.expected) == (got, expected)


def test_numbers_that_the_binding_cannot_make(kernels: Kernels) -> None:
    """Through ctypes alone, as a C program might."""
    call, text = kernels._library.dijiang_attention_plan, ctypes.create_string_buffer(100)
    good = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "epsilon": 1e-5}
    device = abi.DeviceStruct(90, 132, 232448, 0)
    for change, message in (({"dtype": 3}, b"dtype is out of range; got 3"),
                            ({"reserved": 1}, b"geometry.reserved must be zero; got 1")):  # fmt: skip
        assert call(abi.GeometryStruct(**good, **change), 1, 1, device, text, 100) == abi.INVALID_ARGUMENT
        assert kernels._library.dijiang_last_error().startswith(message)
    geometry = abi.GeometryStruct(**good)
    assert call(None, 1, 1, device, text, 100) == abi.INVALID_ARGUMENT
    assert kernels._library.dijiang_last_error().startswith(b"geometry is missing; got NULL")
    assert call(geometry, 1, 1, device, None, 100) == abi.INVALID_ARGUMENT
    assert call(geometry, 1, 1, device, text, 0) == abi.INVALID_ARGUMENT
    assert kernels._library.dijiang_last_error().startswith(b"text is missing; got size 0")
    device.reserved = 5
    assert call(geometry, 1, 1, device, text, 100) == abi.INVALID_ARGUMENT
    size = kernels._library.dijiang_attention_workspace_size
    assert size(geometry, 1, 1, abi.DeviceStruct(90, 132, 232448, 0), None) == abi.INVALID_ARGUMENT
    assert kernels._library.dijiang_last_error().startswith(b"bytes is missing")
    assert kernels._library.dijiang_query_device(None) == abi.INVALID_ARGUMENT
    assert kernels._library.dijiang_attention(geometry, 1, 1, None, None) == abi.INVALID_ARGUMENT
    assert kernels._library.dijiang_last_error().startswith(b"buffers is missing; got NULL")


def test_sizes_and_devices(kernels: Kernels) -> None:
    for batch, length, what, got in (
        (-1, 1, "batch is out of range", "-1"),
        (65536, 1, "batch is more than the kernels support", "65536"),
        (1, -1, "length is out of range", "-1"),
        (1, (1 << 20) + 1, "length is more than the kernels support", str((1 << 20) + 1)),
        (4096, 1 << 20, "batch * length is more than the kernels support", str(1 << 32)),
    ):
        error = refused(kernels.workspace_size, GEOMETRY, batch, length, H200)
        assert what in error.what and error.got == got
        assert what in refused(kernels.attention, GEOMETRY, batch, length, BUFFERS).what
    error = refused(kernels.workspace_size, GEOMETRY, 1, 1, Device(75, 40, 65536))
    assert "too old" in error.what and error.got == "compute capability 7.5"
    assert kernels.architectures in str(error.expected)
    for device, what in (
        (Device(0, 132, 232448), "device.compute_capability"),
        (Device(90, 0, 232448), "device.multiprocessors"),
        (Device(90, 132, 1000), "device.shared_memory"),
    ):
        assert what in refused(kernels.plan, GEOMETRY, 1, 1, device).what


ROW, CHANNELS, STATE = 8 * 64, 4 * 64, 4 * 64 * 64  # of GEOMETRY: elements
WRONG_BUFFERS = [
    ({"qkv": 0}, "qkv is missing", "NULL", None),
    ({"present_state": 0}, "present_state is missing", "NULL", None),
    ({"gate": 2 * GIB + 8}, "gate is not aligned", "address 0x80000008", "a multiple of 16 bytes"),
    ({"positions": 4 * GIB + 2}, "positions is not aligned", "address 0x100000002", "a multiple of 4 bytes"),
    ({"workspace": GIB - 8, "workspace_size": 4}, "workspace is not aligned", None, "a multiple of 16 bytes"),
    ({"sync": GIB - 8, "sync_size": 4}, "sync is not aligned", None, "a multiple of 16 bytes"),
    ({"gain": 20 * GIB}, "gain is given without tables", "a pointer with table_rows 0", None),
    ({"read_scale": 20 * GIB}, "read_scale is given without tables", "a pointer with table_rows 0", None),
    ({"qkv_token_stride": ROW + 4}, "qkv_token_stride is not possible", str(ROW + 4), "multiple of 8 "),
    ({"gate_batch_stride": -8}, "gate_batch_stride is not possible", "-8", "0 (dense)"),
    ({"output_batch_stride": 1 << 50}, "output_batch_stride is not possible", str(1 << 50), "below 2^40"),
    ({"past_batch_stride": STATE + 2}, "past_batch_stride is not possible", None, "multiple of 4 elements"),
    ({"present_batch_stride": STATE - 4}, "strides of present let its rows overlap", None, None),
    ({"qkv_token_stride": ROW - 8}, "strides of qkv let its rows overlap", None, None),
    ({"output_batch_stride": 4 * CHANNELS}, "strides of output let its rows overlap", None, None),
    ({"output": BUFFERS.gate}, "output overlaps gate", None, "memory of its own"),
    ({"output": BUFFERS.qkv + 2 * B * L * ROW - 16}, "output overlaps qkv", None, "memory of its own"),
    ({"output": BUFFERS.past_state}, "output overlaps past_state", None, None),
    ({"output": BUFFERS.seq_lens - 16}, "output overlaps seq_lens", None, None),
    ({"present_state": BUFFERS.norm_bias}, "present_state overlaps norm_bias", None, None),
    ({"present_state": BUFFERS.output - 16}, "output overlaps present_state", None, None),
    ({"present_state": BUFFERS.past_state + 16}, "present_state overlaps past_state partly", None,
     "past_state itself"),
    ({"present_state": BUFFERS.past_state, "present_batch_stride": 2 * STATE},
     "present_state is past_state with another stride", f"{2 * STATE} and {STATE} elements", "equal strides"),
    ({"workspace": BUFFERS.proj - 16, "workspace_size": 32}, "workspace overlaps proj", None, None),
    ({"sync": BUFFERS.past_state, "sync_size": 64}, "sync overlaps past_state", None, None),
    ({"workspace": 30 * GIB, "workspace_size": 64, "sync": 30 * GIB + 48, "sync_size": 64},
     "sync overlaps workspace", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what", "got", "expected"), WRONG_BUFFERS)
def test_buffers(
    kernels: Kernels, change: dict[str, int], what: str, got: str | None, expected: str | None
) -> None:
    error = refused(kernels.attention, GEOMETRY, B, L, replace(BUFFERS, **change))
    assert what in error.what
    if got is not None:
        assert error.got == got
    if expected is not None:
        assert expected in str(error.expected)


def test_tables_need_both(kernels: Kernels) -> None:
    assert "gain is missing" in refused(kernels.attention, TABLES, B, L, BUFFERS).what
    gain = replace(BUFFERS, gain=20 * GIB)
    assert "read_scale is missing" in refused(kernels.attention, TABLES, B, L, gain).what


PACKED = 6 * CHANNELS  # columns of one matrix: qkv, gate and output side by side
ACCEPTED = [
    {},
    {"present_state": BUFFERS.past_state},
    {"present_state": BUFFERS.past_state, "past_batch_stride": 2 * STATE, "present_batch_stride": 2 * STATE},
    # Two states of each row side by side, and one right behind the other.
    {"present_state": BUFFERS.past_state + 4 * STATE, "past_batch_stride": 2 * STATE,
     "present_batch_stride": 2 * STATE},
    {"present_state": BUFFERS.past_state + 4 * STATE * B},
    # qkv, gate and output as columns of one matrix.
    {"gate": GIB + 2 * ROW, "output": GIB + 2 * (ROW + CHANNELS),
     **{f"{name}_token_stride": PACKED for name in ("qkv", "gate", "output")}},
    # [L, B, ..]
    {"qkv_batch_stride": ROW, "qkv_token_stride": B * ROW},
    {"workspace": 30 * GIB, "workspace_size": 64, "sync": 30 * GIB + 64, "sync_size": 64},
]  # fmt: skip


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_is_right_reaches_the_gpu(kernels: Kernels, change: dict[str, int]) -> None:
    """There is nothing left to refuse but the absence of a GPU."""
    try:
        kernels.query_device()
    except KernelError as error:
        absence = error.what.split(": ")[1]
    else:
        pytest.skip("there is a GPU, and these addresses point nowhere")
    assert absence in refused(kernels.attention, GEOMETRY, B, L, replace(BUFFERS, **change)).what


def test_empty_calls(kernels: Kernels) -> None:
    nothing = AttentionBuffers(**dict.fromkeys(NAMES, 0))
    kernels.attention(GEOMETRY, 0, 5, nothing)
    states = {"past_state": GIB, "present_state": GIB}
    kernels.attention(GEOMETRY, 3, 0, replace(nothing, **states))  # in place: nothing to copy
    assert "past_state is missing" in refused(kernels.attention, GEOMETRY, 3, 0, nothing).what
    shifted = replace(nothing, **states | {"present_state": GIB + 16})
    assert "overlaps past_state partly" in refused(kernels.attention, GEOMETRY, 3, 0, shifted).what
    assert kernels.workspace_size(GEOMETRY, 0, 5, H200) == kernels.sync_size(GEOMETRY, 3, 0, H200) == 0
    assert kernels.plan(GEOMETRY, 0, 5, H200) == "nothing to do"
    assert kernels.plan(GEOMETRY, 5, 0, H200) == "copy of the states"


# -- attention: sizes and plans ------------------------------------------------------------------------

DEVICES = st.sampled_from(
    [H200, ORIN, Device(80, 108, 166912), Device(89, 128, 101376), Device(100, 148, 232448),
     Device(110, 20, 232448), Device(120, 170, 101376), Device(90, 16, 232448)]
)  # fmt: skip


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    kv_heads = draw(st.integers(1, 16))
    d = 16 * draw(st.integers(1, 16))
    return Geometry(
        kv_heads * draw(st.integers(1, 16)), kv_heads, d, 2 * draw(st.integers(0, d // 2)),
        draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        table_rows=draw(st.sampled_from([0, 1, 2048])),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    geometries(),
    st.integers(1, 300),
    st.integers(1, 4096),
    st.integers(0, 300),
    st.integers(0, 4096),
    DEVICES,
)
def test_sizes_suffice_for_every_smaller_call(
    kernels: Kernels, geometry: Geometry, batch: int, length: int, more: int, longer: int, device: Device
) -> None:
    for size in (kernels.workspace_size, kernels.sync_size):
        assert size(geometry, batch, length, device) <= size(geometry, batch + more, length + longer, device)
        assert size(geometry, batch, 1, device) <= size(geometry, batch, length, device)
    for tokens, family in ((1, "decode"), (1 + length, "prefill")):
        plan = kernels.plan(geometry, batch, tokens, device)
        assert plan.startswith(family) and "\n" not in plan


def test_heads_have_blocks_of_their_own(kernels: Kernels) -> None:
    """Where a head size has the kernel and GroupNorm's groups allow it, with few rows and with many."""

    def plan(heads: int, d: int, batch: int, dtype: Any = "float16") -> str:
        return kernels.plan(Geometry(heads, heads, d, dtype=dtype), batch, 1, H200)

    if "sm_90" not in kernels.architectures:  # as a Jetson's library, compiled for 8.7 alone
        assert plan(16, 64, 256).startswith("decode stream")
        return
    of_64 = "decode heads splits=1 heads=1 ctas=4096 threads=128 memory=19456"
    assert plan(16, 64, 256) == plan(16, 64, 256, "bfloat16") == of_64
    assert plan(32, 80, 64) == "decode heads splits=1 heads=2 ctas=1024 threads=320 memory=64000"
    assert plan(32, 128, 64) == "decode heads splits=2 heads=1 ctas=4096 threads=128 memory=36880"
    assert plan(8, 256, 64) == "decode heads splits=8 heads=1 ctas=4096 threads=128 memory=35856"
    assert plan(12, 64, 8) == "decode heads splits=1 heads=3 ctas=32 threads=384 memory=58368"
    # Blocks that all find a place, but not twice, are kept apart: two, four, five in a multiprocessor.
    assert plan(32, 80, 16) == "decode heads splits=1 heads=2 ctas=256 threads=320 memory=115712"
    assert plan(8, 256, 8) == "decode heads splits=8 heads=1 ctas=512 threads=128 memory=57344"
    assert plan(16, 64, 40) == "decode heads splits=1 heads=1 ctas=640 threads=128 memory=45664"
    assert plan(16, 64, 64).split()[-1] == plan(16, 64, 24).split()[-1] == "memory=19456"
    others = (plan(16, 64, 256, "float32"), plan(5, 64, 8), plan(40, 128, 256), plan(12, 256, 256))
    assert all(other.startswith("decode slice") for other in others)
    assert plan(16, 96, 256).startswith("decode stream")
    assert kernels.workspace_size(Geometry(32, 4, 64, dtype="bfloat16"), 100, 1, H200) == 0


def test_hopper_s_own_prefill(kernels: Kernels) -> None:
    """Where its code is in the library: compute capability 9.0, geometric decay, whole groups in a block."""

    def family(heads: int, d: int, batch: int = 1, device: Device = H200, **more: Any) -> str:
        geometry = Geometry(heads, heads, d, **({"rotary_dim": 16, "dtype": "bfloat16"} | more))
        return kernels.plan(geometry, batch, 2048, device).split()[1]

    if "sm_90" not in kernels.architectures:
        assert family(16, 64) == family(32, 128) == family(32, 80, 8) == "fused"
        assert family(8, 256) == "wide"
        return
    assert family(16, 64) == family(8, 64, 300) == "spans"
    assert family(32, 128) == family(32, 80, 8) == "hopper"
    assert family(32, 80) == family(32, 80, 4) == family(12, 64) == family(16, 96) == "fused"
    assert (
        family(16, 64, device=ORIN) == family(16, 64, table_rows=9) == family(16, 64, rotary_dim=6) == "fused"
    )
    assert family(16, 64, device=replace(H200, compute_capability=100)) == "fused"
    assert family(16, 64, device=replace(H200, shared_memory=99 << 10)) == "fused"
    assert family(8, 256) == family(32, 256) == family(16, 256, 8) == "slices"
    assert family(12, 256) == family(8, 256, rotary_dim=6) == family(8, 256, table_rows=9) == "wide"
    assert family(8, 256, device=replace(H200, compute_capability=100)) == "wide"
    assert family(16, 64, dtype="float32") == family(8, 256, dtype="float32") == "generic"


def test_heads_of_256_are_cut_in_slices(kernels: Kernels) -> None:
    """Four blocks a head, a cluster; as many segments of one row as fill the GPU; the features' memory."""
    geometry = Geometry(8, 4, 256, rotary_dim=64, dtype="float16")

    def plan(batch: int, length: int) -> str:
        return kernels.plan(geometry, batch, length, H200)

    if "sm_90" not in kernels.architectures:
        assert plan(1, 2048).startswith("prefill wide")
        return
    assert plan(1, 2048) == "prefill slices heads=1 segments=4x512 ctas=128 threads=384 shared=0"
    assert plan(1, 500) == "prefill slices heads=1 segments=4x128 ctas=128 threads=384 shared=0"
    assert plan(8, 2048) == "prefill slices heads=1 segments=1x2048 ctas=256 threads=384 shared=0"
    items, slots = 8 * 32 * 64 * 2 * (2 * 256 + 64), 128 * 4 * 64 * 256
    assert kernels.workspace_size(geometry, 1, 2048, H200) == items + slots
    assert kernels.sync_size(geometry, 1, 2048, H200) == 4 * (2 + 128)


@pytest.mark.parametrize(("heads", "d"), [(16, 64), (32, 80), (32, 128), (8, 256)])
def test_sizes_of_hopper_s_prefill_never_shrink(kernels: Kernels, heads: int, d: int) -> None:
    geometry = Geometry(heads, heads, d, rotary_dim=16, dtype="float16")
    for size in (kernels.workspace_size, kernels.sync_size):
        found = [
            [size(geometry, b, length, H200) for length in (2, 64, 65, 300, 2048, 9000)] for b in range(1, 12)
        ]
        assert all(row == sorted(row) for row in found)
        assert all(list(column) == sorted(column) for column in zip(*found, strict=True))


def test_plans_are_cut_to_what_there_is(kernels: Kernels) -> None:
    text = ctypes.create_string_buffer(b"x" * 20)
    geometry = abi.GeometryStruct(4, 4, 64, 0, 1, 0, 1e-5, 0)
    device = abi.DeviceStruct(90, 132, 232448, 0)
    assert kernels._library.dijiang_attention_plan(geometry, 1, 1, device, text, 7) == abi.OK
    assert text.raw[:8] == b"decode\0x"


# -- errors --------------------------------------------------------------------------------------------


def test_each_thread_has_its_own_last_error(kernels: Kernels) -> None:
    wrong: list[str] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        geometry = replace(GEOMETRY, head_dim=1000 + number)
        barrier.wait()
        for _ in range(500):
            error = refused(kernels.workspace_size, geometry, 1, 1, H200)
            if error.got != str(1000 + number):
                wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_success_forgets_the_error(kernels: Kernels) -> None:
    refused(kernels.plan, replace(GEOMETRY, head_dim=1), 1, 1, H200)
    assert kernels._library.dijiang_last_error() != b""
    kernels.plan(GEOMETRY, 1, 1, H200)
    assert kernels._library.dijiang_last_error() == b""


# -- sampling ------------------------------------------------------------------------------------------


def test_sampling_options_and_buffers(kernels: Kernels) -> None:
    library = kernels._library
    good_options = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    good = {
        "logits": GIB,
        "tokens": 2 * GIB,
        "row_status": 3 * GIB,
        "draws": 4 * GIB,
        "batch": 2,
        "vocabulary": 40,
    }
    nan = float("nan")
    for options, buffers, message in (
        ({"temperature": -1.0}, {}, "temperature is out of range; got -1; expected 0 or more"),
        ({"temperature": nan}, {}, "temperature is out of range; got nan"),
        ({"top_k": -1}, {}, "top_k is out of range; got -1; expected 0 (all) or more"),
        ({"top_p": 0.0}, {}, "top_p is out of range; got 0; expected above 0, at most 1 (all)"),
        ({"top_p": 1.5}, {}, "top_p is out of range; got 1.5"),
        ({"min_p": -0.1}, {}, "min_p is out of range; got -0.1; expected 0 (all) to 1"),
        ({"repetition_penalty": 0.0}, {}, "repetition_penalty is out of range; got 0; expected above 0"),
        ({"reserved": 1}, {}, "options.reserved is out of range; got 1; expected 0"),
        ({}, {"reserved": 1}, "buffers.reserved is out of range; got 1; expected 0"),
        ({}, {"batch": -1}, "batch is out of range; got -1"),
        ({}, {"vocabulary": 0}, "vocabulary is out of range; got 0; expected 1 or more"),
        ({}, {"vocabulary": 1 << 25}, "vocabulary is more than the kernels support"),
        ({}, {"integers": 2}, "integers is out of range; got 2; expected 0 (int32) or 1 (int64)"),
        ({}, {"logits": 0}, "logits is missing; got NULL"),
        ({}, {"draws": 0}, "draws is missing; got NULL"),
        ({}, {"draws": GIB + 4}, "draws is not aligned"),
        ({}, {"integers": 1, "tokens": 2 * GIB + 4}, "tokens is not aligned"),
        (
            {},
            {"logits_row_stride": 39},
            "logits_row_stride is not possible; got 39; expected 0, or 40 or more",
        ),
        ({}, {"allowed": 5 * GIB, "allowed_row_stride": 1}, "allowed_row_stride is not possible; got 1"),
        ({}, {"tokens": GIB + 316}, "tokens overlaps logits"),
        ({}, {"row_status": 4 * GIB + 8}, "row_status overlaps draws"),
    ):
        call = abi.SampleBuffersStruct(**good | buffers)
        status = library.dijiang_sample(abi.SamplingOptionsStruct(**good_options | options), call, None)
        assert status in (abi.INVALID_ARGUMENT, abi.UNSUPPORTED)
        assert library.dijiang_last_error().decode().startswith(message)
    assert library.dijiang_sample(None, abi.SampleBuffersStruct(**good), None) == abi.INVALID_ARGUMENT
    assert (
        library.dijiang_sample(abi.SamplingOptionsStruct(**good_options), None, None) == abi.INVALID_ARGUMENT
    )
    empty = abi.SampleBuffersStruct(vocabulary=40)
    assert library.dijiang_sample(abi.SamplingOptionsStruct(**good_options), empty, None) == abi.OK


def test_advance_buffers(kernels: Kernels) -> None:
    library = kernels._library
    good = {"tokens": GIB, "finished": 2 * GIB, "batch": 2, "vocabulary": 40}
    for change, message in (
        ({"tokens": 0}, "tokens is missing"),
        ({"finished": 0}, "finished is missing"),
        ({"positions": 3 * GIB}, "seq_lens is missing"),
        ({"history": 3 * GIB, "history_max": 4}, "history_lens is missing"),
        ({"history": 3 * GIB, "history_lens": 4 * GIB}, "history_max is out of range; got 0 with history"),
        ({"stop_count": 2}, "stop_ids is missing"),
        ({"stop_count": -2}, "stop_count is out of range; got -2"),
        ({"history_max": -2}, "history_max is out of range; got -2"),
        ({"input_ids": GIB + 4}, "input_ids overlaps tokens"),
        ({"active": 2 * GIB + 4}, "active overlaps finished"),
        ({"history": 3 * GIB, "history_lens": 4 * GIB, "history_max": 4, "history_row_stride": 3},
         "history_row_stride is not possible; got 3; expected 0, or 4 or more"),
    ):  # fmt: skip
        assert (
            library.dijiang_advance(abi.AdvanceBuffersStruct(**good | change), None) == abi.INVALID_ARGUMENT
        )
        assert library.dijiang_last_error().decode().startswith(message)
    assert library.dijiang_advance(None, None) == abi.INVALID_ARGUMENT
    assert library.dijiang_advance(abi.AdvanceBuffersStruct(vocabulary=1), None) == abi.OK


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1 << 24), DEVICES)
def test_sample_plans_cover_the_vocabulary(
    kernels: Kernels, batch: int, vocabulary: int, device: Device
) -> None:
    plan = kernels.sample_plan(batch, vocabulary, device)
    found = re.fullmatch(r"sample threads=(\d+) team=(\d+) ctas=(\d+) ids_per_warp=(\d+) staged=(\d+)", plan)
    assert found is not None, plan
    threads, team, ctas, per_warp, staged = map(int, found.groups())
    assert threads in (512, 1024) and (threads == 1024 or device.compute_capability >= 90)
    assert team in (1, 2, 4, 8) and (team == 1 or device.compute_capability >= 90)
    assert ctas == team * batch and (team == 1 or ctas <= device.multiprocessors)
    assert per_warp % 32 == 0 and team * threads // 32 * per_warp >= vocabulary
    assert staged in (0, threads // 8 * per_warp) and staged < max(device.shared_memory - 88_000, 1)


# -- arrays --------------------------------------------------------------------------------------------


class FakeArray:
    """What CuPy shows of an array."""

    def __init__(self, typestr: str, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {
            "typestr": typestr, "shape": shape, "strides": strides, "data": (GIB, False), "version": 3,
        }  # fmt: skip


def test_arrays_say_what_they_are() -> None:
    array = device_array("x", FakeArray("<f2", (2, 3, 8), (96, 32, 2)))
    assert (array.pointer, array.dtype, array.shape) == (GIB, "float16", (2, 3, 8))
    assert array.strides == (48, 16, 1) and array.stride(1) == 16 and array.bytes() == 96
    array.require(["float16"], [2, 3, 8], 2)
    assert "not dense" in refused(array.require, ["float16"], [2, 3, 8]).what
    error = refused(array.require, ["float32"], [2, 3, 8], 2)
    assert (error.got, error.expected) == ("float16", "float32")
    assert refused(array.require, ["float16"], [2, 8], 1).got == "[2, 3, 8]"
    dense = device_array("x", FakeArray("<i8", (4, 5)))
    assert dense.strides == (5, 1)
    dense.require(["uint64"], [4, 5])  # signed stands for unsigned
    assert device_array("x", FakeArray("<f4", (1, 7), (4000, 4))).stride(0) == 0
    assert device_array("x", None).pointer == 0
    assert not device_array("x", 64).known
    for host in (np.zeros(3), [1], 2.5):
        assert "x is not in GPU memory" in refused(device_array, "x", host).what
    torch = pytest.importorskip("torch")
    error = refused(device_array, "x", torch.zeros(3))
    assert error.got == "a tensor on cpu"


def test_attention_checks_arrays(kernels: Kernels) -> None:
    good: dict[str, Any] = {
        "qkv": FakeArray("<f2", (B, L, ROW)), "gate": FakeArray("<f2", (B, L, CHANNELS)),
        "past_state": FakeArray("<f4", (B, 4, 64, 64)), "positions": FakeArray("<i4", (B,)),
        "seq_lens": FakeArray("<i4", (B,)), "proj": FakeArray("<f4", (64, 64)),
        "norm_weight": FakeArray("<f4", (256,)), "norm_bias": FakeArray("<f4", (256,)),
        "inv_freq": FakeArray("<f4", (8,)), "log_decay": FakeArray("<f4", (4,)),
        "output": FakeArray("<f2", (B, L, CHANNELS)), "present_state": FakeArray("<f4", (B, 4, 64, 64)),
    }  # fmt: skip
    for name, wrong, what in (
        ("qkv", FakeArray("<f4", (B, L, ROW)), "qkv has the wrong type"),
        ("gate", FakeArray("<f2", (B, L, ROW)), "gate has the wrong shape"),
        ("output", FakeArray("<f2", (B, L, CHANNELS), (2, 2 * B, 2 * B * L)), "output is not dense"),
        ("past_state", FakeArray("<f4", (B, 4, 64, 64), (65536, 4, 256, 16)), "past_state is not dense"),
        ("positions", FakeArray("<i8", (B,)), "positions has the wrong type"),
        ("log_decay", FakeArray("<f4", (9, 4)), "log_decay has the wrong shape"),
        ("inv_freq", FakeArray("<f4", (16,)), "inv_freq has the wrong shape"),
        ("qkv", GIB, "qkv does not say how large it is"),
    ):
        assert what in refused(kernels.attention_tensors, GEOMETRY, **good | {name: wrong}).what
    # All of them lie at one address: what the arrays say passes, and the library finds that.
    assert "overlaps" in refused(kernels.attention_tensors, GEOMETRY, **good).what
    assert "draws is missing" in refused(
        kernels.sample, SamplingOptions(1.0), logits=FakeArray("<f4", (2, 9)), tokens=FakeArray("<i8", (2,)),
        row_status=FakeArray("<i4", (2,)),
    ).what  # fmt: skip
