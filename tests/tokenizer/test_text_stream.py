"""Streams of text against the library's decoding of everything: whatever the decoder, the cut, the context.

Every tokenizer here is the library's own, and so is the oracle: `Tokenizer.decode` of all ids at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from dijiang_engines.generation.stop import StopMatcher
from dijiang_engines.tokenizer.decoder_stages import Pipeline, pipeline_for
from dijiang_engines.tokenizer.tokenizer import Tokenizer

WORDS = [
    "the", " cat", "naïve", "日", "한", "日本語", "😀", "👩‍👩‍👧", "é", " ", "  ", "\n", "'s",
    " do not", "n't", ".", " .", "�", "\u200d", "a", "<s>", "<extra>", "def f():",
]  # fmt: skip
TEXT = [c for word in WORDS for c in word]


def bytes_as_tokens(data: bytes) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in data]


def byte_level(data: bytes) -> str:
    """Bytes as GPT-2's characters, from the library: it maps a text's bytes one by one."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = {}
    for code in [*range(128), *range(0x80, 0x800, 0x20), *range(0x80, 0xC0)]:
        shown = alphabet.pre_tokenize_str(chr(code))[0][0]
        known |= dict(zip(chr(code).encode(), shown, strict=True))
    rest = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in known.values()]
    missing = [byte for byte in range(256) if byte not in known]
    # Bytes that no text has; GPT-2 gives printable Latin-1 itself, and these are all printable but none.
    known |= {byte: chr(byte) for byte in missing if chr(byte) in rest}
    return "".join(known[byte] for byte in data)


def words(tokens: Sequence[str], decoder: Any) -> Backend:
    backend = Backend(models.WordLevel({t: i for i, t in enumerate(dict.fromkeys(tokens))}, unk_token="the"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", lstrip=True, rstrip=True), "</s>"])
    backend.add_tokens([AddedToken("<extra>", normalized=False), AddedToken("extra words", single_word=True)])
    return backend


def sentencepiece(*stages: Any) -> Callable[[], Backend]:
    tokens = [*bytes_as_tokens(bytes(range(256))), "▁", "▁the", "▁cat", *TEXT, "▁日", "▁▁"]
    return lambda: words(tokens, decoders.Sequence(list(stages)))


def byte_level_bpe() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [byte_level(word.encode()) for word in WORDS]
    halves = [piece[:cut] for piece in pieces for cut in range(2, len(piece))]
    return words([*alphabet, *pieces, *halves, *(p[1:] for p in pieces)], decoders.ByteLevel())


def pieces(decoder: Any, mark: str = "", end: str = "") -> Callable[[], Backend]:
    tokens = [m + word + e for word in WORDS for m in ("", mark) for e in ("", end)]
    return lambda: words([*tokens, "<pad>", "|", "##", ""], decoder)


UNDERSCORE = decoders.Replace("▁", " ")
KINDS: dict[str, Callable[[], Backend]] = {
    "byte level": byte_level_bpe,
    "llama 2": sentencepiece(
        UNDERSCORE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ),
    "gemma": sentencepiece(UNDERSCORE, decoders.ByteFallback(), decoders.Fuse()),
    "fallback, not fused": sentencepiece(decoders.ByteFallback(), decoders.Metaspace()),
    "strips both ends": sentencepiece(UNDERSCORE, decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 3, 2)),
    "strips every token": sentencepiece(UNDERSCORE, decoders.Strip(" ", 1, 0), decoders.ByteFallback()),
    "metaspace": pieces(decoders.Metaspace(), "▁"),
    "metaspace, never": pieces(decoders.Metaspace(prepend_scheme="never"), "▁"),
    "wordpiece": pieces(decoders.WordPiece(), "##"),
    "wordpiece, as it is": pieces(decoders.WordPiece(cleanup=False), "##"),
    "bpe": pieces(decoders.BPEDecoder(), "", "</w>"),
    "bpe, suffix anywhere": pieces(decoders.BPEDecoder("a")),
    "bpe, then more": pieces(decoders.Sequence([decoders.BPEDecoder(), decoders.WordPiece()]), "##", "</w>"),
    "ctc": pieces(decoders.CTC()),
    "ctc, cleaned of words": pieces(decoders.CTC("the", "a", cleanup=False)),
    "nothing": pieces(None),
    "replace in all": pieces(
        decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", "."), decoders.Replace("aa", "a")])
    ),
    "byte level, then more": lambda: words(
        [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</w>", "a</w>", byte_level("日".encode())],
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 9)]),
    ),
    "regex in all": pieces(
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(r"a+ |^\s|\s$"), "_")])
    ),
    "cleanup in all": pieces(decoders.Sequence([decoders.Fuse(), decoders.WordPiece(), decoders.CTC()])),
    "byte level of words": pieces(decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])),
}  # fmt: skip
WAITING = {"regex in all", "cleanup in all", "byte level of words"}
"""Where every word may depend on every other: nothing is certain before the end."""
FIRST = {"strips both ends": ["a"], "byte level, then more": ["a</w>"]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS[request.param]().save(str(path))
    return request.param, Tokenizer(path)


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    found = [tokenizer.token_id(token) for token in tokens]
    assert None not in found
    return [i for i in found if i is not None]


def oracle(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The library panics where Strip meets a text of nothing but what it strips, so FIRST prevents that."""
    return tokenizer._backend.decode(list(ids), skip_special_tokens=True) if ids else ""


def lists_of_ids(kind: tuple[str, Tokenizer], count: int) -> Iterator[list[int]]:
    """Anything at all, texts in bytes as far as there are tokens for them, repetitions, unknown ids."""
    name, tokenizer = kind
    rng = random.Random(3)
    ids = tokenizer.ids.tolist()
    first = ids_of(tokenizer, *FIRST.get(name, []))
    for _ in range(count):
        some = rng.choices(ids, k=rng.choice([2, 5, 40]))
        made: list[int] = []
        while len(made) < rng.choice([0, 1, 2, 3, 8, 30]):
            data = "".join(rng.choices(WORDS, k=3)).encode()
            data = data[: rng.randint(0, len(data))]
            spelt = rng.choice([bytes_as_tokens(data), list(byte_level(data)), rng.choices(WORDS, k=3)])
            known = [i for i in map(tokenizer.token_id, spelt) if i is not None]
            made += rng.choice([rng.choices(some, k=2), known, made[-1:], [ids[-1] + 7]])
        yield first + made


def stream_all(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join(map(stream.push, ids)) + stream.finish()


def test_pieces_are_the_text(kind: tuple[str, Tokenizer]) -> None:
    """And none is ever taken back: what is given out so far is how the whole begins."""
    for ids in lists_of_ids(kind, 100):
        whole = oracle(kind[1], ids)
        stream, given = kind[1].stream(), ""
        for number, token in enumerate(ids):
            given += stream.push(token)
            assert whole.startswith(given), ids
            assert given + stream.rest() == oracle(kind[1], ids[: number + 1]), ids
        assert given + stream.finish() == whole, ids
        assert stream.finish() == ""


def test_contexts_of_any_length(kind: tuple[str, Tokenizer]) -> None:
    rng = random.Random(4)
    for ids in lists_of_ids(kind, 100):
        cut = rng.randint(0, len(ids))
        before, whole = oracle(kind[1], ids[:cut]), oracle(kind[1], ids)
        given = kind[1].continuation(ids[:cut], ids[cut:])
        if whole.startswith(before):
            assert given == whole[len(before) :], (ids, cut)
        else:  # the context ends in what the rest changes: from there on
            same = next(
                n for n, (a, b) in enumerate(zip(before + "\0", whole + "\1", strict=False)) if a != b
            )
            assert given == whole[same:], (ids, cut)


def test_a_resumed_stream_goes_on_where_the_first_ended(kind: tuple[str, Tokenizer]) -> None:
    """At every cut: what the first gave out, the second does not; what the first held back, it does."""
    for ids in lists_of_ids(kind, 20):
        whole = oracle(kind[1], ids)
        for cut in range(len(ids) + 1):
            first = kind[1].stream()
            given = "".join(map(first.push, ids[:cut]))
            second = kind[1].stream(ids[:cut], held=len(first.rest()))
            given += "".join(map(second.push, ids[cut:])) + second.finish()
            assert given == whole, (ids, cut)


@pytest.mark.parametrize("stops", [["日"], ["cat", "at t"], ["\ufffd"], ["</s>", "e", "ee"], ["the", "he  "]])
def test_stop_strings(kind: tuple[str, Tokenizer], stops: list[str]) -> None:
    """Across pieces and resumptions: the text before the one that is complete first, and no more ever."""
    rng = random.Random(5)
    for ids in lists_of_ids(kind, 20):
        whole = oracle(kind[1], ids)
        ends = [(end, -len(s)) for end in range(len(whole) + 1) for s in stops if whole[:end].endswith(s)]
        expected = whole[: sum(min(ends))] if ends else whole
        cut, held = rng.randint(0, len(ids)), 0
        given, matcher = "", StopMatcher(stops)
        for part, context in ((ids[:cut], []), (ids[cut:], ids[:cut])):
            matcher = StopMatcher(stops) if not matcher.found else matcher
            stream = kind[1].stream(context, held=held)
            given += "".join(matcher.push(stream.push(token)) for token in part)
            held = len(matcher.held) + len(stream.rest())
            assert expected.startswith(given), (ids, cut)
        given += matcher.push(stream.finish()) + matcher.flush()
        assert given == expected, (ids, cut)


def test_text_comes_as_soon_as_it_is_certain(kind: tuple[str, Tokenizer]) -> None:
    """Else a stream that waits for the end would pass everything above."""
    name, tokenizer = kind
    letters = [i for i in map(tokenizer.token_id, ["a", " cat", "é", "."]) if i is not None]
    ids = ids_of(tokenizer, *FIRST.get(name, [])) + letters
    stream = tokenizer.stream()
    given = "".join(map(stream.push, ids * 20))
    whole = oracle(tokenizer, ids * 20)
    assert len(whole) > 30
    assert len(given) == 0 if name in WAITING else len(whole) - len(given) < 20


def test_the_cost_of_a_token_does_not_grow(kind: tuple[str, Tokenizer]) -> None:
    """Runs of one token, such as bytes that are no text: eight times as many take eight times as long."""

    def seconds(ids: list[int]) -> float:
        started = time.process_time()
        stream_all(kind[1], ids)
        return time.process_time() - started

    for token in random.Random(6).sample(kind[1].ids.tolist(), 2):
        seconds([token] * 100)
        short, long = (min(seconds([token] * n) for _ in range(2)) for n in (1000, 8000))
        assert long < 8 * 4 * short + 0.05


# -- what was found to go wrong --------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path: Path) -> Tokenizer:
    KINDS["llama 2"]().save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json")


def test_letters_after_byte_tokens(llama: Tokenizer) -> None:
    ids = ids_of(llama, *bytes_as_tokens("日한".encode()), "▁the", "▁cat")
    stream = llama.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "", "", "", "日한 the", " cat"]


def test_a_byte_undoes_the_whole_run(llama: Tokenizer) -> None:
    ids = ids_of(llama, "a", *bytes_as_tokens("日".encode() + b"\xff"), "a")
    stream = llama.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "", "\ufffd" * 4 + "a"]


def test_a_replacement_character_of_the_vocabulary_is_text(llama: Tokenizer) -> None:
    stream = llama.stream()
    assert [stream.push(i) for i in ids_of(llama, "a", "�", "�", "a")] == ["a", "\ufffd", "\ufffd", "a"]


def test_the_first_space_is_stripped_once(llama: Tokenizer) -> None:
    ids = ids_of(llama, "▁the", "▁cat")
    assert [llama.continuation(ids[:n], ids[n:]) for n in range(3)] == ["the cat", " cat", ""]
    assert llama.continuation(ids * 100, ids) == " the cat"


def test_a_decoder_that_is_not_as_expected_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the library may treat tokens otherwise: slow, and never wrong."""
    KINDS["metaspace"]().save(str(tmp_path / "tokenizer.json"))

    class Other:
        def push(self, items: list[str]) -> list[str]:
            return ["" for _ in items]

        def finish(self) -> list[str]:
            return []

    other = Pipeline([Other()])
    monkeypatch.setattr("dijiang_engines.tokenizer.decoder_stages.pipeline_for", lambda _: other)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = ids_of(tokenizer, "▁the", "▁a", "</s>", "日")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == [""] * 4
    assert stream.finish() == tokenizer.decode(ids) == "the a日"


def test_every_decoder_is_known() -> None:
    """A decoder that `tokenizers` gains, or an unknown stage, is no error but waits."""
    known = {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence",
             "Strip", "WordPiece"}  # fmt: skip
    assert known == {name for name in vars(decoders) if name[0].isupper()} - {"DecodeStream", "Decoder"}
    for name in known - {"Replace", "Sequence"}:
        made = [getattr(decoders, name)()]
        assert pipeline_for(decoders.Sequence(made)).push(["a"]) in ("a", "")


def test_normalizers_and_regexes_do_not_matter_to_text(tmp_path: Path) -> None:
    backend = KINDS["wordpiece"]()
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = tokenizer.encode("THE")
    assert stream_all(tokenizer, ids) == oracle(tokenizer, ids) == "the"
