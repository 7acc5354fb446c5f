"""Tokenizers beside models that have fewer tokens than they, and folders without tokenizer.json."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.makers.byte_tokenizer import write_tokenizer
from support.makers.checkpoints import llama, neox, of_family
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from dijiang_engines.errors import BundleError, CheckpointError, PromptError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator, SamplingOptions
from dijiang_engines.runners import open_runner
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.cli import cli
from dijiang_export.export.to_onnx import export_bundle

VOCAB = 257  # 256 bytes and <|endoftext|>


def add_tokens(path: Path, *tokens: str) -> None:
    """As a user does it who adds tokens and forgets the model."""
    library = Library.from_file(str(path))
    assert library.add_special_tokens(list(tokens)) == len(tokens)
    library.save(str(path))


@pytest.fixture
def padded(tmp_path: Path) -> Path:
    folder = neox(layers=1, vocab=VOCAB).with_tokenizer().save(tmp_path / "m")
    add_tokens(folder / "tokenizer.json", "<pad>")
    return folder


def notes_of(folder: Path) -> list[str]:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.notes


def test_an_added_token_is_noted(padded: Path) -> None:
    (note,) = notes_of(padded)
    assert "'<pad>' (257)" in note
    assert "vocab_size = 257" in note
    add_tokens(padded / "tokenizer.json", *(f"<extra_{i}>" for i in range(7)))
    (note,) = notes_of(padded)
    assert "'<extra_3>' (261) and 3 more" in note


def test_a_tokenizer_that_fits_has_no_note(tmp_path: Path) -> None:
    assert notes_of(neox(vocab=VOCAB).with_tokenizer().save(tmp_path / "m")) == []
    assert notes_of(neox(vocab=VOCAB + 40).with_tokenizer().save(tmp_path / "n")) == []


@pytest.mark.parametrize(
    "model",
    [
        Unigram([(f"piece{i}", -1.0) for i in range(258)], unk_id=0),
        WordLevel({f"word{i}": i for i in range(258)}, unk_token="word0"),
        BPE(vocab={f"{i}": i for i in range(258)}, merges=[]),
    ],
    ids=["unigram", "word-level", "bpe"],
)
def test_only_added_tokens_may_lie_beyond(model: object, padded: Path) -> None:
    path = padded / "tokenizer.json"
    Library(model).save(str(path))
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        notes_of(padded)
    assert "id 257" in str(caught.value)
    with pytest.raises(BundleError, match="token id 257"):
        Tokenizer(path).token_mask(VOCAB)
    # The same id, if the file says that it was added.
    last = Library.from_file(str(path)).id_to_token(257)
    library = Library.from_file(str(path))
    library.add_special_tokens([last])
    library.save(str(path))
    assert f"{last!r} (257)" in notes_of(padded)[0]
    assert Tokenizer(path).token_mask(VOCAB).all()


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("padded")
    source = neox(layers=1, vocab=VOCAB).with_tokenizer().save(folder / "m")
    add_tokens(source / "tokenizer.json", "<pad>", "<far>")
    report = export_bundle(source, folder / "b", cases="none")
    assert any("'<pad>' (257), '<far>' (258)" in note for note in report.notes)
    bundle = open_bundle(folder / "b")
    assert bundle.tokenizer_path is not None
    runner = open_runner(bundle, "cpu", threads=1)
    return Generator(runner, Tokenizer(bundle.tokenizer_path))


def test_such_a_token_is_never_generated(generator: Generator) -> None:
    sampling = SamplingOptions(temperature=50.0)  # every token that may come does
    options = GenerateOptions(max_tokens=400, sampling=sampling, ignore_eos=True)
    generation = generator.start(["abc", "x"], options)
    for _ in generation:
        pass
    seen = {token for completion in generation.completions for token in completion.token_ids}
    assert len(seen) > 150
    assert max(seen) < VOCAB
    assert all("<pad>" not in completion.text for completion in generation.completions)


def test_a_prompt_with_such_a_token_is_refused(generator: Generator) -> None:
    with pytest.raises(PromptError, match="does not have") as caught:
        generator.start(["abc<pad>"])
    assert "'<pad>', id 257" in str(caught.value)
    for ids in ([1, 258], [-1], [2**40]):
        with pytest.raises(PromptError, match="does not have") as caught:
            generator.start([ids])
        assert f"id {ids[-1]}" in str(caught.value)


def test_commands_show_the_note(padded: Path) -> None:
    for command in (["inspect"], ["to-onnx", "--cases", "none"]):
        arguments = [command[0], str(padded), *command[1:], "--json"]
        if command[0] == "to-onnx":
            arguments.insert(2, str(padded.parent / "out.bundle"))
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert "'<pad>' (257)" in result.stderr
        found = json.loads(result.stdout)
        assert "'<pad>' (257)" in found.get("checkpoint", found)["notes"][0]


# Without tokenizer.json


def write_slow_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt, as GPT-NeoX's and OPT's publishers have them."""
    names = ["<|endoftext|>", "<|padding|>", *sorted(ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_the_noted_command_makes_a_tokenizer(family: str, tmp_path: Path) -> None:
    folder = of_family(family, vocab=VOCAB + 1).save(tmp_path / "it's a model")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    write_slow_tokenizer(folder)
    (note,) = notes_of(folder)
    assert "only vocab.json, merges.txt" in note
    program, *arguments = shlex.split(note.partition("installed: ")[2])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    assert notes_of(folder) == []
    text = "def f(x): return 'é'"
    tokenizer = Tokenizer(folder / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_is_named(name: str, tmp_path: Path) -> None:
    folder = llama().save(tmp_path / "m")
    (folder / name).write_bytes(b"\n\x0e\n\x05<unk>")
    (note,) = notes_of(folder)
    assert f"only {name}" in note
    assert "sentencepiece" in note
    write_tokenizer(folder, 256)
    assert notes_of(folder) == []
