"""The C++ sample: its decode loop on a CUDA and a TensorRT that are fakes in host memory, its messages, and
that it compiles against every TensorRT whose headers are here (TRT_INCLUDE: folders with colons between)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dijiang_engines import toolchain
from dijiang_engines.engine_folder import open_engine, write_engine_manifest
from dijiang_engines.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "samples/cpp"
WITHOUT_TENSORRT = sorted(path for path in SOURCES.glob("*.cpp") if path.name != "tensorrt.cpp")
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
VOCABULARY, LAYERS, LONGEST = 97, 2, 8


def cuda_include() -> Path | None:
    """The folder with cuda_runtime_api.h."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda")]
    places += [nvcc.path.resolve().parent.parent for nvcc in toolchain.find_nvccs()]
    folders = [place / "include" for place in places]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").exists()), None)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if toolchain.find_cxx() is None:
        return "no C++ compiler"
    return "no CUDA headers" if cuda_include() is None else None


pytestmark = pytest.mark.skipif(missing() is not None, reason=f"cannot compile the sample: {missing()}")


def compile_cpp(*arguments: str | Path) -> None:
    compiler = toolchain.find_cxx()
    assert compiler is not None
    include = ["-I", ROOT / "plugins/include", "-isystem", str(cuda_include())]
    done = subprocess.run(
        [compiler.path, *WARNINGS, *map(str, include), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program on fakes, and with plugins that are right and wrong."""
    folder = tmp_path_factory.mktemp("fakes")
    tests = SOURCES / "tests"
    # Sanitizers: a crash or a wrong access is an error whatever it would have done.
    checks = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_cpp(
        *checks, "-rdynamic", *WITHOUT_TENSORRT, tests / "fake_cuda.cpp", tests / "fake_tensorrt.cpp",
        "-ldl", "-o", folder / "dijiang_generate",
    )  # fmt: skip
    for name, defines in (
        ("plugin", []), ("kernels", ["-DFAKE_KERNELS_ONLY"]), ("other_abi", ["-DFAKE_ABI=7"]),
    ):  # fmt: skip
        library = ["-shared", "-fPIC", "-fvisibility=hidden", tests / "fake_plugin.cpp"]
        compile_cpp(*checks, *library, *defines, "-o", folder / f"lib{name}.so")
    (folder / "empty.cpp").write_text("")
    compile_cpp("-shared", folder / "empty.cpp", "-o", folder / "libempty.so")
    (folder / "libtext.so").write_text("no library")
    return folder


def spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "family": "gpt_neox", "vocab_size": VOCABULARY, "hidden_size": 2, "intermediate_size": 4,
        "num_layers": LAYERS, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "rotary_dim": 2,
        "rope_theta": 1e4, "rope_scaling": None, "norm": "layer_norm", "norm_epsilon": 1e-5,
        "activation": "gelu", "gated_mlp": False, "parallel_residual": True, "post_norm": False,
        "final_norm": True, "attention_bias": True, "dense_bias": True, "mlp_bias": True,
        "position_embeddings": 0, "position_offset": 0, "embedding_size": 2, "tied_embeddings": False,
        "max_position_embeddings": 64, "decay": "geometric", "decay_rows": 0, "decay_extended": False,
        "group_norm_epsilon": 1e-5, "bos_token_id": 0, "eos_token_ids": [],
    }  # fmt: skip
    return ModelSpec.from_json(values | changes)


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(layout, changes of spec, facts of the fake plan) -> an engine folder like `build-engine`'s."""

    def make(layout: str = "one", eos: list[int] | None = None, **facts: Any) -> Path:
        folder = tmp_path / "sample.engine"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        changes = {key: facts.pop(key) for key in list(facts) if key in ModelSpec.__dataclass_fields__}
        facts = {"layers": LAYERS, "vocabulary": VOCABULARY, "longest": LONGEST} | facts
        made_for = {
            "tensorrt": facts.pop("tensorrt", "10.3.0"), "gpu": facts.pop("gpu", "Fake GPU"),
            "compute_capability": 87, "plugin_sources": "ab" * 32,
            "plugin_version": facts.pop("plugin_version", "0.1.0"),
        }  # fmt: skip

        def plan(name: str, **more: Any) -> None:
            words = [f"{key}={value}" for key, value in (facts | more).items()]
            (folder / name).write_text(" ".join(["fake-plan", *words]))

        if layout == "one":
            plan("model.plan", **({} if "profiles" in facts else {"profiles": 2}))
        else:
            plan("prefill.plan", profiles=1)
            plan("step.plan", **{"profiles": 1, "longest": 1, "shortest": 1, "all": 0})
        write_engine_manifest(folder, {
            "dtype": "float32", "logits": "all" if facts.get("all") else "last", "layout": layout,
            "spec": spec(eos_token_ids=eos or [], **changes).to_json(), "made_for": made_for,
            "profiles": {"max_batch": 4, "max_length": LONGEST, "opt_batch": 1, "opt_length": LONGEST},
            "source": {"name": "sample", "spec_sha256": "0" * 64, "weights_sha256": "0" * 64},
            "reference": None,
        })  # fmt: skip
        open_engine(folder)  # what Python takes for an engine, the program must take too
        return folder

    return make


def run(
    fakes: Path, *arguments: str | Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    # The fake CUDA keeps destroyed streams, so what leaks is not looked at.
    env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"} | environment
    return subprocess.run(
        [fakes / "dijiang_generate", *arguments],
        input=stdin, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def generated(fakes: Path, engine: Path, *arguments: str, stdin: str = "") -> list[list[int]]:
    done = run(fakes, "--plugin", fakes / "libplugin.so", engine, *arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, "")
    return [[int(token) for token in line.split()] for line in done.stdout.splitlines()]


def failed(fakes: Path, *arguments: str | Path, code: int = 1, **environment: str) -> str:
    done = run(fakes, *arguments, **environment)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert len(rest) <= 1
    assert all(line.startswith("hint: ") for line in rest)
    return done.stderr


def expected(
    prompt: list[int],
    count: int,
    *,
    drawn: int | None = None,
    stop: tuple[int, ...] = (),
    below: int = VOCABULARY,
) -> list[int]:
    """The fake model, in other words: every token from the whole text. drawn: what seed and stream add."""
    ids = list(prompt)
    while len(ids) - len(prompt) < count:
        best = 0
        for layer in range(LAYERS):
            state = 0.0
            for position, token in enumerate(ids):
                state = math.fmod(state * 31.0 + 7.0 * token + position + 1 + layer, 9973)
            best += int(state) * (2 * layer + 1)
        best = min(best % VOCABULARY, below - 1)
        if drawn is not None:
            best = (best + drawn + len(ids)) % VOCABULARY
        ids.append(best)
        if best in stop:
            break
    return ids[len(prompt) :]


def prompt_of(length: int) -> list[int]:
    return [(13 * i + 5) % VOCABULARY for i in range(length)]


def words(prompt: list[int]) -> list[str]:
    return [str(token) for token in prompt]


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


@pytest.mark.parametrize("layout", ["one", "two"])
def test_plans_that_are_not_what_was_built(fakes: Path, make: Make, layout: str) -> None:
    engine = make(layout)
    plans = {"one": ["model.plan"], "two": ["prefill.plan", "step.plan"]}[layout]
    for name in plans:
        whole = (engine / name).read_bytes()
        for content, message in (
            (whole[:-9], f"{name} has {len(whole) - 9} bytes; engine.json says {len(whole)}"),
            (b"", f"{name} has 0 bytes"),
            (whole[:-1] + b"!", f"{name} is corrupt: its SHA-256 differs"),
            (None, f"{name}: No such file"),
        ):
            (engine / name).unlink()
            if content is not None:
                (engine / name).write_bytes(content)
            assert message in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
            (engine / name).write_bytes(whole)
        (engine / name).unlink()
        os.mkfifo(engine / name)
        assert "is not a file" in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")
        (engine / name).unlink()
        (engine / name).write_bytes(whole)
    assert generated(fakes, engine, "1", "--max-tokens=2") == [expected([1], 2)]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"layers": 3}, "has 10 inputs and outputs; a model of 2 layers has 8"),
        ({"foreign": 1}, "is not a plan of a DiJiang model: it has no input input_ids"),
        ({"vocabulary": 98}, "its logits are not float32 of 97 ids"),
        ({"profiles": 1}, "has 1 optimization profiles"),
        ({"least_batch": 2}, "was not built for one sequence"),
        ({"longest": 0}, "was not built for one sequence"),
        ({"tensorrt": "8.6.1"}, "was made for another TensorRT: 8.6.1; here is 10.3.0"),
        ({"gpu": "Orin"}, "was made for another GPU: Orin, sm_87; here is Fake GPU, sm_87"),
        ({"plugin_version": "0.2.0"}, "another version of the plugin: 0.2.0; here is 0.1.0"),
    ],
)
def test_foreign_engines(fakes: Path, make: Make, facts: dict[str, Any], message: str) -> None:
    said = failed(fakes, "--plugin", fakes / "libplugin.so", make(**facts), "1")
    assert message in said
    assert "hint: build" in said


def test_hashes_of_files_of_every_length(fakes: Path, make: Make) -> None:
    """A right hash is the only way past the check to TensorRT, which says what the file is not."""
    engine = make()
    manifest = json.loads((engine / "engine.json").read_text())
    for length in [*range(1, 130), 1000, 12345]:
        content = bytes(i * 7 % 251 for i in range(length))
        (engine / "model.plan").write_bytes(content)
        manifest["files"]["model.plan"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": length}
        (engine / "engine.json").write_text(json.dumps(manifest))
        assert "TensorRT cannot load" in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


def test_a_file_that_is_no_plan(fakes: Path, make: Make) -> None:
    engine = make()
    content = b"something else"
    (engine / "model.plan").write_bytes(content)
    manifest = json.loads((engine / "engine.json").read_text())
    manifest["files"]["model.plan"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (engine / "engine.json").write_text(json.dumps(manifest))
    assert "TensorRT cannot load" in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is not JSON (byte 0)"),
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: text + "x", "is not JSON"),
        (lambda text: "[" * 100_000, "is not JSON"),
        (lambda text: "[]", "is not an object"),
        (lambda text: text.replace("dijiang-engine", "dijiang-bundle"), "is not an engine of format 1"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "not an engine of format"),
        (lambda text: text.replace('"layout": "one"', '"layout": "three"'), "does not know: three"),
        (lambda text: text.replace('"vocab_size"', '"words"'), 'spec is not an object with "vocab_size"'),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": "97"'), "vocab_size is not an integer"),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": 9.5'), "vocab_size is not an integer"),
        (lambda text: text.replace('"vocab_size": 97', '"vocab_size": -1'), "sizes out of range"),
        (lambda text: text.replace('"model.plan"', '"m\\u00f6del.plan"'), 'an object with "model.plan"'),
    ],
)  # fmt: skip
def test_manifests_that_make_no_sense(
    fakes: Path, make: Make, change: Callable[[str], str], message: str
) -> None:
    engine = make()
    text = (engine / "engine.json").read_text()
    assert change(text) != text
    (engine / "engine.json").write_text(change(text))
    assert message in failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


def test_every_cut_of_a_manifest_is_an_error(fakes: Path, make: Make) -> None:
    engine = make()
    text = (engine / "engine.json").read_text().rstrip()
    for length in range(0, len(text), 97):
        (engine / "engine.json").write_text(text[:length])
        failed(fakes, "--plugin", fakes / "libplugin.so", engine, "1")


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("libnothing.so", "there is no plugin at"),
        ("libtext.so", "cannot open the plugin"),
        ("libempty.so", "is not a plugin of dijiang-export: no dijiang_abi_version"),
        ("libkernels.so", "is not a plugin for TensorRT 10.3.0\nhint: libdijiang_kernels.so is none"),
        ("libother_abi.so", "has version 7 of the kernels' interface"),
        (".", "there is no plugin at"),
    ],
)
def test_libraries_that_are_no_plugin(fakes: Path, make: Make, library: str, message: str) -> None:
    assert message in failed(fakes, "--plugin", fakes / library, make(), "1")


def test_a_plugin_of_other_sources(fakes: Path, make: Make, tmp_path: Path) -> None:
    """plugin.json, which `build-plugin --output` puts beside the library, is compared where it is there."""
    shutil.copy(fakes / "libplugin.so", tmp_path)
    engine = make()
    (tmp_path / "plugin.json").write_text(json.dumps({"sources": "cd" * 32}))
    assert "was made for another plugin: abab" in failed(
        fakes, "--plugin", tmp_path / "libplugin.so", engine, "1"
    )
    (tmp_path / "plugin.json").write_text(json.dumps({"sources": "ab" * 32}))
    done = run(fakes, "--plugin", tmp_path / "libplugin.so", engine, "1", "--max-tokens=3")
    assert [int(token) for token in done.stdout.split()] == expected([1], 3)


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


def test_no_engine(fakes: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        said = failed(fakes, "--plugin", fakes / "libplugin.so", place, "1")
        assert "it has no engine.json\nhint: make one with `dijiang-export build-engine" in said


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


@pytest.mark.skipif(not os.environ.get("TRT_INCLUDE"), reason="TRT_INCLUDE names no TensorRT headers")
def test_it_compiles_against_the_headers_that_are_here(fakes: Path, make: Make, tmp_path: Path) -> None:
    """With CMake, linked to a library that has the two functions of TensorRT and finds nothing to run on."""
    if toolchain.find_cmake() is None or toolchain.find_make() is None:
        pytest.skip("no CMake, or no make")
    folders = [Path(folder) for folder in os.environ["TRT_INCLUDE"].split(":")]
    assert folders
    for number, folder in enumerate(folders):
        headers = toolchain.read_headers(folder)
        assert headers is not None, folder
        major, minor, patch = headers.version[:3]
        version = major * (10000 if major >= 10 else 1000) + minor * 100 + patch
        (tmp_path / "stub.cpp").write_text(STUB.replace("NUMBER", str(version)))
        library = tmp_path / f"libnvinfer.so.{major}"
        soname = f"-Wl,-soname,{library.name}"  # without one, CMake would write -lnvinfer
        compile_cpp(
            "-isystem", headers.folder, "-shared", "-fPIC", soname, tmp_path / "stub.cpp", "-o", library
        )
        build = tmp_path / f"build-{number}"
        for command in (
            ["cmake", "-S", SOURCES, "-B", build, f"-DTENSORRT_INCLUDE={headers.folder.resolve()}",
             f"-DTENSORRT_LIBRARY={library}", "-DDIJIANG_WARNINGS_AS_ERRORS=ON", "-DCMAKE_BUILD_TYPE=Debug",
             f"-DCUDA_INCLUDE={cuda_include()}"],
            ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{headers}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        # It starts, and says what is missing: a GPU, or else this TensorRT.
        command = [
            build / "dijiang_generate",
            "--plugin",
            fakes / "libplugin.so",
            make(tensorrt="0.0.1"),
            "1",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "no NVIDIA GPU can be used" in done.stderr or "was made for another GPU" in done.stderr
