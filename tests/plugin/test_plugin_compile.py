"""The plugin's build with the real compiler: all architectures, what it exports, registers and spills."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.fakes.toolchain import write_headers
from support.makers import plugin_builds
from support.makers.plugin_builds import ROOT, needs_nvcc

from dijiang_engines.errors import PluginError
from dijiang_engines.plugin import requirements, toolchain
from dijiang_engines.plugin.build import build
from dijiang_engines.plugin.cache import KERNELS, find_kernels_library
from dijiang_engines.plugin.requirements import find_requirements
from dijiang_engines.version import __version__

# Kernels for one of the tuned head sizes have it among their template's arguments. They spill nothing, but
# for what is written here: pattern of name and architecture -> bytes (stores and loads), with a reason.
TUNED = re.compile(r"<.*\b(64|80|128|256)\b.*>")
ALLOWED_SPILLS: dict[str, int] = {
    # Before 9.0 nothing calls it; on 10.0 it is 12 bytes, and has not run there.
    r"decode::states_kernel<.*sm_(80|100)$": 24,
}
OTHERS_MAY_SPILL = 512
"""Bytes: kernels that take any head size."""


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder() -> Path:
    """Of the build of this checkout."""
    if plugin_builds.missing_tool() is not None:
        pytest.skip(f"cannot compile CUDA here: {plugin_builds.missing_tool()}")
    return plugin_builds.build_folder()


def expected_architectures() -> list[str]:
    chosen = os.environ.get("DIJIANG_TEST_ARCHITECTURES")
    if chosen:
        numbers = [name.removesuffix("-real") for name in chosen.split(";")]
    else:
        known = toolchain.find_nvccs()[0].architectures
        numbers = [str(n) for n in toolchain.TUNED_ARCHITECTURES if n in known]
    return [f"sm_{n}" for n in numbers]


def symbols(library: Path, which: str) -> set[str]:
    out = plugin_builds.run("nm", "--dynamic", f"--{which}-only", library)
    return {line.split()[-1] for line in out.splitlines() if line.strip()}


# The whole library


def test_it_is_for_all_architectures(folder: Path) -> None:
    library = ctypes.CDLL(str(folder / KERNELS))
    library.dijiang_version.restype = library.dijiang_architectures.restype = ctypes.c_char_p
    assert library.dijiang_version().decode() == __version__
    *machine_code, newest = library.dijiang_architectures().decode().split()
    assert machine_code == expected_architectures()
    assert newest == machine_code[-1].replace("sm", "compute")
    assert library.dijiang_abi_version() == 1


def test_it_exports_the_c_abi_and_nothing_else(folder: Path) -> None:
    headers = (ROOT / "plugins/include/dijiang").glob("*.h")
    text = "\n".join(re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL) for path in headers)
    declared = set(re.findall(r"DIJIANG_API[^;(]*?(dijiang_\w+)\(", text))
    assert len(declared) >= 10
    assert symbols(folder / KERNELS, "defined") == declared


def test_it_needs_no_library_of_cuda_or_tensorrt(folder: Path) -> None:
    out = plugin_builds.run("readelf", "--dynamic", folder / KERNELS)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", out)
    allowed = r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_the_report_is_of_every_kernel_and_architecture(folder: Path) -> None:
    report = json.loads((folder / "resource-report.json").read_text())
    by_kernel: dict[tuple[str, str], set[str]] = {}
    for row in report:
        by_kernel.setdefault((row["file"], row["kernel"]), set()).add(row["architecture"])
        assert 0 < row["registers"] <= 255
    assert len(by_kernel) > 5
    expected = set(expected_architectures())
    if "sm_90" in expected:
        expected.add("sm_90a")
        for name in ("hopper_", "spans_", "slices_"):
            assert {row["architecture"] for row in report if row["file"].startswith(name)} == {"sm_90a"}
    assert {row["architecture"] for row in report} == expected
    text = (folder / "resource-report.txt").read_text().splitlines()
    assert len(text) == len(report) + 1


def test_no_kernel_spills(folder: Path) -> None:
    spilling, tuned = {}, 0
    for row in json.loads((folder / "resource-report.json").read_text()):
        name = f"{row['kernel']} {row['architecture']}"
        tuned += bool(TUNED.search(name))
        default = 0 if TUNED.search(name) else OTHERS_MAY_SPILL
        allowed = max((size for p, size in ALLOWED_SPILLS.items() if re.search(p, name)), default=default)
        if row["spill_stores"] + row["spill_loads"] > allowed:
            spilling[name] = row["spill_stores"] + row["spill_loads"]
    assert spilling == {}
    assert tuned > 0


# The parts of the build


def test_the_report_reads_what_ptxas_says() -> None:
    report = load_script(ROOT / "plugins/cmake/resource_report.py")
    log = """ptxas info    : 24 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_Z1aILi64EEvPf' for 'sm_90'
ptxas info    : Function properties for _Z6helperv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z1aILi64EEvPf
    136 bytes stack frame, 120 bytes spill stores, 140 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 136 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_120'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compile time = 5.123 ms
"""
    first, second = report.read_log(log, "a.cu")
    assert first == {
        "kernel": "_Z1aILi64EEvPf", "file": "a.cu", "architecture": "sm_90", "registers": 255, "stack": 136,
        "spill_stores": 120, "spill_loads": 140, "shared": 4096,
    }  # fmt: skip
    assert (second["architecture"], second["registers"], second["spill_loads"]) == ("sm_120", 12, 0)
    assert sorted([second, first], key=report.order) == [first, second]
    full = "void dijiang::decode::(anonymous namespace)::step<__half, (int)64>(dijiang::Params)"
    assert report.short(full) == "decode::step<__half, 64>"


@pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell")
def test_the_launcher_keeps_statistics_and_shows_the_rest(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        "#!/bin/sh\necho 'ptxas info    : Used 9 registers' >&2\n"
        "echo '    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads' >&2\n"
        "echo 'a.cu(1): warning: odd' >&2\nexit 3\n"
    )
    compiler.chmod(0o755)
    launcher = ROOT / "plugins/cmake/keep_ptxas_output.sh"
    done = subprocess.run(
        ["sh", launcher, compiler, "-c", "a b.cu", "-o", tmp_path / "a b.o"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "a.cu(1): warning: odd\n")
    assert "Used 9 registers" in (tmp_path / "a b.o.ptxas").read_text()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin of one kernel, with the real build around it, and an empty cache."""
    sources = tmp_path / "engines/dijiang_engines/plugin_sources"
    for part in ("cmake", "exports", "include"):
        shutil.copytree(ROOT / "plugins" / part, sources / part)
    shutil.copy(ROOT / "plugins/CMakeLists.txt", sources)
    (sources / "kernels").mkdir()
    (sources / "kernels/one.cu").write_text(
        '#include "dijiang/kernels.h"\n'
        "__global__ void one(float* x) { x[threadIdx.x] += 1; }\n"
        'extern "C" int32_t dijiang_abi_version(void) { return 41 + DIJIANG_ABI_VERSION; }\n'
        'extern "C" DIJIANG_API void dijiang_one(float* x) { one<<<1, 32>>>(x); }\n'
        'extern "C" __attribute__((visibility("default"))) int other(void) { return 1; }\n'
    )
    monkeypatch.setattr(requirements, "plugin_sources", lambda: sources)
    monkeypatch.setattr("dijiang_engines.plugin.cache.plugin_sources", lambda: sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sources


@needs_nvcc
def test_build_plugin_compiles(small: Path) -> None:
    result = build(find_requirements(architectures=["90", "8.0"], kernels_only=True))
    assert result.built.architectures == ("sm_80", "sm_90", "compute_90")
    library = find_kernels_library(90)
    assert library == result.built.folder / KERNELS
    assert ctypes.CDLL(str(library)).dijiang_abi_version() == 42
    assert symbols(library, "defined") == {"dijiang_abi_version", "dijiang_one"}
    report = json.loads((result.built.folder / "resource-report.json").read_text())
    assert [(row["kernel"], row["architecture"]) for row in report] == [("one", "sm_80"), ("one", "sm_90")]


@needs_nvcc
def test_errors_of_the_compiler_are_shown(small: Path) -> None:
    with (small / "kernels/one.cu").open("a") as file:
        file.write("__global__ void two(float* x) { x[0] = nonsense; }\n")
    with pytest.raises(PluginError) as caught:
        build(find_requirements(architectures=["90"], kernels_only=True))
    assert "one.cu(6): error" in str(caught.value.got)
    assert "nonsense" in str(caught.value.got)
    assert "the whole log is in " in str(caught.value.hint)


@needs_nvcc
@pytest.mark.parametrize("version", [(8, 5, 3), (9, 3, 0), (10, 2, 0)])
def test_cmake_refuses_other_tensorrts(version: tuple[int, int, int], small: Path, tmp_path: Path) -> None:
    write_headers(tmp_path / "trt", version)
    done = subprocess.run(
        ["cmake", "-S", small, "-B", tmp_path / "b", f"-DTENSORRT_INCLUDE={tmp_path / 'trt'}",
         "-DDIJIANG_VERSION=0.0.0", "-DCMAKE_CUDA_ARCHITECTURES=90"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"is of TensorRT {'.'.join(map(str, version))}" in " ".join(done.stderr.split())


@needs_nvcc
def test_a_family_of_gpus_is_compiled_from_the_first_of_it(small: Path, tmp_path: Path) -> None:
    wanted = "-DCMAKE_CUDA_ARCHITECTURES=87-real;89-real;89-virtual;90"
    plugin_builds.run("cmake", "-S", small, "-B", tmp_path / "b", "-DDIJIANG_VERSION=0.0.0", wanted)
    flags = (tmp_path / "b/CMakeFiles/dijiang_objects.dir/flags.make").read_text()
    assert re.findall(r"arch=compute_(\d+),code=\[([\w,]+)\]", flags) == [
        ("87", "sm_87,sm_89"), ("89", "compute_89"), ("90", "sm_90,compute_90"),
    ]  # fmt: skip


# TensorRT's headers, where they are


def plugin_headers(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / ".ci/plugin_headers.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_plugin_headers_asks_for_headers(tmp_path: Path) -> None:
    for folders in ("", str(tmp_path)):
        done = plugin_headers(folders)
        assert done.returncode == 2
        assert "hint: make plugin-headers TRT_INCLUDE=" in done.stderr


@needs_nvcc
@pytest.mark.skipif(not os.environ.get("TRT_INCLUDE"), reason="TRT_INCLUDE names no TensorRT headers")
def test_the_plugin_compiles_against_the_headers_that_are_here() -> None:
    folders = os.environ["TRT_INCLUDE"]
    done = plugin_headers(folders)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^\d+\.\d+\.\d+ +ok ", done.stdout, re.MULTILINE)) == len(folders.split(":"))
