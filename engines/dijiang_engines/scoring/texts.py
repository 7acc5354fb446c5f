"""Texts to score, and the streams of tokens that they become.

A stream is what a model reads from one end to the other; its first token is given and every other one is
predicted once. By default each text is a stream of its own, which begins with

    the tokens that the tokenizer puts before a text, such as LLaMA's <s>;
    or else the model's beginning-of-text token, if it has one;
    or else nothing: the text's own first token is then the one that is given.

With a separator all texts are one stream: the separator, the first text, the separator, the second text, ...,
the separator. A text's closing separator counts as a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dijiang_engines.errors import TextError, UsageError
from dijiang_engines.formats.safe_files import LIMITS, read_bounded
from dijiang_engines.runners.base import IntArray
from dijiang_engines.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A text to score, exactly as it stands in its file: no line end or byte order mark is left out."""

    name: str
    """For messages and tables: the file's."""
    text: str


@dataclass(frozen=True)
class Joining:
    """What stands around texts; tokens by the names that they have in the vocabulary."""

    begin: str | None = None
    """The token that each stream begins with, in place of what the tokenizer and the model would have."""
    bare: bool = False
    """Nothing stands before a text."""
    separator: str | None = None
    """The token before, between and behind all texts, which are one stream then."""


@dataclass(frozen=True)
class Part:
    """Tokens of a stream that count for one text."""

    text: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stream:
    """Tokens that a model reads from one end to the other."""

    ids: IntArray
    """[n] int64, n at least 2."""
    ends: IntArray
    """[n] int64: bytes of UTF-8 of the texts up to the end of each token."""
    parts: tuple[Part, ...]

    @property
    def predicted(self) -> int:
        """All tokens but the first."""
        return len(self.ids) - 1

    def cut(self, tokens: int) -> Stream:
        """The beginning of the stream, with at most `tokens` predicted ones."""
        stop = min(len(self.ids), tokens + 1)
        parts = tuple(Part(p.text, p.start, min(p.stop, stop)) for p in self.parts if p.start < stop)
        return Stream(self.ids[:stop], self.ends[:stop], parts)

    def bytes_of(self, part: Part) -> int:
        """Bytes of the part's predicted tokens. A character whose tokens the cut parts counts whole."""
        first = max(part.start, 1)
        return int(self.ends[part.stop - 1] - self.ends[first - 1]) if part.stop > first else 0


def read_text(path: Path) -> Text:
    """A file's text.

    Raises:
        TextError: it is missing, no ordinary file, larger than `LIMITS["text"]`, empty, binary or not UTF-8.
    """
    data = read_bounded(path, LIMITS["text"], links=True, error=TextError)
    if not data:
        raise TextError(f"{path} is empty", expected="text")
    if (zero := data.find(b"\0")) >= 0:
        raise TextError(f"{path} is no text: it holds a zero byte", got=f"at offset {zero}")
    try:
        return Text(str(path), data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8",
            got=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from error


def make_streams(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    bos: int | None = None,
    joining: Joining | None = None,
    limit: int | None = None,
    same_as: Tokenizer | None = None,
) -> list[Stream]:
    """Texts as streams of tokens, in their order.

    Args:
        texts: at least one.
        tokenizer: the model's.
        vocab_size: the model's: a token beyond it is refused.
        bos: the model's beginning-of-text token.
        joining: what stands around texts.
        limit: most tokens that are to be predicted, over all texts: what comes later is left out.
        same_as: another model's tokenizer, which must give the same tokens.

    Raises:
        TextError: a text gives fewer than two tokens, or one that the model does not have.
        UsageError: a token that is not in the vocabulary; options that exclude each other; the tokenizers
            differ.
        BundleError: the tokenizer fails.
    """
    encoder = _Encoder(tokenizer, vocab_size, bos, joining or Joining(), same_as)
    if encoder.separator is not None:
        return [_cut(encoder.joined(texts), limit)]
    streams: list[Stream] = []
    left = limit
    for index, text in enumerate(texts):
        if left == 0:
            break
        streams.append(_cut(encoder.alone(index, text), left))
        left = None if left is None else left - streams[-1].predicted
    return streams


def _cut(stream: Stream, limit: int | None) -> Stream:
    return stream if limit is None else stream.cut(limit)


class _Encoder:
    """Texts to ids, with what stands around them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        bos: int | None,
        joining: Joining,
        same_as: Tokenizer | None,
    ) -> None:
        given = (joining.begin is not None) + joining.bare + (joining.separator is not None)
        if given > 1:
            raise UsageError("a beginning, none, and a separator exclude each other", expected="one of them")
        self.tokenizer, self.vocab_size, self.same_as = tokenizer, vocab_size, same_as
        self.separator = None if joining.separator is None else self._token(joining.separator)
        self.own = given == 0  # the tokenizer's own tokens around a text
        self.begin: list[int] = []
        if joining.begin is not None:
            self.begin = [self._token(joining.begin)]
        self.before = tokenizer.encode("")[:1] if self.own else []
        self.bos = [bos] if self.own and bos is not None and bos < vocab_size else []

    def alone(self, index: int, text: Text) -> Stream:
        """A text as a stream of its own."""
        ids, ends = self._encode(text)
        begin = self.begin
        if self.own and (not self.before or ids[:1].tolist() != self.before):
            begin = self.bos
        ids = np.concatenate([np.array(begin, np.int64), ids])
        ends = np.concatenate([np.zeros(len(begin), np.int64), ends])
        if len(ids) < 2:
            raise TextError(
                f"{text.name} is too short to be scored", got=f"{len(ids)} token", expected="at least 2"
            )
        return Stream(ids, ends, (Part(index, 0, len(ids)),))

    def joined(self, texts: Sequence[Text]) -> Stream:
        """All texts as one stream."""
        assert self.separator is not None
        separator = np.array([self.separator], np.int64)
        ids, ends, parts, size, count = [separator], [np.zeros(1, np.int64)], [], 0, 1
        for index, text in enumerate(texts):
            own, own_ends = self._encode(text)
            last = size + int(own_ends[-1])
            ids += [own, separator]
            ends += [size + own_ends, np.array([last], np.int64)]
            parts.append(Part(index, count, count + len(own) + 1))
            size, count = last, count + len(own) + 1
        return Stream(np.concatenate(ids), np.concatenate(ends), tuple(parts))

    def _encode(self, text: Text) -> tuple[IntArray, IntArray]:
        """A text's ids, at least one, and the bytes up to the end of each."""
        found, character_ends = self.tokenizer.encode_with_ends(text.text, special_tokens=self.own)
        if not found:
            raise TextError(f"{text.name} gives no token", got=f"{len(text.text)} characters")
        if self.same_as is not None and self.same_as.encode(text.text, special_tokens=self.own) != found:
            raise UsageError(
                "the two models' tokenizers differ: they give other tokens for the same text",
                got=text.name,
                hint="predictions can be compared only of models that read the same tokens",
            )
        ids = np.array(found, np.int64)
        foreign = np.flatnonzero(ids >= self.vocab_size)
        if foreign.size:
            token = int(ids[foreign[0]])
            raise TextError(
                f"{text.name} holds a token that the model does not have",
                got=f"token {int(foreign[0])}: id {token} ({self.tokenizer.token(token)!r})",
                expected=f"ids below {self.vocab_size}",
                hint="the tokenizer belongs to another model, or the text spells out a token that was added "
                "to it",
            )
        # What a tokenizer leaves out, such as spaces, counts for the token that follows, or for the last one.
        bytes_at = _bytes_at(text.text)
        ends: IntArray = bytes_at[np.maximum.accumulate(np.array(character_ends, np.int64))]
        ends[-1] = bytes_at[-1]
        return ids, ends

    def _token(self, name: str) -> int:
        token = self.tokenizer.token_id(name)
        if token is None or token >= self.vocab_size:
            raise UsageError(
                "there is no such token in the model's vocabulary",
                got=repr(name),
                hint="name one as tokenizer.json spells it, for example '<|endoftext|>'",
            )
        return token


def _bytes_at(text: str) -> IntArray:
    """[characters + 1]: bytes of UTF-8 before each character, and of all."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
