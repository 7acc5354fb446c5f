"""The tokenizer wrapper: text in whole characters, ids that are no tokens, files that are no tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.makers.toy_bundle import write_byte_tokenizer

from dijiang_engines.errors import BundleError
from dijiang_engines.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_byte_tokenizer(path)
    return Tokenizer(path)


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """The token of one byte, whatever text it may be part of."""
    from tokenizers.pre_tokenizers import ByteLevel

    shown = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0]
    if byte < 128:
        found = tokenizer.token_id(shown)
    else:
        # GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others follow from U+0100 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        found = tokenizer.token_id(chr(byte if byte in printable else 256 + others.index(byte)))
    assert found is not None
    return found


def test_round_trip(tokenizer: Tokenizer) -> None:
    text = "def f():\n    return 'naïve é ☃ 😀'"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 257 in ids  # the merged é


def test_ids_and_mask(tokenizer: Tokenizer) -> None:
    assert tokenizer.ids.tolist() == list(range(258))
    mask = tokenizer.token_mask(260)
    assert mask.shape == (260,)
    assert mask[:258].all()
    assert not mask[258:].any()
    with pytest.raises(BundleError, match="token id 257"):
        tokenizer.token_mask(257)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id("<|endoftext|>") == 0
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.special_ids() == [0]
    assert tokenizer.encode("a<|endoftext|>b")[1] == 0
    assert tokenizer.decode([0, *tokenizer.encode("ab"), 0]) == "ab"
    assert tokenizer.decode([0], skip_special=False) == "<|endoftext|>"


def test_a_stream_never_gives_half_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    given = [stream.push(byte_id(tokenizer, b)) for b in "a😀é b".encode()]
    assert given == ["a", "", "", "", "😀", "", "é", " ", "b"]
    assert stream.finish() == ""


def test_half_a_character_at_the_end(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    given = "".join(stream.push(byte_id(tokenizer, b)) for b in "a😀".encode()[:-1])
    assert given == "a"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.finish() == ""


def test_bytes_that_are_no_text_do_not_block_the_stream(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    bad = byte_id(tokenizer, 0xFF)
    assert [stream.push(bad) for _ in range(200)] == ["\ufffd"] * 200
    assert stream.push(byte_id(tokenizer, ord("x"))) == "x"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(0, 20))
def test_streaming_equals_decoding(tokenizer: Tokenizer, text: str, split: int) -> None:
    """Whatever the text and wherever its context ends (at a character: a prompt is text)."""
    raw = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    ids = tokenizer.encode(raw)
    context = tokenizer.encode(raw[:split])
    rest = tokenizer.encode(raw[split:])
    stream = tokenizer.stream(context)
    given = "".join(map(stream.push, rest)) + stream.finish()
    assert given == raw[split:]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == raw


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=80))
def test_any_tokens_stream_without_loss(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Bytes that are no text come out too, as decoding gives them."""
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_leading_spaces_of_sentencepiece_like_tokenizers(tmp_path: Path) -> None:
    """Their decoders drop the first space of what they are given: not of every piece of a stream."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2, "!": 3}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    stream = Tokenizer(tmp_path / "tokenizer.json").stream(context=[1])
    assert [stream.push(i) for i in (2, 3, 1, 2)] == [" world", "!", " hello", " world"]


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    write_byte_tokenizer(path)
    data = json.loads(path.read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(data))
    assert len(Tokenizer(path).encode("abcdefgh")) == 8


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"model": {"type": "Evil"}}'])
def test_files_that_are_no_tokenizers(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("apart", [False, True])
def test_where_each_token_ends(tmp_path: Path, apart: bool) -> None:
    """In characters of the text itself, whatever a tokenizer makes of it; here and in its own process."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    library = Library(models.WordLevel({"<s>": 0, "ab": 1, "é": 2, "?": 3}, unk_token="?"))
    library.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    if apart:
        from dijiang_engines.tokenizer.apart import TokenizerApart

        tokenizer._encodes_here = False
        tokenizer._apart = TokenizerApart((tmp_path / "tokenizer.json").read_bytes(), "tokenizer.json")
    text = "AB  e\u0301 🐍ab "
    ids, ends = tokenizer.encode_with_ends(text)
    assert ids == tokenizer.encode(text) == [0, 1, 2, 3, 1]
    assert ends == [0, 2, 5, 8, 10]  # the library says that é ends before its accent
    assert tokenizer.encode_with_ends(text, special_tokens=False) == (ids[1:], ends[1:])
