"""build-plugin around its compilers, which are fakes here: what it finds, wants, keeps, and leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fakes.toolchain import FakeToolchain, without_tools, write_headers

from dijiang_engines.errors import DijiangError, OutputError, PluginError, UsageError
from dijiang_engines.plugin import requirements, toolchain
from dijiang_engines.plugin.build import build, copy_build
from dijiang_engines.plugin.cache import KERNELS, find_tensorrt_library, library_hash, read_manifest
from dijiang_engines.plugin.requirements import BuildRequirements, find_requirements, parse_architecture
from dijiang_export.cli import main


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeToolchain:
    made = FakeToolchain(tmp_path / "tools")
    monkeypatch.setattr(toolchain, "SYSTEM", made.system)
    monkeypatch.setattr(toolchain, "find_gpus", lambda: ())
    monkeypatch.setattr(toolchain, "_ask_driver", lambda: [])
    for name in set(os.environ) - set(without_tools()):
        monkeypatch.delenv(name)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def needs(tools: FakeToolchain, *architectures: str, **options: object) -> BuildRequirements:
    options.setdefault("kernels_only", True)
    return find_requirements(
        architectures=architectures or ("90",),
        environment=tools.environment,
        **options,  # type: ignore[arg-type]
    )


def failure(call: Callable[[], object], kind: type[DijiangError] = PluginError) -> DijiangError:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return caught.value


# What is found


def test_the_requirements_name_what_was_found(tools: FakeToolchain) -> None:
    tools.headers((8, 6, 1))
    made = needs(tools, "sm_90", "8.7", "87", kernels_only=False)
    assert made.architectures == (87, 90)
    assert made.architecture_names == ("sm_87", "sm_90", "compute_90")
    assert (made.nvcc.path, made.nvcc.release) == (tools.bin / "nvcc", "12.6")
    assert made.cxx.path == tools.bin / "c++"
    assert made.headers is not None
    assert made.headers.version == (8, 6, 1)
    assert made.libraries == [KERNELS, "libdijiang_tensorrt_8.so"]
    assert needs(tools, "all").architectures == (80, 87, 89, 90)


@pytest.mark.parametrize(("text", "number"), [("87", 87), ("sm_120", 120), ("8.7", 87), ("10.0", 100)])
def test_architectures_are_read(text: str, number: int) -> None:
    assert parse_architecture(text) == number


@pytest.mark.parametrize("text", ["", "volta", "sm_75", "7.2", "90x", "1000"])
def test_other_architectures_are_refused(text: str) -> None:
    assert "sm_8" in str(failure(lambda: parse_architecture(text), UsageError).expected)


def test_no_nvcc(tools: FakeToolchain) -> None:
    (tools.bin / "nvcc").unlink()
    error = failure(lambda: needs(tools))
    assert "nvcc was not found" in error.what
    assert "CUDA_HOME" in str(error.hint)


def test_an_old_nvcc(tools: FakeToolchain) -> None:
    tools.nvcc("11.4", "80 86 87")
    error = failure(lambda: needs(tools, "87"))
    assert error.what == "nvcc is too old"
    assert "CUDA 11.4" in str(error.got)
    assert "12.0" in str(error.expected)


def test_an_architecture_that_nvcc_does_not_know(tools: FakeToolchain) -> None:
    error = failure(lambda: needs(tools, "87", "120"))
    assert error.what == "nvcc does not know the architecture sm_120"
    assert "which knows sm_80, sm_87, sm_89, sm_90" in str(error.got)
    assert error.hint == "CUDA 12.8 or newer knows sm_120"


def test_a_second_toolkit_that_knows_it_is_taken(tools: FakeToolchain) -> None:
    newer = tools.system / "usr/local/cuda-13.0/bin/nvcc"
    newer.parent.mkdir(parents=True)
    tools.nvcc("13.0", "80 87 90 120")
    shutil.move(tools.bin / "nvcc", newer)
    tools.nvcc()
    assert needs(tools, "120").nvcc.path == newer
    assert needs(tools, "90").nvcc.path == tools.bin / "nvcc"


def test_no_gpu_and_none_named(tools: FakeToolchain) -> None:
    error = failure(lambda: find_requirements(kernels_only=True, environment=tools.environment))
    assert "no NVIDIA GPU" in str(error.got)
    assert "--architecture" in str(error.hint)


@pytest.mark.parametrize(
    ("model", "expected"), [("NVIDIA Jetson AGX Orin Developer Kit\0", (87,)), ("Raspberry Pi 5\0", ())]
)
def test_the_board_tells_where_no_driver_does(
    model: str, expected: tuple[int, ...], tools: FakeToolchain
) -> None:
    tree = tools.system / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "model").write_text(model)
    assert toolchain.find_architectures() == expected


def test_gpus_come_from_the_driver(tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_ask_driver", lambda: [90, 90, 89])
    assert find_requirements(kernels_only=True, environment=tools.environment).architectures == (89, 90)
    monkeypatch.setattr(toolchain, "_ask_driver", lambda: [75])
    error = failure(lambda: find_requirements(kernels_only=True, environment=tools.environment))
    assert "sm_75" in str(error.got)


@pytest.mark.parametrize("version", [None, "3.16.3"])
def test_no_cmake_or_an_old_one(
    version: str | None, tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is None:
        (tools.bin / "cmake").unlink()
    else:
        tools.cmake(version)
    monkeypatch.setattr(sys, "executable", str(tools.bin / "python"))  # none beside Python either
    error = failure(lambda: needs(tools))
    assert error.what == ("CMake was not found" if version is None else "CMake is too old")
    assert error.expected == "3.22 or newer"
    assert "pip install cmake" in str(error.hint)


def test_pips_toolkit_is_taken_where_there_is_no_other(
    tools: FakeToolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "site/nvidia/cu13"
    (root / "bin").mkdir(parents=True)
    shutil.move(tools.bin / "nvcc", root / "bin/nvcc")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    failure(lambda: needs(tools))  # a compiler without the runtime's headers
    for name in ("include/cuda_runtime.h", "lib/libcudart_static.a"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    monkeypatch.setenv("LIBRARY_PATH", "/mine")
    nvcc = needs(tools).nvcc
    assert nvcc.path == root / "bin/nvcc"
    assert nvcc.environment == {"LIBRARY_PATH": f"{root / 'lib'}:/mine"}
    (root / "lib64").mkdir()
    assert nvcc.environment == {}


@pytest.mark.parametrize(("name", "what"), [("c++", "C++ compiler"), ("make", "neither make nor ninja")])
def test_no_compiler_or_no_make(
    name: str, what: str, tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tools.bin / name).unlink()
    monkeypatch.setattr(sys, "executable", str(tools.bin / "python"))
    assert what in failure(lambda: needs(tools)).what


def test_no_headers(tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch) -> None:
    error = failure(lambda: needs(tools, kernels_only=False))
    assert error.got is None
    assert "--kernels-only" in str(error.hint)
    monkeypatch.setattr(toolchain, "package_version", {"tensorrt": "10.13.3"}.get)
    error = failure(lambda: needs(tools, kernels_only=False))
    assert "pip's tensorrt 10.13.3" in str(error.got)
    assert "no headers" in str(error.got)


@pytest.mark.parametrize("version", [(8, 5, 3), (9, 1, 0), (10, 2, 0)])
def test_headers_of_another_tensorrt(version: tuple[int, int, int], tools: FakeToolchain) -> None:
    tools.headers(version)
    error = failure(lambda: needs(tools, kernels_only=False))
    assert ".".join(map(str, version)) in str(error.got)
    assert error.expected == "8.6, or 10.3 and newer"


@pytest.mark.parametrize("version", [(8, 6, 1), (10, 3, 0), (10, 13, 3), (11, 1, 0)])
def test_headers_that_are_named(version: tuple[int, int, int], tools: FakeToolchain, tmp_path: Path) -> None:
    write_headers(tmp_path / "trt/include", version)
    for folder in (tmp_path / "trt", tmp_path / "trt/include"):
        made = needs(tools, kernels_only=False, tensorrt_include=folder)
        assert made.headers == toolchain.Headers(tmp_path / "trt/include", version)
    error = failure(lambda: needs(tools, kernels_only=False, tensorrt_include=tmp_path))
    assert "NvInfer.h" in str(error.expected)
    failure(lambda: needs(tools, kernels_only=True, tensorrt_include=tmp_path), UsageError)


OLD_ORDER = ("loadLibrary", "deregisterCreator")


@pytest.mark.parametrize(
    ("version", "order", "fits"),
    [((8, 6, 0), OLD_ORDER, True), ((8, 6, 1), OLD_ORDER[::-1], True), ((8, 6, 0), OLD_ORDER[::-1], False),
     ((8, 6, 2), OLD_ORDER, False)],
)  # fmt: skip
def test_headers_with_another_number_in_them(
    version: tuple[int, int, int], order: tuple[str, str], fits: bool, tools: FakeToolchain, tmp_path: Path
) -> None:
    """8.6.0's plugin registry has its functions in another order: a plugin compiled so ends its process."""
    folder = tmp_path / "include"
    write_headers(folder, version)
    lines = [f"    virtual void {name}(int what) noexcept = 0;" for name in order]
    (folder / "NvInferRuntimeCommon.h").write_text("\n".join(["class IPluginRegistry {", *lines, "};"]))
    if fits:
        assert needs(tools, kernels_only=False, tensorrt_include=folder).headers.version == version
        return
    error = failure(lambda: needs(tools, kernels_only=False, tensorrt_include=folder))
    assert "another TensorRT's than their number says" in error.what and str(folder) in str(error.got)


# What is made and kept


def test_a_build_and_its_manifest(tools: FakeToolchain) -> None:
    tools.headers()
    made = needs(tools, "87", "90", kernels_only=False)
    logged: list[str] = []
    result = build(made, jobs=3, log=logged.append)
    assert not result.reused
    assert result.built.folder == tools.cache / "dijiang-export/plugin" / made.key
    assert sorted(p.name for p in result.built.folder.iterdir()) == [
        "libdijiang_kernels.so", "libdijiang_tensorrt_10.so", "plugin.json", "resource-report.txt",
    ]  # fmt: skip
    assert result.built.architectures == ("sm_87", "sm_90", "compute_90")
    assert (result.built.tensorrt, result.built.tensorrt_major, result.built.cuda) == ("10.13.3", 10, "12.6")
    assert result.built.is_current()
    assert result.built.libraries[KERNELS] == library_hash(result.built.folder / KERNELS)
    assert find_tensorrt_library(10) == result.built.folder / "libdijiang_tensorrt_10.so"
    assert "sm_87, sm_90, compute_90" in logged[0]
    calls = (tools.bin / "calls.txt").read_text()
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real;90 " in calls
    assert f"-DCMAKE_CUDA_COMPILER={tools.bin / 'nvcc'}" in calls
    assert "--parallel 3" in calls
    assert tools.leftovers() == []


def test_a_second_build_is_the_first(tools: FakeToolchain) -> None:
    first, second = build(needs(tools)), build(needs(tools))
    assert (tools.compiled, second.reused, second.built) == (1, True, first.built)
    forced = build(needs(tools), force=True)
    assert (tools.compiled, forced.reused) == (2, False)
    assert forced.built.libraries != first.built.libraries
    assert tools.leftovers() == []


def test_whatever_decides_makes_another_build(tools: FakeToolchain, tmp_path: Path) -> None:
    keys = {needs(tools).key, needs(tools, "87").key, needs(tools, "87", "90").key}
    tools.headers()
    keys.add(needs(tools, kernels_only=False).key)
    tools.nvcc("12.8")
    keys.add(needs(tools).key)
    tools.program("c++", "#!/bin/sh\necho 'c++ (Test) 13.1.0'\n")
    keys.add(needs(tools).key)
    assert len(keys) == 6


def test_changed_sources_make_another_build(
    tools: FakeToolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "plugins"
    (sources / "kernels").mkdir(parents=True)
    (sources / "CMakeLists.txt").write_text("")
    monkeypatch.setattr(requirements, "plugin_sources", lambda: sources)
    keys = [needs(tools).key]
    for name in ("a.cu", "notes.md", "a.cu.o"):
        (sources / "kernels" / name).write_text("x")
        keys.append(needs(tools).key)
    assert keys[0] != keys[1] == keys[2] == keys[3]


def test_a_damaged_build_is_made_again(tools: FakeToolchain) -> None:
    folder = build(needs(tools)).built.folder
    (folder / KERNELS).write_text("something else")
    assert not build(needs(tools)).reused
    (folder / "plugin.json").write_text("{")
    # a folder that does not say that it is ours is not replaced silently, but this one is in our cache
    assert not build(needs(tools)).reused
    read_manifest(folder).library(KERNELS)


@pytest.mark.parametrize(
    ("mode", "what", "got"),
    [
        ("configure-fails", "CMake could not configure the build", "there is no TensorRT here"),
        ("compile-fails", "compiling failed", '/src/decode.cu(12): error: identifier "foo" is undefined'),
        ("makes-nothing", f"the build made no {KERNELS}", ""),
    ],
)
def test_a_build_that_fails(
    mode: str, what: str, got: str, tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CMAKE", mode)
    made = needs(tools)
    error = failure(lambda: build(made))
    assert error.what == what
    assert got in (error.got or "")
    assert "make[2]" not in (error.got or "")
    log = tools.cache / "dijiang-export/plugin" / f"{made.key}.log"
    assert str(log) in str(error.hint)
    assert log.read_text().startswith("$ ")
    assert tools.leftovers() == [log.name]  # the log alone
    monkeypatch.delenv("FAKE_CMAKE")
    assert not build(needs(tools)).reused
    assert tools.leftovers() == []


def test_what_compilers_say_comes_with_a_remedy(tools: FakeToolchain) -> None:
    tools.program(
        "cmake",
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'cmake version 3.30.0' && exit\n"
        "echo '#error -- unsupported GNU version! gcc versions later than 13 are not supported!'\nexit 1\n",
    )
    error = failure(lambda: build(needs(tools)))
    assert "unsupported GNU version" in str(error.got)
    assert "CUDAHOSTCXX" in str(error.hint)


def test_a_copy_elsewhere(tools: FakeToolchain, tmp_path: Path) -> None:
    built = build(needs(tools)).built
    for _ in range(2):  # an earlier copy is replaced
        copy_build(built, tmp_path / "out/plugin")
    copied = read_manifest(tmp_path / "out/plugin")
    assert copied.libraries == built.libraries
    assert copied.library(KERNELS).read_bytes() == built.library(KERNELS).read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    failure(lambda: copy_build(built, tmp_path / "mine"), OutputError)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_cache_that_cannot_be_made(tools: FakeToolchain) -> None:
    tools.cache.write_text("a file")
    error = failure(lambda: build(needs(tools)), OutputError)
    assert "XDG_CACHE_HOME" in str(error.hint)


# The command


def command(tools: FakeToolchain, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = without_tools() | tools.environment | variables
    return subprocess.Popen(
        [sys.executable, "-m", "dijiang_export", "build-plugin", "--kernels-only", "--architecture", "90",
         *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_command(tools: FakeToolchain, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tools.headers((8, 6, 1))
    words = ["build-plugin", "--architecture", "90", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert "libdijiang_tensorrt_8.so" in out
    assert "compiling the kernels and the plugin for TensorRT 8.6.1" in err
    assert main([*words, "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert err == ""
    assert (result["reused"], result["tensorrt"], result["folder"]) == (True, "8.6.1", str(tmp_path / "out"))
    assert sorted(result["libraries"]) == [KERNELS, "libdijiang_tensorrt_8.so"]


def test_two_at_once_compile_once(tools: FakeToolchain) -> None:
    both = [command(tools, "--json", FAKE_SECONDS="1.5") for _ in range(2)]
    results = []
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    assert sorted(result["reused"] for result in results) == [False, True]
    assert tools.compiled == 1
    assert results[0]["libraries"] == results[1]["libraries"]
    assert tools.leftovers() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing(number: int, code: int, tools: FakeToolchain) -> None:
    process = command(tools, FAKE_CMAKE="hangs")
    hanging = tools.bin / "hanging"
    deadline = time.monotonic() + 60
    while not hanging.exists() or not hanging.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert tools.leftovers() == []
    assert not Path(f"/proc/{hanging.read_text()}").exists()  # no compiler goes on


def test_what_a_killed_build_left_is_removed_by_the_next(tools: FakeToolchain) -> None:
    process = command(tools, FAKE_CMAKE="hangs")
    hanging = tools.bin / "hanging"
    while not hanging.exists() or not hanging.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    os.kill(int(hanging.read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert tools.leftovers() != []
    assert not build(needs(tools)).reused
    assert tools.leftovers() == []
