"""The Python samples run, batching changes no tokens, and a row of a state can be started anew."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.fakes.runner import ToyRunner
from support.makers.toy_bundle import SPEC, make_bundle
from support.oracles.numpy_runner import NumpyRunner, random_parameters
from support.paths import ROOT

from dijiang_engines.errors import PositionError, PromptError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator, SamplingOptions
from dijiang_engines.runners import Runner, open_runner
from dijiang_engines.runners.registry import cuda_devices
from dijiang_engines.tokenizer.tokenizer import Tokenizer

SAMPLES = ROOT / "samples"
PROMPTS = [
    "def read(path):",
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n",
    "x",
    "    try:\n        return int(value)\n    except ValueError:\n",
    "class A:",
    "for name in sorted(os.listdir(folder)):\n    if name.endswith('.py'):\n        " * 3,
    "raise",
]
LENGTHS = [25, 12, 1, 30, 7, 18, 40]
SAMPLED = SamplingOptions(temperature=0.9, top_p=0.95)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_sample(name: str, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SAMPLES / f"{name}.py", *arguments],
        input=stdin, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    return load("batch_server_loop")


@pytest.fixture(scope="module")
def generator(sample_bundle: Path) -> Generator:
    bundle = open_bundle(sample_bundle)
    assert bundle.tokenizer_path is not None
    return Generator(open_runner(bundle, "cpu", threads=1), Tokenizer(bundle.tokenizer_path))


def alone(generator: Generator, number: int, sampling: SamplingOptions, seed: int = 5) -> list[int]:
    """What request `number` gives by itself."""
    options = GenerateOptions(max_tokens=LENGTHS[number], sampling=sampling, seed=seed)
    generation = generator.start([PROMPTS[number]], options, first_stream=number)
    for _ in generation:
        pass
    return generation.completions[0].token_ids


def requests(loops: ModuleType, generator: Generator) -> list[Any]:
    return [
        loops.Request(n, generator.encode(prompt), count)
        for n, (prompt, count) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
    ]


# A row of a state


@pytest.fixture(params=["onnxruntime-cpu", "numpy", "toy"])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "numpy":
        return NumpyRunner(SPEC, random_parameters(SPEC))
    model = make_bundle(tmp_path / "toy.bundle")
    if request.param == "toy":
        return ToyRunner(model)
    return open_runner(open_bundle(tmp_path / "toy.bundle"), "cpu", threads=1)


def test_reset_rows_zeroes_these_rows_in_place(runner: Runner) -> None:
    rng = np.random.default_rng(0)
    state = runner.new_state(4)
    ids, zeros = rng.integers(1, 200, (4, 3)), np.zeros(4, np.int64)
    runner.prefill(ids, zeros, np.full(4, 3), state)
    before = runner.export_state(state)
    runner.reset_rows(state, [])
    for new, old in zip(runner.export_state(state), before, strict=True):
        np.testing.assert_array_equal(new, old)
    runner.reset_rows(state, [3, 1])
    for new, old in zip(runner.export_state(state), before, strict=True):
        assert np.abs(old).reshape(4, -1).max(1).min() > 0
        assert not new[[1, 3]].any()
        np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]])
    # The next call reads what was written, in both of a runner's buffers if it has two.
    for _ in range(2):
        runner.reset_rows(state, [1, 3])
        logits = runner.step(ids[:, :1], zeros, np.array([0, 1, 0, 1]), state)
    fresh = runner.step(ids[:, :1], zeros, np.ones(4, np.int64), runner.new_state(4))
    np.testing.assert_allclose(logits[[1, 3]], fresh[[1, 3]], rtol=1e-5, atol=1e-6)
    for new, old in zip(runner.export_state(state), before, strict=True):
        np.testing.assert_array_equal(new[[0, 2]], old[[0, 2]])


@pytest.mark.parametrize("rows", [[4], [-1], [0, 9]])
def test_reset_rows_refuses_rows_that_are_not_there(runner: Runner, rows: list[int]) -> None:
    state = runner.new_state(4)
    runner.prefill(np.full((4, 2), 7), np.zeros(4, np.int64), np.full(4, 2), state)
    before = runner.export_state(state)
    with pytest.raises(RunnerError, match="row"):
        runner.reset_rows(state, rows)
    for new, old in zip(runner.export_state(state), before, strict=True):
        np.testing.assert_array_equal(new, old)


# Continuous batching


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("slots", "piece"), [(1, 64), (3, 64), (3, 5), (2, 1), (9, 16)])
def test_each_request_gives_what_it_gives_alone(
    loops: ModuleType, generator: Generator, slots: int, piece: int, sampling: SamplingOptions
) -> None:
    loop = loops.BatchLoop(generator.runner, slots, sampling, seed=5, piece=piece, banned=generator.banned)
    done = {request.number: request.tokens for request in loop.run(requests(loops, generator))}
    assert done == {n: alone(generator, n, sampling) for n in range(len(PROMPTS))}
    assert loop.idle


def test_requests_join_and_leave_while_others_run(loops: ModuleType, generator: Generator) -> None:
    loop = loops.BatchLoop(generator.runner, 2, SAMPLED, seed=5, piece=4, banned=generator.banned)
    waiting, done, together = requests(loops, generator), {}, set()
    while waiting or not loop.idle:
        if waiting and loop.rounds % 3 == 0:
            loop.submit(waiting.pop(0))
        for request in loop.round():
            done[request.number] = request.tokens
        together.add(tuple(slot is None or slot.consumed >= len(slot.prompt) for slot in loop.slots))
    assert done == {n: alone(generator, n, SAMPLED) for n in range(len(PROMPTS))}
    assert (False, True) in together or (True, False) in together  # one read its prompt, one generated
    assert loop.busy > loop.rounds  # and mostly both slots worked


def test_a_row_that_is_not_reset_would_be_noticed(
    loops: ModuleType, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator.runner, "reset_rows", lambda state, rows: None)
    loop = loops.BatchLoop(generator.runner, 1, SAMPLED, seed=5, banned=generator.banned)
    done = {request.number: request.tokens for request in loop.run(requests(loops, generator))}
    assert done[0] == alone(generator, 0, SAMPLED)
    assert any(done[n] != alone(generator, n, SAMPLED) for n in range(1, len(PROMPTS)))


def test_idle_slots_are_zero(loops: ModuleType, generator: Generator) -> None:
    loop = loops.BatchLoop(generator.runner, 3, banned=generator.banned)
    first, second = requests(loops, generator)[:2]
    for request in (first, second):
        loop.submit(request)
    while not loop.idle:
        loop.round()
        for layer in generator.runner.export_state(loop.state):
            occupied = [slot is not None for slot in loop.slots]
            assert [bool(row.any()) for row in layer] == occupied


def test_a_text_ends_at_end_of_text(loops: ModuleType, tmp_path: Path) -> None:
    """Every token ends the toy's text: each request is one token, and two share a slot in turn."""
    model = make_bundle(tmp_path / "toy.bundle")
    runner = ToyRunner(model)
    object.__setattr__(runner.spec, "eos_token_ids", tuple(range(runner.spec.vocab_size)))
    loop = loops.BatchLoop(runner, 1)
    done = list(loop.run([loops.Request(n, [5, 6], 10) for n in range(3)]))
    assert [len(request.tokens) for request in done] == [1, 1, 1]
    assert loop.rounds == 3


def test_logits_of_every_token(loops: ModuleType, tmp_path: Path) -> None:
    """A runner that returns all logits: the last valid one of each row counts."""
    model = make_bundle(tmp_path / "toy.bundle")
    results = []
    for every in (False, True):
        loop = loops.BatchLoop(ToyRunner(model, all_logits=every), 2, piece=3)
        batch = [loops.Request(n, list(range(5, 7 + n)), 6) for n in range(4)]
        results.append({request.number: request.tokens for request in loop.run(batch)})
    assert results[0] == results[1]
    assert len(results[0]) == 4


def test_what_is_refused(loops: ModuleType, tmp_path: Path) -> None:
    runner = ToyRunner(make_bundle(tmp_path / "toy.bundle"))
    object.__setattr__(runner.spec, "decay", "tables")
    object.__setattr__(runner.spec, "decay_rows", 10)
    loop = loops.BatchLoop(runner, 1)
    assert runner.spec.max_positions == 10
    loop.submit(loops.Request(0, [1] * 4, 7))
    with pytest.raises(PositionError):
        loop.submit(loops.Request(1, [1] * 4, 8))
    for prompt, count in (([], 1), ([1], 0), ([runner.spec.vocab_size], 1), ([-1], 1)):
        with pytest.raises(PromptError):
            loop.submit(loops.Request(1, prompt, count))
    for slots, piece in ((0, 1), (1, 0)):
        with pytest.raises(UsageError):
            loops.BatchLoop(runner, slots, piece=piece)
    with pytest.raises(UsageError):
        loops.BatchLoop(runner, 1, SamplingOptions(repetition_penalty=1.2))
    assert len(loop.waiting) == 1


# As programs


def texts(generator: Generator, prompts: Sequence[str], **options: Any) -> list[str]:
    generation = generator.start(prompts, GenerateOptions(**options))
    for _ in generation:
        pass
    return [completion.text for completion in generation.completions]


def test_onnxruntime_generate(sample_bundle: Path, generator: Generator) -> None:
    done = run_sample("onnxruntime_generate", sample_bundle, PROMPTS[0], "--max-tokens", "20")
    assert (done.returncode, done.stdout) == (0, texts(generator, PROMPTS[:1], max_tokens=20)[0] + "\n")
    assert done.stderr.startswith("onnxruntime-cpu: ")
    arguments = [*PROMPTS[:2], "--max-tokens", "9", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3"]
    done = run_sample("onnxruntime_generate", sample_bundle, *arguments)
    sampling = SamplingOptions(temperature=0.8, top_p=0.9)
    first, second = texts(generator, PROMPTS[:2], max_tokens=9, seed=3, sampling=sampling)
    assert done.stdout == f"== {PROMPTS[0]}\n{first}\n== {PROMPTS[1]}\n{second}\n"


@pytest.mark.skipif(cuda_devices() == 0, reason="no CUDA device")
def test_onnxruntime_generate_on_cuda(sample_bundle: Path, generator: Generator) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    done = run_sample(
        "onnxruntime_generate", sample_bundle, PROMPTS[0], "--max-tokens", "20", "--device", "cuda"
    )
    assert done.stdout == texts(generator, PROMPTS[:1], max_tokens=20)[0] + "\n"


def test_batch_server_loop(sample_bundle: Path, generator: Generator) -> None:
    prompts = ["import os", "def main():", "class A:"]
    done = run_sample(
        "batch_server_loop", sample_bundle, "--slots", "2", "--max-tokens", "8", stdin="\n".join(prompts)
    )
    assert done.returncode == 0, done.stderr
    answers = texts(generator, prompts, max_tokens=8)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert f"== {number}: {prompt}\n{answer}\n" in done.stdout
    assert "3 requests in " in done.stderr


@pytest.mark.parametrize("slots", ["1", "2", "5"])
def test_a_request_of_the_program_gives_what_generate_gives_alone(
    sample_bundle: Path, generator: Generator, slots: str
) -> None:
    """Lines of standard input against one `generate` each, which is what the document promises."""
    prompts = [prompt for prompt in PROMPTS if "\n" not in prompt]
    arguments = ("--slots", slots, "--piece", "3", "--max-tokens", "11")
    done = run_sample("batch_server_loop", sample_bundle, *arguments, stdin="\n".join(prompts) + "\n")
    assert done.returncode == 0, done.stderr
    for number, prompt in enumerate(prompts):
        answer = texts(generator, [prompt], max_tokens=11)[0]
        assert f"== {number}: {prompt}\n{answer}\n" in done.stdout


@pytest.mark.parametrize("name", ["onnxruntime_generate", "tensorrt_generate", "batch_server_loop"])
def test_a_model_cut_short_is_one_message(name: str, sample_bundle: Path, tmp_path: Path) -> None:
    model = tmp_path / "cut.bundle"
    shutil.copytree(sample_bundle, model)
    manifest = (model / "manifest.json").read_bytes()
    (model / "manifest.json").write_bytes(manifest[: len(manifest) // 2])
    done = run_sample(name, model, *([] if name == "batch_server_loop" else ["x"]), stdin="x\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_bundle_is_no_engine(sample_bundle: Path) -> None:
    done = run_sample("tensorrt_generate", sample_bundle, "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "hint: build one: dijiang-export build-engine" in done.stderr


@pytest.mark.parametrize("name", ["onnxruntime_generate", "tensorrt_generate", "batch_server_loop"])
def test_a_missing_model_is_one_message(name: str, tmp_path: Path) -> None:
    arguments = [] if name == "batch_server_loop" else ["x"]
    done = run_sample(name, tmp_path / "nothing", *arguments, stdin="x\n")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_prompt_is_wrong_usage(sample_bundle: Path) -> None:
    done = run_sample("batch_server_loop", sample_bundle)
    assert (done.returncode, done.stdout) == (2, "")
    assert "hint: one prompt a line" in done.stderr


def missing_tensorrt() -> str | None:
    """Why no engine can be built and run here, or None."""
    if importlib.util.find_spec("tensorrt") is None:
        return "the Python package tensorrt is not installed"
    return None if cuda_devices() else "no CUDA device"


@pytest.mark.skipif(missing_tensorrt() is not None, reason=str(missing_tensorrt()))
def test_tensorrt_generate(sample_bundle: Path, generator: Generator, tmp_path: Path) -> None:
    """DIJIANG_ENGINE names an engine of the sample that is there already."""
    engine = Path(os.environ.get("DIJIANG_ENGINE", tmp_path / "sample.engine"))
    if not engine.exists():
        command = [
            sys.executable,
            "-m",
            "dijiang_export.cli",
            "build-engine",
            str(sample_bundle),
            "-o",
            str(engine),
        ]
        subprocess.run(command, check=True, timeout=900)
    done = run_sample("tensorrt_generate", engine, PROMPTS[0], "--max-tokens", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout == texts(generator, PROMPTS[:1], max_tokens=20)[0] + "\n"
