"""The C++ sample: its decode loop on a CUDA and a TensorRT that are fakes in host memory, its options, and
that it compiles against every TensorRT whose headers are here (TRT_INCLUDE: folders with colons between)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.makers.cpp_sample import (
    SOURCES,
    Make,
    compile_cpp,
    compiled_fakes,
    cuda_include,
    engine_maker,
    expected,
    failed,
    generated,
    needs_compiler,
    prompt_of,
    run,
    words,
)

from dijiang_engines.plugin import toolchain

pytestmark = needs_compiler


@pytest.fixture
def fakes() -> Path:
    """A folder with the program on fakes, and with plugins that are right and wrong."""
    return compiled_fakes()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes engine folders in tmp_path."""
    return engine_maker(tmp_path)


# The decode loop


@pytest.mark.parametrize("graph", [(), ("--no-graph",)], ids=["graph", "no-graph"])
@pytest.mark.parametrize("int64", [0, 1])
@pytest.mark.parametrize("layout", ["one", "two"])
@pytest.mark.parametrize("every", [0, 1], ids=["last", "all"])
def test_tokens_are_those_of_a_plain_loop(
    fakes: Path, make: Make, layout: str, int64: int, every: int, graph: tuple[str, ...]
) -> None:
    engine = make(layout, int64=int64, all=every)
    for length in (1, 7, 8, 9, 16, 21):  # around what one prefill call takes
        prompt = prompt_of(length)
        got = generated(fakes, engine, *words(prompt), "--max-tokens", "12", *graph)
        assert got == [expected(prompt, 12)]


@pytest.mark.parametrize("shortest", [1, 4, 8])
def test_a_profile_that_starts_at_more_than_one_token(fakes: Path, make: Make, shortest: int) -> None:
    engine = make(shortest=shortest)
    for length in (1, 3, 8, 10):
        assert generated(fakes, engine, *words(prompt_of(length)), "--max-tokens=5") == [
            expected(prompt_of(length), 5)
        ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_max_tokens(fakes: Path, make: Make, count: int) -> None:
    engine = make()
    assert generated(fakes, engine, "3", "4", f"--max-tokens={count}") == [expected([3, 4], count)]
    assert len(generated(fakes, engine, "3", "4")[0]) == 128


def test_prompts_from_standard_input(fakes: Path, make: Make) -> None:
    """Each line starts from an empty state and draws from its own stream of random numbers."""
    engine = make()
    prompts = [prompt_of(3), prompt_of(30), [5], prompt_of(9)]
    stdin = "".join(", ".join(words(prompt)) + "\n" for prompt in prompts)
    got = generated(fakes, engine, "--max-tokens", "6", stdin=stdin)
    assert got == [expected(prompt, 6) for prompt in prompts]
    sampled = ("--max-tokens", "6", "--temperature", "0.5", "--seed", "2")
    got = generated(fakes, engine, *sampled, stdin=stdin)
    assert got == [expected(prompt, 6, drawn=2 * 11 + line * 5) for line, prompt in enumerate(prompts)]


@pytest.mark.parametrize("graph", [(), ("--no-graph",)], ids=["graph", "no-graph"])
def test_a_text_ends_at_a_stop_token(fakes: Path, make: Make, graph: tuple[str, ...]) -> None:
    free = expected([1, 2, 3], 20)
    for at in (0, 1, 4, 19):
        want = expected([1, 2, 3], 20, stop=(free[at],))
        assert want[-1] == free[at]
        got = generated(fakes, make(), "1", "2", "3", "--max-tokens=20", f"--stop={free[at]}", *graph)
        assert got == [want]
        assert generated(fakes, make(eos=[free[at]]), "1", "2", "3", "--max-tokens=20", *graph) == [want]
        # The step that was one too many has changed nothing: the next prompt is not disturbed.
        arguments = (f"--stop={free[at]}", "--max-tokens=20", *graph)
        assert generated(fakes, make(), *arguments, stdin="1 2 3\n1 2 3\n") == [want, want]
    engine = make(eos=[free[4]])
    assert generated(fakes, engine, "1", "2", "3", "--max-tokens=20", "--ignore-eos") == [free]


def test_ids_that_are_no_tokens_are_not_chosen(fakes: Path, make: Make) -> None:
    engine = make()
    free = expected([1, 2], 10)
    below = sorted(free)[5]
    want = expected([1, 2], 10, below=below)
    assert want != free
    assert generated(fakes, engine, "1", "2", "--max-tokens=10", f"--tokens={below}") == [want]


def test_times(fakes: Path, make: Make) -> None:
    done = run(fakes, "--plugin", fakes / "libplugin.so", make(), "5", "6", "--time", "--max-tokens=3")
    assert done.returncode == 0
    assert [int(token) for token in done.stdout.split()] == expected([5, 6], 3)
    loaded, answered = done.stderr.splitlines()
    assert loaded.startswith("loaded in ")
    assert answered.startswith("2 prompt tokens: ")
    assert "; 3 new: " in answered


@pytest.mark.parametrize(
    "limited", [{"position_embeddings": 10}, {"decay": "tables", "decay_rows": 10}], ids=["learned", "tables"]
)
def test_the_last_position(fakes: Path, make: Make, limited: dict[str, Any]) -> None:
    engine = make(**limited)
    plugin = ("--plugin", fakes / "libplugin.so", engine)
    prompt = prompt_of(6)
    assert generated(fakes, engine, *words(prompt), "--max-tokens=5") == [expected(prompt, 5)]
    assert generated(fakes, engine, *words(prompt)) == [expected(prompt, 5)]  # as many as there is room for
    assert "room for 5 more; asked for 6" in failed(fakes, *plugin, *words(prompt), "--max-tokens=6")
    assert "positions end at 10" in failed(fakes, *plugin, *words(prompt_of(11)), "--max-tokens=1")
    if "decay" in limited:
        engine = make(**limited, decay_extended=True)
        assert generated(fakes, engine, *words(prompt_of(11)), "--max-tokens=6") == [
            expected(prompt_of(11), 6)
        ]


# What goes wrong


def test_logits_that_are_not_finite(fakes: Path, make: Make) -> None:
    done = run(fakes, "--plugin", fakes / "libplugin.so", make(nan_at=6), "1", "2", "3", "--max-tokens=20")
    assert done.returncode == 1
    assert [int(token) for token in done.stdout.split()] == expected([1, 2, 3], 4)  # those before
    assert "error: the model's logits are not finite\nhint: `dijiang-export validate" in done.stderr


@pytest.mark.parametrize("gpus", ["0", "-1"])
def test_no_gpu(fakes: Path, make: Make, gpus: str) -> None:
    said = failed(fakes, "--plugin", fakes / "libplugin.so", make(), "1", FAKE_GPUS=gpus)
    assert "no NVIDIA GPU can be used here" in said
    assert "hint: on a PC, `nvidia-smi` must show it" in said


def test_too_little_memory(fakes: Path, make: Make) -> None:
    plugin = ("--plugin", fakes / "libplugin.so", make(), "1", "--max-tokens=1")
    for size in range(0, 1200, 50):
        done = run(fakes, *plugin, FAKE_GPU_BYTES=str(size))
        assert "error: allocating GPU memory failed: out of memory\nhint: " in done.stderr, size
    assert run(fakes, *plugin, FAKE_GPU_BYTES="100000").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no engine folder was named"),
        (["ENGINE"], "no plugin was named"),
        (["--plugin"], "--plugin needs a value"),
        (["--nonsense", "ENGINE"], "there is no option --nonsense"),
        (["--plugin=P", "ENGINE", "--time=3", "1"], "--time takes no value"),
        (["--plugin=P", "ENGINE", "x"], "a token id is x"),
        (["--plugin=P", "ENGINE", "--", "-3"], "a token id is -3"),
        (["--plugin=P", "ENGINE", "99999999999"], "a token id is 99999999999"),
        (["--plugin=P", "ENGINE", "97"], "the model has no token 97: its ids end at 96"),
        (["--plugin=P", "ENGINE", ""], "a prompt has no tokens"),
        (["--plugin=PLUGIN", "ENGINE"], "there is no prompt on standard input"),
        (["--plugin=PLUGIN", "ENGINE", "1", "--device=1"], "there is no GPU 1: this machine has 1"),
        (["--max-tokens=0"], "--max-tokens is 0; expected a number from 1 to"),
        (["--max-tokens=4x"], "--max-tokens is 4x"),
        (["--temperature=-1"], "--temperature is -1; expected 0 or more"),
        (["--temperature=nan"], "--temperature is nan"),
        (["--top-p=0"], "--top-p is 0; expected above 0, at most 1"),
        (["--top-p=1.01"], "--top-p is 1.01"),
        (["--min-p=2"], "--min-p is 2"),
        (["--top-k=-1"], "--top-k is -1"),
        (["--seed=-1"], "--seed is -1"),
        (["--seed=18446744073709551616"], "--seed is 18446744073709551616"),
        (["--stop=1,b"], "a token id is b"),
        (["--tokens=0"], "--tokens is 0"),
        (["--device="], "--device is ; expected"),
    ],
)
def test_wrong_usage(fakes: Path, make: Make, arguments: list[str], message: str) -> None:
    places = {"ENGINE": str(make()), "--plugin=PLUGIN": f"--plugin={fakes / 'libplugin.so'}"}
    assert message in failed(fakes, *(places.get(argument, argument) for argument in arguments), code=2)


def test_help_names_every_option(fakes: Path) -> None:
    done = run(fakes, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    code = (SOURCES / "options.cpp").read_text()
    taken = set(re.findall(r'name == "(--[a-z-]+)"', code))
    assert len(taken) > 10
    assert taken == set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))
    assert max(map(len, done.stdout.splitlines())) <= 120


# TensorRT's headers, where they are


STUB = """
#include <NvInferRuntime.h>
extern "C" void* createInferRuntime_INTERNAL(void*, int32_t) noexcept { return nullptr; }
extern "C" int32_t getInferLibVersion() noexcept { return NUMBER; }
"""


def header_folders() -> list[Path]:
    """Those that TRT_INCLUDE names, else the machine's own."""
    named = [Path(folder) for folder in os.environ.get("TRT_INCLUDE", "").split(":") if folder]
    return named or [headers.folder for headers in toolchain.find_headers() if headers.usable]


def test_there_are_headers_to_compile_against() -> None:
    if not header_folders():
        pytest.skip("TRT_INCLUDE names no TensorRT headers, and the system has none")
    for folder in header_folders():
        assert toolchain.read_headers(folder) is not None, f"no NvInfer.h in {folder}"


@pytest.mark.parametrize("folder", header_folders(), ids=str)
def test_it_compiles_against_the_headers_that_are_here(
    fakes: Path, make: Make, tmp_path: Path, folder: Path
) -> None:
    """With CMake, linked to a library that has the two functions of TensorRT and finds nothing to run on."""
    if toolchain.find_cmake() is None or toolchain.find_make() is None:
        pytest.skip("no CMake, or no make")
    headers = toolchain.read_headers(folder)
    assert headers is not None, folder
    major, minor, patch = headers.version
    version = major * (10000 if major >= 10 else 1000) + minor * 100 + patch
    (tmp_path / "stub.cpp").write_text(STUB.replace("NUMBER", str(version)))
    library = tmp_path / f"libnvinfer.so.{major}"
    soname = f"-Wl,-soname,{library.name}"  # without one, CMake would write -lnvinfer
    compile_cpp("-isystem", headers.folder, "-shared", "-fPIC", soname, tmp_path / "stub.cpp", "-o", library)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", SOURCES, "-B", build, f"-DTENSORRT_INCLUDE={headers.folder.resolve()}",
         f"-DTENSORRT_LIBRARY={library}", "-DDIJIANG_WARNINGS_AS_ERRORS=ON", "-DCMAKE_BUILD_TYPE=Debug",
         f"-DCUDA_INCLUDE={cuda_include()}"],
        ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)],
    ):  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{headers}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    # It starts, and says what is missing: a GPU, or else this TensorRT.
    arguments = [build / "dijiang_generate", "--plugin", fakes / "libplugin.so", make(tensorrt="0.0.1"), "1"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "no NVIDIA GPU can be used" in done.stderr or "was made for another GPU" in done.stderr
