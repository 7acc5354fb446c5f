"""tokenizer.json is a stranger's program: it ends in time, within memory, and with a sentence."""

from __future__ import annotations

import base64
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.makers.toy_bundle import write_byte_tokenizer
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from dijiang_engines.errors import BundleError, DijiangError, PromptError
from dijiang_engines.tokenizer import apart as tokenizer_apart
from dijiang_engines.tokenizer import work as tokenizer_work
from dijiang_engines.tokenizer.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer

LETTERS = {chr(i): i - 32 for i in range(32, 127)}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def saved(tmp_path: Path, change: Callable[[Any], object], model: Any = None) -> Tokenizer:
    backend = Backend(model or models.BPE(LETTERS, []))
    change(backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json")


def normalizer(value: Any) -> Callable[[Any], object]:
    return lambda backend: setattr(backend, "normalizer", value)


def pre_tokenizer(value: Any) -> Callable[[Any], object]:
    return lambda backend: setattr(backend, "pre_tokenizer", value)


def decoder(value: Any) -> Callable[[Any], object]:
    return lambda backend: setattr(backend, "decoder", value)


def post_processor(value: Any) -> Callable[[Any], object]:
    return lambda backend: setattr(backend, "post_processor", value)


def split(pattern: str) -> Callable[[Any], object]:
    return pre_tokenizer(pre_tokenizers.Split(Regex(pattern), "isolated"))


DOUBLING = [normalizers.Replace("a", "aa")] * 40
BACKTRACKING = "a" * 30 + "b"
SQUARE = r"(?:a*a*)(?!.)\d"
OFTEN = processors.TemplateProcessing(single=["$A"] * 100_000, special_tokens=[])

HOSTILE: dict[str, tuple[Callable[[Any], object], str]] = {
    "a regex beyond the library's limit": (split(r"(a+)+$"), BACKTRACKING),
    "a regex just below it, at every letter": (split(SQUARE), "a" * 4000),
    "a normalizer's regex": (normalizer(normalizers.Replace(Regex(SQUARE), "")), "a" * 4000),
    "doubled forty times": (normalizer(normalizers.Sequence(DOUBLING)), "a"),
    "one replacement, a long one": (normalizer(normalizers.Replace("a", "b" * 5000)), "a" * 1_000_000),
    "bytes of bytes": (pre_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 40)), "é"),
    "bytes of bytes of a text": (normalizer(normalizers.Sequence([normalizers.ByteLevel()] * 40)), "é"),
    "a text put often": (post_processor(OFTEN), "a" * 10_000),
}


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_apart, "SECONDS", 0.5)


@pytest.mark.usefixtures("half_a_second")
@pytest.mark.parametrize("kind", HOSTILE)
def test_encoding_ends_with_a_sentence(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    change, text = HOSTILE[kind]
    tokenizer = saved(tmp_path, change)
    started = time.monotonic()
    with pytest.raises(BundleError) as caught:
        tokenizer.encode(text)
    assert time.monotonic() - started < 100  # of a second of CPU, on a machine that does other things too
    assert "tokenizer.json" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")
    if not kind.startswith("bytes"):
        assert set(tokenizer.encode("x")) == {LETTERS["x"]}  # it may be asked again


@pytest.mark.usefixtures("half_a_second")
def test_a_piece_of_any_length(tmp_path: Path) -> None:
    """Unigram tries all pieces that begin at a letter, WordPiece all pieces of a word."""
    pieces = [("a" * n, -1.0) for n in range(1, 2000)]
    tokenizer = saved(tmp_path, lambda backend: None, models.Unigram(pieces, 0))
    assert not tokenizer._encodes_here
    vocab = {"a": 0, "##a": 1, "[UNK]": 2}
    tokenizer = saved(tmp_path, lambda backend: None, models.WordPiece(vocab, max_input_chars_per_word=10**9))
    with pytest.raises(BundleError, match="takes too long"):
        tokenizer.encode("a" * 200_000 + "b")


@pytest.mark.usefixtures("half_a_second")
@pytest.mark.parametrize(
    "stage",
    [
        decoders.Sequence([decoders.Replace("a", "aa")] * 40),
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(r"(a+)+$"), "")]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(SQUARE), "")]),
    ],
    ids=["doubled", "backtracking", "square"],
)
def test_decoding_ends_with_a_sentence(tmp_path: Path, stage: Any) -> None:
    tokenizer = saved(tmp_path, decoder(stage))
    ids = [LETTERS["a"]] * 4000 + [LETTERS["b"]]
    with pytest.raises(BundleError, match="tokenizer"):
        tokenizer.decode(ids)
    with pytest.raises(BundleError, match="tokenizer"):
        tokenizer.continuation(ids[:10], ids[10:])


@pytest.mark.parametrize("call", ["decode", "continuation"])
def test_a_panic_is_a_sentence(tmp_path: Path, call: str) -> None:
    """The library's Strip panics at a token of nothing but what it strips."""
    tokenizer = saved(tmp_path, decoder(decoders.Strip("a", 0, 5)))
    ids = [LETTERS["b"], LETTERS["a"]]
    with pytest.raises(BundleError, match="fails to decode"):
        tokenizer.decode(ids) if call == "decode" else tokenizer.continuation([], ids)


def test_what_is_usual_runs_here(tmp_path: Path) -> None:
    """And costs nothing."""
    metaspace = pre_tokenizers.Metaspace()
    usual: list[Callable[[Any], object]] = [
        lambda backend: None,
        pre_tokenizer(pre_tokenizers.ByteLevel()),
        pre_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel()])),
        pre_tokenizer(metaspace),
        split(LLAMA_3),
        split(LLAMA_3.replace("{1,3}", "")),
        normalizer(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        normalizer(normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])),
        post_processor(processors.TemplateProcessing(single="a $A b", special_tokens=[("a", 1), ("b", 2)])),
        decoder(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
    ]
    for change in usual:
        assert saved(tmp_path, change)._apart is None


def test_an_unknown_regex_works_as_ever(tmp_path: Path) -> None:
    """In its own process, which ends with the tokenizer."""
    tokenizer = saved(tmp_path, split(r"x{3}|\d+|[^\d]"))
    text = "xxx 123 yyy\n" * 20_000
    text = "".join(c for c in text if c in LETTERS)
    ids = tokenizer.encode(text)
    assert ids == tokenizer._backend.encode(text).ids
    assert tokenizer.encode("") == []
    assert tokenizer.decode(ids[:50]) == tokenizer._backend.decode(ids[:50])
    assert tokenizer._apart is not None
    process = tokenizer._apart._process.running
    assert process is not None
    assert process.poll() is None
    del tokenizer
    gc.collect()
    assert process.poll() is not None


def test_special_tokens_apart(tmp_path: Path) -> None:
    def change(backend: Any) -> None:
        split(r"b+")(backend)
        backend.add_special_tokens(["<s>"])
        start = backend.token_to_id("<s>")
        post_processor(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)]))(
            backend
        )

    tokenizer = saved(tmp_path, change)
    start = tokenizer.token_id("<s>")
    assert tokenizer.encode("ab<s>") == [start, LETTERS["a"], LETTERS["b"], start]
    assert tokenizer.encode("ab", special_tokens=False) == [LETTERS["a"], LETTERS["b"]]


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    for change in (lambda backend: None, split("b+")):
        with pytest.raises(PromptError, match="surrogate"):
            saved(tmp_path, change).encode("a\ud800")


# -- files -----------------------------------------------------------------------------------------------


def test_files_that_are_no_ordinary_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(BundleError, match="not an ordinary file"):
        Tokenizer(path)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(BundleError, match="too large"):
        Tokenizer(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(BundleError, match="git lfs pull"):
        Tokenizer(path)
    path.write_text('{"version":"1.0","decoder":' + '{"type":"Sequence","decoders":[' * 10_000)
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer(path)
    path.unlink()
    write_byte_tokenizer(tmp_path / "elsewhere.json")
    path.symlink_to("elsewhere.json")
    assert Tokenizer(path).encode("é") == [257]


def test_pieces_that_would_take_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library keeps a node of some 350 bytes for every character of a piece."""
    monkeypatch.setattr(tokenizer_work, "MAX_UNIGRAM_CHARACTERS", 9 << 20)
    vocab = [[f"{n:08d}" + "x" * 10_000, -1.0] for n in range(1000)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}}))
    with pytest.raises(DijiangError, match="pieces are too long"):
        Tokenizer(path)


# -- loading ---------------------------------------------------------------------------------------------


def with_added_token(content: str, normalizer: Any) -> dict[str, Any]:
    """A tokenizer.json whose added token the library normalizes while it loads the file."""
    document: dict[str, Any] = json.loads(Backend(models.BPE(LETTERS, [])).to_str())
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    document["added_tokens"] = [{"id": len(LETTERS), "content": content, **kind}]
    document["normalizer"] = json.loads(normalizer.__getstate__())
    return document


@pytest.mark.usefixtures("half_a_second")
@pytest.mark.parametrize(
    ("content", "stage"),
    [
        ("aab", normalizers.Sequence(DOUBLING)),
        (BACKTRACKING, normalizers.Replace(Regex(r"(a|a)*$"), "")),
    ],
    ids=["doubled", "backtracking"],
)
@pytest.mark.parametrize("place", ["first", "last", "spelt out"])
def test_loading_ends_with_a_sentence(
    tmp_path: Path, content: str, stage: Any, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    document = with_added_token(content, stage)
    if place != "first":
        document["normalizer"] = document.pop("normalizer")  # behind the vocabulary
    text = json.dumps(document)
    if place == "spelt out":
        text = text.replace('"normalizer"', r'"\u006eormalizer"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer tokenizer\.json (fails|takes too|needs too)"):
        Tokenizer(tmp_path / "tokenizer.json")
    assert capfd.readouterr() == ("", "")


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    """The library would keep the first normalizer, other readers the last."""
    document = with_added_token("aab", normalizers.Sequence(DOUBLING))
    text = json.dumps(document)
    for twice in (f'{{"normalizer":null,{text[1:]}', f'{text[:-1]},"normalizer":null}}'):
        (tmp_path / "tokenizer.json").write_text(twice)
        with pytest.raises(BundleError, match="the key 'normalizer' twice"):
            Tokenizer(tmp_path / "tokenizer.json")


def test_a_normalizer_that_is_apart_works_as_ever(tmp_path: Path) -> None:
    document = with_added_token("xay", normalizers.Replace(Regex("[aeiou]+"), "_"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert not tokenizer._encodes_here
    backend = Backend.from_str(json.dumps(document))
    for text in ("", "xaybeautiful", "x_y xeey\u00e9"):
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == backend.decode(ids)


MANY: dict[str, Callable[[], dict[str, Any]]] = {
    "before a text": lambda: {"normalizer": {"type": "Prepend", "prepend": "x" * 200_000}},
    "one special token": lambda: {
        "post_processor": {
            "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "single": [{"SpecialToken": {"id": "z", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"z": {"id": "z", "ids": [1] * 200_000, "tokens": ["z"] * 200_000}},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", MANY)
def test_many_tokens_of_a_short_text(tmp_path: Path, kind: str) -> None:
    document = json.loads(Backend(models.BPE(LETTERS, [])).to_str()) | MANY[kind]()
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="too many tokens"):
        Tokenizer(tmp_path / "tokenizer.json").encode("ab")


@pytest.mark.parametrize(("size", "here"), [(33, True), (10_000, False)])
def test_what_sentencepiece_makes_of_a_character(size: int, here: bool) -> None:
    """Its table may turn a character into a text of any length."""

    class Stub:
        normalizer = normalizers.Lowercase()

        def __init__(self) -> None:
            table = (4).to_bytes(4, "little") + bytes(4) + b"x" * size + b"\0"
            state = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
            self.normalizer.__setstate__(json.dumps(state).encode())

    assert tokenizer_work.normalizing_is_bounded(Stub()) is here
