"""`dijiang-export generate`: prompts from everywhere, text as it grows, and clear refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.makers.toy_bundle import ToyModel, make_bundle

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator, SamplingOptions
from dijiang_engines.runners import open_runner
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.cli import main

Toy = tuple[Path, ToyModel]
NAME = "tiny-stdlib.bundle"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a toy bundle of the default name, as the current one."""
    make_bundle(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> SimpleNamespace:
    found = main(["generate", "--threads", "1", *args])
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return SimpleNamespace(out=out, err=err)


def expected(*prompts: str, max_tokens: int = 12, **options: Any) -> list[str]:
    bundle = open_bundle(NAME)
    assert bundle.tokenizer_path is not None
    generator = Generator(open_runner(bundle, "cpu", threads=1), Tokenizer(bundle.tokenizer_path))
    sampling = SamplingOptions(**{k: options.pop(k) for k in list(options) if hasattr(SamplingOptions, k)})
    generation = generator.start(prompts, GenerateOptions(max_tokens, sampling, **options))
    for _ in generation:
        pass
    return [completion.text for completion in generation.completions]


def line(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


SHORT = ("--max-tokens", "12")


def test_one_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    done = generate(capsys, "--prompt", "hello", *SHORT)
    assert done.out == line(expected("hello")[0])
    assert "prompt: 5 tokens" in done.err
    assert "generated: 12 tokens" in done.err
    assert "tokens/s" in done.err
    assert "seed" not in done.err


def test_echo_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    done = generate(capsys, NAME, "--prompt", "hello", "--echo", "--quiet", *SHORT)
    assert done.out == line("hello" + expected("hello")[0])
    assert done.err == ""


def test_sampling_options_reach_the_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.001")
    more = ("--repetition-penalty", "1.3", "--seed", "11", "--ignore-eos")
    done = generate(capsys, "-p", "hello", *options, *more, *SHORT)
    (text,) = expected(
        "hello", temperature=1.5, top_k=50, top_p=0.9, min_p=0.001, repetition_penalty=1.3, seed=11,
        ignore_eos=True,
    )  # fmt: skip
    assert done.out == line(text)
    assert "seed: 11" in done.err


def test_the_seed_that_was_chosen_can_be_given_again(capsys: pytest.CaptureFixture[str]) -> None:
    first = generate(capsys, "-p", "hello", "--top-p", "0.99", *SHORT)
    seed = first.err.rpartition("seed: ")[2].split()[0]
    again = generate(capsys, "-p", "hello", "--top-p", "0.99", "--seed", seed, *SHORT)
    assert again.out == first.out


def test_several_prompts_are_labelled(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "prompt.txt").write_text("from a file\n")
    args = ("-p", "one", "-p", "two", "-f", "prompt.txt")
    done = generate(capsys, *args, *SHORT)
    texts = expected("one", "two", "from a file")
    names = ["--- 1: 'one'", "--- 2: 'two'", "--- 3: 'from a file'"]
    assert done.out == "".join(f"{name}\n{text}\n" for name, text in zip(names, texts, strict=True))


def test_batches_do_not_change_the_texts(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("-p", "one", "-p", "three", "-p", "two", "--temperature", "1", "--seed", "4", *SHORT)
    outs = {generate(capsys, *args, "--batch", batch).out for batch in ("1", "2", "8")}
    assert len(outs) == 1


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    done = generate(capsys, "-p", "one", "-p", "two", "--json", *SHORT)
    result = json.loads(done.out)
    assert [c["text"] for c in result["completions"]] == expected("one", "two")
    assert [c["prompt"] for c in result["completions"]] == ["one", "two"]
    assert {c["finish_reason"] for c in result["completions"]} <= {"eos", "stop", "length"}
    assert result["completions"][0]["prompt_tokens"] == 3
    assert result["runner"] == "onnxruntime-cpu"
    assert result["stats"]["prompt_tokens"] == 6
    assert result["seed"] is None
    assert done.err == ""


def test_stop(capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = expected("hello", max_tokens=30)
    middle = whole[4:7]
    done = generate(capsys, "-p", "hello", "--max-tokens", "30", "--stop", "nothing", "--stop", middle)
    assert done.out == line(whole[: whole.index(middle)])


# -- where prompts come from -----------------------------------------------------------------------------


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


@pytest.mark.parametrize("args", [("-",), (NAME, "-"), ("-f", "-"), ("--prompt-file", "-", NAME)])
def test_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    stdin(monkeypatch, "héllo\n".encode())
    assert generate(capsys, *args, *SHORT).out == line(expected("héllo")[0])


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"a\n", "a"),
        (b"a\n\n", "a\n"),
        (b"a\r\n", "a"),
        (b"a", "a"),
        (b"\xef\xbb\xbfa", "a"),
        (b" a ", " a "),
    ],
)
def test_what_a_file_s_prompt_is(
    capsys: pytest.CaptureFixture[str], folder: Path, data: bytes, prompt: str
) -> None:
    (folder / "f").write_bytes(data)
    result = json.loads(generate(capsys, "-f", "f", "--json", "-n", "1").out)
    assert result["completions"][0]["prompt"] == prompt


def test_an_empty_prompt_starts_from_the_beginning_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, "-p", "", *SHORT).out == line(expected("")[0])


# -- sessions --------------------------------------------------------------------------------------------


def test_saved_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "1.2", "--seed", "8", "--ignore-eos")
    whole = json.loads(generate(capsys, "-p", "hello", *options, "-n", "10", "--json").out)
    one = generate(capsys, "-p", "hello", *options, "-n", "4", "--save-session", "s")
    assert "saved: s" in one.err
    two = generate(capsys, "--session", "s", *options, "-n", "6", "--save-session", "s", "--json")
    ids = whole["completions"][0]["token_ids"]
    assert json.loads(two.out)["completions"][0]["token_ids"] == ids[4:]
    assert json.loads(two.out)["session"] == "s"


def test_reading_only(capsys: pytest.CaptureFixture[str]) -> None:
    done = generate(capsys, "-p", "hello", "-n", "0", "--save-session", "s")
    assert done.out == ""
    assert generate(capsys, "--session", "s", *SHORT).out == line(expected("hello")[0])
    assert generate(capsys, "--session", "s", "-p", " you", *SHORT).out == line(expected("hello you")[0])


def test_more_prompts_than_a_batch_are_one_session(capsys: pytest.CaptureFixture[str]) -> None:
    generate(capsys, "-p", "a", "-p", "b", "-p", "c", "--batch", "2", "-n", "2", "--save-session", "s")
    assert generate(capsys, "--session", "s", "-n", "2").out.count("--- ") == 3


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, ["there is no prompt", "--prompt TEXT"]),
        (("a.bundle", "b.bundle", "-p", "x"), 2, ["more than one bundle"]),
        (("-", "-f", "-"), 2, ["only once"]),
        (("missing.bundle", "-p", "x"), 1, ["there is no bundle at missing.bundle"]),
        (("-f", "missing.txt"), 1, ["cannot read the prompt from missing.txt"]),
        (("-f", "latin1.txt"), 1, ["latin1.txt is not UTF-8", "byte 0xe9 at offset 4"]),
        (("-p", "caf\udce9"), 1, ["--prompt is not UTF-8", "offset 3"]),
        (("-p", "x", "--stop", "\udce9"), 1, ["--stop is not UTF-8"]),
        (("-p", "x", "--stop", ""), 2, ["stop string must not be empty"]),
        (("-p", "x", "--temperature", "0", "--top-k", "3"), 2, ["--top-k has no meaning"]),
        (("-p", "x", "--top-p", "1.5"), 2, ["top-p is out of range"]),
        (("-p", "x", "--temperature", "nan"), 2, ["temperature is out of range"]),
        (("-p", "x", "--runner", "tpu"), 2, ["no runner 'tpu'"]),
        (("-p", "x", "--session", "missing"), 1, ["no session file missing"]),
        (("-p", "x", "--save-session", "none/s"), 1, ["no folder none"]),
        (("-p", "x", "--save-session", "latin1.txt"), 1, ["not a session file"]),
        (("-p", "x", "--tokenizer", "latin1.txt"), 1, ["latin1.txt is not a tokenizer"]),
        (("plain.bundle", "-p", "x"), 1, ["has no tokenizer", "--tokenizer"]),
        (("short.bundle", "-p", "x" * 11), 1, ["last position", "at most 10", "--extend-decay"]),
        (("short.bundle", "-p", "xxxx", "-n", "8"), 1, ["--max-tokens 7"]),
        (("nobos.bundle", "-p", ""), 1, ["the prompt is empty"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_refusals(
    capsys: pytest.CaptureFixture[str], folder: Path, args: tuple[str, ...], code: int, words: list[str]
) -> None:
    (folder / "latin1.txt").write_bytes("café\n".encode("latin1").replace(b"caf", b"caf "))
    make_bundle(folder / "plain.bundle", tokenizer=False)
    make_bundle(folder / "short.bundle", decay="tables", decay_rows=10)
    make_bundle(folder / "nobos.bundle", bos_token_id=None)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = generate(capsys, *args, code=code)
    assert done.err.startswith("error: ")
    assert all(word in done.err for word in words), done.err
    assert done.out == ""
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_weights_are_hashed_unless_told_otherwise(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    weights = folder / NAME / "weights.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "SHA-256" in generate(capsys, "-p", "x", *SHORT, code=1).err
    generate(capsys, "-p", "x", "--no-verify", *SHORT)


def test_another_tokenizer(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    make_bundle(folder / "plain.bundle", tokenizer=False)
    done = generate(capsys, "plain.bundle", "--tokenizer", f"{NAME}/tokenizer.json", "-p", "hello", *SHORT)
    assert done.out == line(expected("hello")[0])


# -- as a process ----------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-W", "error", "-m", "dijiang_export", "generate", "--threads", "1"]


def test_text_is_streamed(folder: Path) -> None:
    """The first characters are there long before the last."""
    command = [
        *COMMAND,
        "--prompt",
        "hello",
        "--ignore-eos",
        "--temperature",
        "1.5",
        "--seed",
        "1",
        "-n",
        "6000",
    ]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        first = time.monotonic() - started
        process.stdout.read()
        whole = time.monotonic() - started
        assert process.stderr is not None
        process.stderr.read()
    assert process.returncode == 0
    assert first < 0.8 * whole


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    command = [*COMMAND, "--prompt", "hello", "--ignore-eos", "-n", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 141
    assert b"Traceback" not in error


def test_undecodable_arguments() -> None:
    done = subprocess.run([*COMMAND, "--prompt", b"caf\xe9"], capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert "byte 0xe9 at offset 3" in done.stderr


def test_few_imports() -> None:
    """The first token should not wait for anything that one prompt does not need."""
    code = "import sys; from dijiang_export.cli import main; main(sys.argv[1:]); print(*sorted(sys.modules))"
    args = ["generate", "--prompt", "x", "-n", "2", "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"numpy", "onnxruntime", "tokenizers"} <= loaded
    assert not loaded & {
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "scipy",
        "rich",
        "hypothesis",
    }
