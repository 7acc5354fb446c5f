"""The plugin for arm64 in the registry of NVIDIA's real runtime, under qemu; the C++ sample on its fakes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from support.arm64 import (
    COMPILER,
    CUDA,
    FOLDER,
    HEADERS,
    SYSROOT,
    Arm,
    check_symbols,
    one_at_a_time,
    whole,
)
from support.makers.plugin_builds import run
from support.paths import ROOT

from dijiang_engines.op_contract import ATTRIBUTES
from dijiang_engines.plugin.elf import machine_of
from dijiang_engines.plugin.toolchain import read_headers

needs_headers = pytest.mark.skipif(not HEADERS, reason="TRT_INCLUDE names no TensorRT headers")
each = pytest.mark.parametrize("folder", HEADERS, ids=[h.parent.name for h in HEADERS])


@pytest.fixture(scope="module")
def built(cross_tools: None) -> Path:
    """Plugins and drivers for all headers, with CMake's toolchain file; the kernels for one architecture."""
    folder = FOLDER / "registry"
    (target,) = CUDA.glob("nvidia/cu*")
    configure: list[str | Path] = ["-S", ROOT / "plugins", "-B", folder, "-DCMAKE_CUDA_ARCHITECTURES=87-real"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'plugins/cmake/aarch64.cmake'}"]
    configure += [f"-DDIJIANG_CUDA_TARGET={target}"]
    configure += ["-DDIJIANG_BUILD_TESTS=ON", "-DDIJIANG_WARNINGS_AS_ERRORS=ON"]
    configure += ["-DTENSORRT_INCLUDE=" + ";".join(str(h.resolve()) for h in HEADERS)]
    with one_at_a_time("registry"):
        run("cmake", *configure)
        run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1))
    return folder


def plugin_of(folder: Path, built: Path) -> tuple[str, Path]:
    headers = read_headers(folder)
    assert headers is not None, f"{folder} has no TensorRT headers"
    place = built if len(HEADERS) == 1 else built / f"tensorrt-{headers}"
    return str(headers), place / f"libdijiang_tensorrt_{headers.version[0]}.so"


@needs_headers
@each
def test_the_plugin_is_for_it_and_for_older_systems(folder: Path, built: Path) -> None:
    _, plugin = plugin_of(folder, built)
    assert machine_of(plugin) == "aarch64"
    check_symbols(plugin)


@needs_headers
@each
def test_in_the_real_registry(folder: Path, built: Path, arm: Arm) -> None:
    version, plugin = plugin_of(folder, built)
    major = version.split(".")[0]
    if major == "8":
        pytest.skip("the registry of 8.6 is in the full library alone")
    found = sorted((FOLDER / "lean").glob(f"{major}.*/tensorrt_lean_libs/libnvinfer_lean.so.{major}"))
    if not found:
        pytest.skip(f"no lean runtime of TensorRT {major} for arm64 here: the whole form fetches more")
    driver = built / f"tests/registry_driver-{version}"
    command = [f"/checkout/{path.relative_to(ROOT)}" for path in (driver, found[0], plugin)]
    out = arm.run(*command)
    print(out)
    assert out.endswith("all right\n")
    fields = [line.split()[1:] for line in out.splitlines() if line.startswith("field ")]
    assert fields == [[name, kind, "1"] for name, kind in ATTRIBUTES.items()]


@whole
def test_the_cpp_sample_on_its_fakes(emulator: Arm, cross_tools: None) -> None:
    """The sample's own tests with programs for arm64, which the kernel hands to qemu."""
    variables = {
        "CXX": COMPILER, "CUDA_HOME": str(next(CUDA.glob("nvidia/cu*"))), "QEMU_LD_PREFIX": str(SYSROOT),
        "TRT_INCLUDE": ":".join(map(str, HEADERS)), "DIJIANG_ARM64": "",
    }  # fmt: skip
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0")
    plugins = ("libraries_that_are_no_plugin", "a_plugin_for_another_processor")
    tests = ["tests/samples/test_samples_cpp.py"]
    tests += [f"tests/samples/test_samples_cpp_files.py::test_{name}" for name in plugins]
    done = emulator.start(Path("/"), ROOT, *command, *tests, limit=1800, **variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout)
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    assert int(counted[1]) >= 40
