"""The text of generations, whole and resumed: all that was given out is what decoding all tokens gives.

`Scripted` fakes a model that says given tokens, so it proves what becomes of them and nothing about numbers.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.makers.toy_bundle import SPEC, make_bundle
from support.oracles.array_rows import ArrayRows
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from dijiang_engines.errors import PromptError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generation, Generator
from dijiang_engines.generation.prompts import read_prompt
from dijiang_engines.generation.session import load_session, save_session
from dijiang_engines.generation.stop import StopMatcher
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.cli import main

TOKENS = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "a"]
SCRIPT = [
    *(1 + byte for byte in "日한".encode()), 257, 258, *(1 + byte for byte in "é".encode()), 259, 1 + 0xE6,
    259, 258, *(1 + byte for byte in "😀".encode()[:3]), 257, *(1 + byte for byte in "日".encode()),
]  # fmt: skip


class Scripted(ArrayRows):
    """After n tokens, whatever they are, comes SCRIPT[n - 1]."""

    name, all_logits, spec = "scripted", False, replace(SPEC, eos_token_ids=(0,))

    def new_state(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((batch, *self.spec.state_shape), np.float32) for _ in range(self.spec.num_layers)]

    def prefill(self, ids: Any, positions: Any, lens: Any, state: Any) -> np.ndarray:
        logits = np.zeros((len(ids), 1, self.spec.vocab_size), np.float32)
        for row, count in enumerate((positions + lens).tolist()):
            logits[row, 0, (SCRIPT * 3)[count - 1]] = 1
        return logits

    step = prefill

    def export_state(self, state: Any) -> list[np.ndarray]:
        return [layer.copy() for layer in state]

    import_state = export_state


@pytest.fixture
def generator(tmp_path: Path) -> Generator:
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="a"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return Generator(Scripted(), Tokenizer(tmp_path / "tokenizer.json"))


def text_of(generation: Generation) -> str:
    """What the events say, which is what the completion says."""
    joined = generation.openings[0] + "".join(event.text for event in generation)
    assert joined == generation.completions[0].text
    return joined


def whole(generator: Generator, ids: list[int]) -> str:
    assert generator.tokenizer is not None
    return str(generator.tokenizer._backend.decode(ids))


@pytest.mark.parametrize("count", range(1, len(SCRIPT) + 1))
def test_a_text_that_ends_anywhere_is_complete(generator: Generator, count: int) -> None:
    text = text_of(generator.start([[259]], GenerateOptions(count)))
    assert "a" + text == whole(generator, [259, *SCRIPT[:count]])


@pytest.mark.parametrize("first", range(len(SCRIPT)))
def test_two_runs_say_what_one_says(generator: Generator, first: int, tmp_path: Path) -> None:
    """Cut within characters, within runs of bytes, after each token; with a file between the runs."""
    make_bundle(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    begun = generator.start([[259]], GenerateOptions(first, resumable=True))
    text = text_of(begun)
    assert whole(generator, [259, *SCRIPT]).startswith("a" + text)
    save_session(tmp_path / "s", begun.session(), bundle)
    session = load_session(tmp_path / "s", bundle)
    rest = generator.start([], GenerateOptions(len(SCRIPT) - first), session=session)
    assert "a" + text + text_of(rest) == whole(generator, [259, *SCRIPT])


def test_without_resuming_nothing_is_held_back(generator: Generator) -> None:
    """And the character that was given out as U+FFFD comes whole if somebody goes on all the same."""
    begun = generator.start([[259]], GenerateOptions(2))
    assert text_of(begun) == "\ufffd\ufffd"
    rest = generator.start([], GenerateOptions(5), session=begun.session())
    assert text_of(rest) == "日한 the"


@pytest.mark.parametrize("stop", ["한 the", "한 them", "日한", " cat", "a\ufffd", "é"])
@pytest.mark.parametrize("first", range(len(SCRIPT)))
def test_a_stop_string_across_two_runs(generator: Generator, stop: str, first: int) -> None:
    """None of it is printed, whichever run sees its beginning and its end."""
    options = GenerateOptions(len(SCRIPT), stop=(stop,))
    everything = whole(generator, [259, *SCRIPT])[1:]
    expected = everything.split(stop)[0]
    assert text_of(generator.start([[259]], options)) == expected
    begun = generator.start([[259]], replace(options, max_tokens=first, resumable=True))
    text = text_of(begun)
    if begun.completions[0].finish_reason == "stop":
        assert text == expected
        return
    session = begun.session()
    rest = generator.start([], replace(options, max_tokens=len(SCRIPT) - first), session=session)
    assert text + text_of(rest) == expected


def test_a_new_prompt_comes_after_what_was_held_back(generator: Generator) -> None:
    begun = generator.start([[259]], GenerateOptions(6, resumable=True))
    assert text_of(begun) == ""
    rest = generator.start([[257, 258]], GenerateOptions(1), session=begun.session())
    assert rest.openings == ["日한"]
    assert text_of(rest) == "日한" + "\ufffd"
    done = generator.start([[257]], GenerateOptions(0), session=begun.session())
    assert text_of(done) == "日한"


def test_the_end_of_a_text_is_its_end(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an end-of-text token nothing is waited for, and the next run repeats nothing."""
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", [*SCRIPT[:2], 0, 257, 257])
    begun = generator.start([[259]], GenerateOptions(9, resumable=True))
    assert text_of(begun) == "\ufffd\ufffd"
    assert begun.completions[0].finish_reason == "eos"
    rest = generator.start([], GenerateOptions(1), session=begun.session())
    assert text_of(rest) == " the"


@pytest.mark.parametrize("cuts", range(8))
def test_stop_strings_do_not_depend_on_the_pieces(cuts: int) -> None:
    """Of two that overlap the one that is complete first counts, also if both come in one piece."""
    stops, text = ["abcd", "bc", "xyz", "cab"], "zzabxycabcdxyz"
    places = [i for i in range(1, len(text)) if random.Random(cuts * 100 + i).random() < 0.4] if cuts else []
    matcher = StopMatcher(stops)
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert "".join(map(matcher.push, pieces)) + matcher.flush() == "zzabxy"
    assert StopMatcher(["abcd", "bc"]).push("abcd") == "a"


# -- the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(1, 12))
def test_two_commands_say_what_one_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """A real model that samples bytes at random: most of its characters are halves."""
    make_bundle(tmp_path / "tiny-stdlib.bundle")
    monkeypatch.chdir(tmp_path)
    common = ["generate", "--threads", "1", "-t", "3", "--seed", "3", "--ignore-eos"]

    def run(*arguments: str) -> dict[str, Any]:
        assert main([*common, *arguments, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out)["completions"][0])

    one = run("-p", "日 hello", "-n", "40")
    begun = run("-p", "日 hello", "-n", str(first), "--save-session", "s")
    rest = run("--session", "s", "-n", str(40 - first))
    assert begun["token_ids"] + rest["token_ids"] == one["token_ids"]
    assert begun["text"] + rest["text"] == one["text"]
    tokenizer = Tokenizer(tmp_path / "tiny-stdlib.bundle" / "tokenizer.json")
    ids = tokenizer.encode("日 hello") + one["token_ids"]
    assert "日 hello" + one["text"] == tokenizer._backend.decode(ids)
    assert main([*common, "-p", "日 hello", "-n", "40"]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == one["text"].removesuffix("\n")


def test_a_prompt_may_be_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["hello\n"])
    writer.start()
    assert read_prompt(tmp_path / "pipe") == "hello"
    writer.join()


def test_standard_input_that_is_closed() -> None:
    code = "from dijiang_engines.generation.prompts import read_prompt\nread_prompt('-')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PromptError: cannot read the prompt from standard input\n  got: it is closed" in done.stderr


def test_names_that_no_file_has() -> None:
    with pytest.raises(PromptError, match="cannot read the prompt"):
        read_prompt("a\0b")
