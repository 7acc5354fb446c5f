"""The C++ sample compiled on fakes of CUDA and TensorRT, and engine folders for it."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from dijiang_engines.formats.engine import open_engine, write_engine_manifest
from dijiang_engines.formats.folder import spec_sha256
from dijiang_engines.machine import run_tool
from dijiang_engines.plugin import toolchain
from dijiang_engines.spec import ModelSpec

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


needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"cannot compile the sample: {missing()}")


def compile_cpp(*arguments: str | Path) -> None:
    compiler = toolchain.find_cxx()
    assert compiler is not None
    include = ["-I", ROOT / "plugins/include", "-isystem", str(cuda_include())]
    done = subprocess.run(
        [compiler.path, *WARNINGS, *map(str, include), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def compiles_for_here() -> bool:
    """False for a cross compiler, as tests/arm64 has it."""
    compiler = toolchain.find_cxx()
    return compiler is None or platform.machine() in (run_tool(str(compiler.path), "-dumpmachine") or "")


@cache
def compiled_fakes() -> Path:
    """A folder with the program on fakes, and with plugins that are right and wrong.

    Compiled once for all processes that test, and kept until a source changes.
    """
    every = sorted(path for at in (SOURCES, ROOT / "plugins/include") for path in at.rglob("*.[ch]*"))
    content = b"".join(path.read_bytes() for path in (*every, Path(__file__)))
    build = ROOT / "build" / ("cpp-sample" if compiles_for_here() else "cpp-sample-cross")
    folder = build / hashlib.sha256(content).hexdigest()[:16]
    build.mkdir(parents=True, exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "libtext.so").exists():  # written last
            for old in (path for path in build.iterdir() if path.is_dir()):
                shutil.rmtree(old)
            folder.mkdir()
            compile_fakes(folder)
    return folder


def compile_fakes(folder: Path) -> None:
    tests = SOURCES / "tests"
    # Sanitizers: a crash or a wrong access is an error whatever it would have done. Not for qemu's guests.
    checks: list[str | Path] = ["-g"]
    if compiles_for_here():
        checks += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compile_cpp(
        *checks, "-rdynamic", *WITHOUT_TENSORRT, tests / "fake_cuda.cpp", tests / "fake_tensorrt.cpp",
        "-ldl", "-o", folder / "dijiang_generate",
    )  # fmt: skip
    for name, defines in (
        ("plugin", []), ("kernels", ["-DFAKE_KERNELS_ONLY"]), ("other_abi", ["-DFAKE_ABI=7"]),
    ):  # fmt: skip
        library: list[str | Path] = ["-shared", "-fPIC", "-fvisibility=hidden", tests / "fake_plugin.cpp"]
        compile_cpp(*checks, *library, *defines, "-o", folder / f"lib{name}.so")
    compile_cpp(
        *checks, *(SOURCES / name for name in ("json.cpp", "sha256.cpp", "tests/host_parts.cpp")),
        "-o", folder / "host_parts",
    )  # fmt: skip
    (folder / "empty.cpp").write_text("")
    compile_cpp("-shared", folder / "empty.cpp", "-o", folder / "libempty.so")
    (folder / "libtext.so").write_text("no library")


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


def engine_maker(tmp_path: Path) -> Make:
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
        model = spec(eos_token_ids=eos or [], **changes)
        write_engine_manifest(folder, {
            "dtype": "float32", "logits": "all" if facts.get("all") else "last", "layout": layout,
            "spec": model.to_json(), "made_for": made_for,
            "profiles": {"max_batch": 4, "max_length": LONGEST, "opt_batch": 1, "opt_length": LONGEST},
            "source": {
                "name": "sample", "spec_sha256": spec_sha256(model), "weights_sha256": "0" * 64,
            },
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
