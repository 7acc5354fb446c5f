"""The workspace of a plan that is built without a GPU: enough wherever the plan may run, CUDA not asked.

plugins/tensorrt/attention/ahead.cpp, compiled over the kernels' library. Needs no GPU and no TensorRT.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT

from dijiang_engines.kernels import abi
from dijiang_engines.kernels.attention import Geometry, Kernels, load_kernels
from dijiang_engines.kernels.library import Device

PLUGINS = ROOT / "plugins"
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 120: 99 << 10, 121: 99 << 10}
"""Bytes of a block, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""
GPUS = {
    80: (98, 108), 86: (16, 28, 46, 82, 84), 89: (20, 24, 60, 76, 128, 142),
    120: (20, 36, 50, 70, 84, 170, 188), 121: (48,),
}  # fmt: skip
"""Multiprocessors of GPUs that are sold: A100; RTX 3050 to A6000; 4050 to 6000; 5050 to PRO 6000; GB10."""
WRAPPER = """
#include "attention/ahead.h"
#include <cstring>
extern "C" size_t anywhere(const dijiang_geometry* geometry, int batch, int length, const char* architectures,
    char* wrong) {
    size_t bytes = 0;
    using dijiang::trt::attention::workspace_anywhere;
    std::strcpy(wrong, workspace_anywhere(*geometry, batch, length, architectures, bytes).c_str());
    return bytes;
}
extern "C" int ahead() { return dijiang::trt::attention::builds_ahead(); }
"""
Anywhere = Callable[[Geometry, int, int, str], int]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def compiled(kernels_library: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "wrapper.cpp").write_text(WRAPPER)
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'tensorrt'}", str(folder / "wrapper.cpp")]
    command += [str(PLUGINS / "tensorrt/attention/ahead.cpp"), str(kernels_library), "-ldl"]
    command += [f"-Wl,-rpath,{kernels_library.parent}", "-o", str(folder / "ahead.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "ahead.so"))
    library.anywhere.restype = ctypes.c_size_t
    return library


@pytest.fixture(scope="module")
def anywhere(compiled: ctypes.CDLL) -> Anywhere:
    def call(geometry: Geometry, batch: int, length: int, architectures: str) -> int:
        wrong = ctypes.create_string_buffer(1000)
        fields = dataclasses.asdict(geometry)
        struct = abi.GeometryStruct(**(fields | {"dtype": abi.DTYPES[geometry.dtype]}))
        size = compiled.anywhere(ctypes.byref(struct), batch, length, architectures.encode(), wrong)
        if wrong.value:
            raise ValueError(wrong.value.decode())
        return int(size)

    return call


@pytest.fixture(scope="module")
def kernels(kernels_library: Path) -> Kernels:
    return load_kernels(kernels_library)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"),
    [(16, 16, 64), (12, 12, 64), (32, 32, 80), (32, 8, 128), (7, 7, 48), (4, 1, 256), (5, 5, 32)],
)
def test_it_is_enough_on_every_gpu(
    kernels: Kernels, anywhere: Anywhere, dtype: str, heads: int, kv_heads: int, d: int
) -> None:
    geometry = Geometry(heads, kv_heads, d, rotary_dim=0, dtype=dtype)
    for batch, length in ((1, 1), (8, 1), (1, 64), (1, 2048), (4, 2048), (8, 700)):
        most = anywhere(geometry, batch, length, "sm_80 compute_80")
        for capability, counts in GPUS.items():
            single = anywhere(geometry, batch, length, f"sm_{capability}")
            assert single <= most
            for count in counts:
                device = Device(capability, count, SHARED[capability])
                needs = [
                    kernels.workspace_size(geometry, b, n, device)
                    for b, n in itertools.product({1, batch}, {1, length})
                ]
                assert max(needs) <= single, (device, batch, length)


def test_some_layers_need_some(anywhere: Anywhere) -> None:
    """Or the test above would compare nothing."""
    assert anywhere(Geometry(16, 16, 64, rotary_dim=0, dtype="float32"), 1, 512, "compute_80") > 1 << 20


@pytest.mark.parametrize("architectures", ["sm_90 compute_90", "sm_86", "compute_89 sm_89", "sm_80 sm_120"])
def test_only_gpus_that_the_library_has_code_for(anywhere: Anywhere, architectures: str) -> None:
    """Machine code of one capability is not counted on elsewhere, PTX is from its own upwards."""
    geometry = Geometry(
        4, 1, 256, rotary_dim=0, dtype="float16"
    )  # what needs most where shared memory is small
    held = {
        number
        for number in SHARED
        if f"sm_{number}" in architectures
        or any(int(n[8:]) <= number for n in architectures.split() if n.startswith("compute"))
    }
    expected = max(anywhere(geometry, 4, 700, f"sm_{number}") for number in held)
    assert anywhere(geometry, 4, 700, architectures) == expected


@pytest.mark.parametrize("architectures", ["sm_87", "sm_90 sm_100 compute_121x", "", "junk"])
def test_a_library_without_any(anywhere: Anywhere, architectures: str) -> None:
    geometry = Geometry(4, 4, 64, rotary_dim=0, dtype="float16")
    if "compute_121x" in architectures:
        assert anywhere(geometry, 1, 1, architectures) >= 0  # PTX for 12.1
        return
    with pytest.raises(ValueError, match="code for none of this runtime's GPUs"):
        anywhere(geometry, 1, 1, architectures)


def test_what_the_kernels_cannot_do_is_said(anywhere: Anywhere) -> None:
    with pytest.raises(ValueError, match=r"DIJIANG_\w+: .*head_dim"):
        anywhere(Geometry(4, 4, 24, rotary_dim=0, dtype="float16"), 1, 1, "sm_89")


def test_a_process_without_tensorrt_for_rtx_does_not_build_ahead(compiled: ctypes.CDLL) -> None:
    assert compiled.ahead() == 0
