"""build-plugin --target around compilers that are fakes, and libraries for another kind of processor.

tests/arm64 compiles and runs for real.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fakes.elf_files import OTHER, archive, cuda_target, elf, static_runtime
from support.fakes.toolchain import FakeToolchain, without_tools, write_headers
from support.makers.plugin_cache import make_build

from dijiang_engines.errors import DijiangError, KernelError, PluginError, UsageError
from dijiang_engines.kernels.library import Library
from dijiang_engines.nvidia.tensorrt_library import ENVIRONMENT, find_plugin, load_plugin
from dijiang_engines.plugin import toolchain
from dijiang_engines.plugin.build import build, copy_build
from dijiang_engines.plugin.cache import (
    KERNELS,
    cache_folder,
    find_kernels_library,
    find_tensorrt_library,
    read_manifest,
)
from dijiang_engines.plugin.elf import machine_of
from dijiang_engines.plugin.requirements import BuildRequirements, find_requirements
from dijiang_export.cli import main

HERE = platform.machine()
CROSS = "aarch64-linux-gnu-g++"
on_x86 = pytest.mark.skipif(HERE != "x86_64", reason="this machine is the target, or has no cross compiler")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeToolchain:
    made = FakeToolchain(tmp_path / "tools")
    monkeypatch.setattr(toolchain, "SYSTEM", made.system)
    for name in set(os.environ) - set(without_tools()):
        monkeypatch.delenv(name)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    made.cross_compiler()
    return made


def needs(
    tools: FakeToolchain, target: str | Path, *architectures: str, **options: object
) -> BuildRequirements:
    options.setdefault("kernels_only", True)
    return find_requirements(
        architectures=architectures or ("87",), target=str(target), environment=tools.environment,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip


def failure(call: Callable[[], object], kind: type[DijiangError] = PluginError) -> DijiangError:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value


# Which kind of processor a file is for


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (elf("aarch64"), "aarch64"), (elf("x86_64"), "x86_64"), (elf("s390x", big=True), "s390x"),
        (elf(4242), "ELF machine 4242"), (static_runtime("aarch64"), "aarch64"),
        (archive(("odd/", elf("x86_64") + b"!"), ("b.o/", elf("aarch64"))), "x86_64"),
        (archive(("/", b"odd"), ("b.o/", elf("aarch64"))), "aarch64"),
        (b"", None), (b"\x7fELF", None), (b"text" * 20, None), (b"!<arch>\n", None),
        (archive(("/", b"")), None), (b"!<arch>\n" + b"x" * 60, None),
        (archive(*[("/", b"")] * 10_000), None),
    ],
)  # fmt: skip
def test_the_head_of_a_file(content: bytes, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    assert machine_of(tmp_path / "file") == expected


def test_what_is_no_file_is_for_no_processor(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert [machine_of(tmp_path / name) for name in ("pipe", "none", ".")] == [None] * 3


def test_real_files_are_for_this_processor() -> None:
    assert machine_of(Path(sys.executable).resolve()) == HERE


# Libraries for another kind of processor


def test_a_kernels_library_for_another_processor(tmp_path: Path) -> None:
    path = tmp_path / KERNELS
    path.write_bytes(elf(OTHER))
    error = failure(lambda: Library(path), KernelError)
    assert error.what == f"{path} is compiled for another kind of processor, and cannot be loaded on this one"
    assert (error.got, error.expected) == (OTHER, HERE)
    assert "build-plugin" in str(error.hint)


def test_a_plugin_for_another_processor(tmp_path: Path) -> None:
    path = tmp_path / "libdijiang_tensorrt_10.so"
    path.write_bytes(elf(OTHER))
    error = failure(lambda: load_plugin(None, path))
    assert "another kind of processor" in error.what
    assert (error.got, error.expected) == (OTHER, HERE)


def test_builds_for_another_processor_are_not_chosen(tmp_path: Path) -> None:
    make_build(tmp_path, "other", machine=OTHER)
    error = failure(lambda: find_kernels_library(90, tmp_path))
    assert error.what == "the CUDA kernels are not built"
    assert error.got == f"{KERNELS} for {OTHER}, not for {HERE}"
    error = failure(lambda: find_tensorrt_library(10, 90, tmp_path))
    assert error.got == f"libdijiang_tensorrt_10.so for {OTHER}, not for {HERE}"
    own = make_build(tmp_path, "own", made="2025-01-01T00:00:00+00:00")  # older
    assert find_kernels_library(90, tmp_path) == own / KERNELS
    assert "builds for TensorRT 10.13.3" in str(failure(lambda: find_tensorrt_library(8, 90, tmp_path)).got)


def test_a_named_folder_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(make_build(tmp_path, "other", machine=OTHER)))
    error = failure(lambda: find_plugin(10, [90]))
    assert f"sm_90, compute_90 on {OTHER}" in str(error.got)
    assert str(error.expected).endswith(f"for sm_90 on {HERE}")


def test_doctor_says_what_it_is_for(tools: FakeToolchain, capsys: pytest.CaptureFixture[str]) -> None:
    make_build(cache_folder(), "other", machine=OTHER, tensorrt=None)
    main(["doctor", "--json"])
    (built,) = json.loads(capsys.readouterr().out)["plugin"]["built"]
    assert (built["state"], built["machine"]) == ("foreign", OTHER)


# What --target names


def test_this_machines_own_processor_is_no_target(tools: FakeToolchain) -> None:
    made = needs(tools, HERE)
    assert (made.target, made.machine) == (None, HERE)
    assert (
        made.key
        == find_requirements(architectures=["87"], kernels_only=True, environment=tools.environment).key
    )


@pytest.mark.parametrize("text", ["arm", "riscv64", "/nowhere", "AARCH64", " "])
def test_an_unknown_target(text: str, tools: FakeToolchain) -> None:
    error = failure(lambda: needs(tools, text), UsageError)
    assert error.what == "--target is neither a kind of processor nor a folder"
    assert error.got == text
    assert str(error.expected).startswith("aarch64")
    assert main(["build-plugin", "--target", text, "--architecture", "87"]) == 2


@on_x86
@pytest.mark.parametrize("name", ["targets/aarch64-linux", "targets/sbsa-linux", "nvidia/cu13", "."])
def test_a_folder_with_cuda_for_it(name: str, tools: FakeToolchain, tmp_path: Path) -> None:
    folder = cuda_target(tmp_path / "cuda" / name)
    made = needs(tools, tmp_path / "cuda")
    assert made.target is not None
    assert (made.target.folder, made.target.release, made.machine) == (folder, "12.6", "aarch64")
    assert made.cxx.path == tools.bin / CROSS
    assert made.nvcc.path == tools.bin / "nvcc"


@on_x86
def test_cuda_for_it_in_the_systems_toolkit(tools: FakeToolchain) -> None:
    folder = cuda_target(tools.system / "usr/local/cuda-12.6/targets/aarch64-linux")
    cuda_target(tools.system / "usr/local/cuda-12.6/targets/x86_64-linux", "x86_64")
    made = needs(tools, "aarch64")
    assert made.target is not None
    assert made.target.folder == folder


@on_x86
def test_a_toolkit_without_cuda_for_it(tools: FakeToolchain, tmp_path: Path) -> None:
    cuda_target(tmp_path, "x86_64")
    error = failure(lambda: needs(tools, tmp_path))
    assert error.what == f"CUDA for aarch64 was not found in {tmp_path}"
    assert error.got == "libcudart_static.a for x86_64"
    assert "targets/sbsa-linux or targets/aarch64-linux" in str(error.expected)
    assert "pip install --target cuda-aarch64" in str(error.hint)
    assert "'nvidia-cuda-runtime==12.6.*'" in str(error.hint)
    assert failure(lambda: needs(tools, "aarch64")).what == "CUDA for aarch64 was not found"


@on_x86
@pytest.mark.parametrize("name", ["lib/libcudart_static.a", "include/cuda_runtime_api.h"])
def test_a_folder_without_the_runtime(name: str, tools: FakeToolchain, tmp_path: Path) -> None:
    (cuda_target(tmp_path) / name).unlink()
    assert failure(lambda: needs(tools, tmp_path)).what == f"CUDA for aarch64 was not found in {tmp_path}"


@on_x86
@pytest.mark.parametrize("name", ["crt/host_config.h", "fatbinary_section.h", "nv/target"])
def test_a_folder_in_which_a_part_is_missing(name: str, tools: FakeToolchain, tmp_path: Path) -> None:
    (cuda_target(tmp_path) / "include" / name).unlink()
    error = failure(lambda: needs(tools, tmp_path))
    assert error.what == f"CUDA for aarch64 is not whole in {tmp_path}"
    assert error.got == f"no {name} in include"


@on_x86
def test_cuda_of_another_version(tools: FakeToolchain, tmp_path: Path) -> None:
    cuda_target(tmp_path, version=13000)
    error = failure(lambda: needs(tools, tmp_path))
    assert error.what == "CUDA for aarch64 is of another version than nvcc"
    assert error.got == f"13.0 in {tmp_path}; nvcc 12.6 ({tools.bin / 'nvcc'})"
    assert "'nvidia-cuda-crt==12.6.*'" in str(error.hint)


@on_x86
def test_the_toolkits_own_nvcc_fits(tools: FakeToolchain, tmp_path: Path) -> None:
    cuda_target(tmp_path / "cuda/targets/sbsa-linux", version=13000)
    (tmp_path / "cuda/bin").mkdir()
    tools.nvcc("13.0", "87 110")
    shutil.move(tools.bin / "nvcc", tmp_path / "cuda/bin/nvcc")
    tools.nvcc()
    assert needs(tools, tmp_path / "cuda", "110").nvcc.path == tmp_path / "cuda/bin/nvcc"


@on_x86
def test_compilers_that_are_not_for_it(tools: FakeToolchain, tmp_path: Path) -> None:
    cuda_target(tmp_path)
    (tools.bin / CROSS).unlink()
    error = failure(lambda: needs(tools, tmp_path))
    assert (error.what, error.expected) == ("there is no C++ compiler for aarch64", CROSS)
    assert "apt-get install g++-aarch64-linux-gnu" in str(error.hint)
    tools.variables["CUDAHOSTCXX"] = str(tools.cross_compiler("own-g++", "aarch64-unknown-linux-gnu"))
    assert needs(tools, tmp_path).cxx.path == tools.bin / "own-g++"


@on_x86
def test_the_other_machines_gpu_must_be_named(tools: FakeToolchain, tmp_path: Path) -> None:
    cuda_target(tmp_path)
    tools.gpu("9.0")
    error = failure(lambda: find_requirements(target=str(tmp_path), environment=tools.environment))
    assert error.what == "the architecture to compile for is not known"
    assert "87 (Jetson Orin) or 110 (Jetson Thor)" in str(error.hint)


@on_x86
def test_headers_of_the_other_machines_packages_come_first(tools: FakeToolchain, tmp_path: Path) -> None:
    cuda_target(tmp_path)
    for triplet, version in (("x86_64-linux-gnu", (10, 13, 3)), ("aarch64-linux-gnu", (10, 3, 0))):
        write_headers(tools.system / "usr/include" / triplet, version)
    made = needs(tools, tmp_path, kernels_only=False)
    assert str(made.headers) == "10.3.0"


# What is made


@on_x86
def test_a_build_for_it(tools: FakeToolchain, tmp_path: Path) -> None:
    folder = cuda_target(tmp_path / "cuda")
    made = needs(tools, folder)
    logged: list[str] = []
    built = build(made, log=logged.append).built
    assert "sm_87, compute_87 on aarch64" in logged[0]
    assert built.machine == "aarch64"
    assert built.is_foreign and not built.is_current()
    calls = (tools.bin / "calls.txt").read_text()
    for define in (
        f"CMAKE_TOOLCHAIN_FILE={made.sources / 'cmake/aarch64.cmake'}", f"DIJIANG_CUDA_TARGET={folder}",
        f"DIJIANG_NVCC={tools.bin / 'nvcc'}", f"DIJIANG_CXX={tools.bin / CROSS}",
    ):  # fmt: skip
        assert f"-D{define} " in calls
    assert "CMAKE_CUDA_COMPILER" not in calls
    record = json.loads((built.folder / "plugin.json").read_text())
    assert (record["machine"], record["cuda_target"]) == ("aarch64", str(folder))
    copy_build(built, tmp_path / "copied")
    assert read_manifest(tmp_path / "copied").machine == "aarch64"


def test_a_compiler_for_another_processor_is_noticed(
    tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CMAKE", "other-processor")
    monkeypatch.setenv("FAKE_LIBRARY", elf(OTHER).hex())
    error = failure(lambda: build(needs(tools, HERE)))
    assert error.what == f"{tools.bin / 'c++'} compiled for another kind of processor"
    assert (error.got, error.expected) == (OTHER, HERE)
    assert "CUDAHOSTCXX" in str(error.hint)
    (log,) = tools.leftovers()
    assert log in str(error.hint)
    monkeypatch.setenv("FAKE_LIBRARY", elf(HERE).hex())
    assert build(needs(tools, HERE)).built.machine == HERE


@on_x86
def test_it_is_another_build_than_this_machines(tools: FakeToolchain, tmp_path: Path) -> None:
    folders = [cuda_target(tmp_path / name) for name in ("a", "b")]
    keys = {needs(tools, target).key for target in (HERE, *folders)}
    assert len(keys) == 3


@on_x86
def test_the_command_says_what_to_do_with_it(
    tools: FakeToolchain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cuda_target(tmp_path / "cuda")
    arguments = ["--kernels-only", "--architecture", "87", "--target", str(folder)]
    assert main(["build-plugin", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "for sm_87, compute_87 on aarch64, CUDA 12.6" in shown
    assert "DIJIANG_PLUGIN" in shown
    assert main(["build-plugin", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == "aarch64"


@on_x86
def test_the_toolchain_file_asks_for_cuda(tmp_path: Path) -> None:
    cmake = toolchain.find_cmake()
    if cmake is None:
        pytest.skip("no CMake")
    sources = toolchain_sources()
    done = subprocess.run(
        [cmake.path, "-S", sources, "-B", tmp_path / "b", f"-DDIJIANG_CUDA_TARGET={tmp_path}",
         f"-DCMAKE_TOOLCHAIN_FILE={sources / 'cmake/aarch64.cmake'}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"DIJIANG_CUDA_TARGET: '{tmp_path}' has no include/cuda_runtime_api.h" in " ".join(
        done.stderr.split()
    )


def toolchain_sources() -> Path:
    from dijiang_engines.plugin.cache import plugin_sources

    return plugin_sources()
