"""The decoders of `tokenizers`, one token at a time: text comes out once no later token can change it.

A decoder turns a list of tokens into a text. It may do so in stages, each of which turns a list of items into
another, whose last is joined. What a stage makes of an item depends on little: on the item, on whether it is
the first or the last, on the one before, on the run of byte tokens that it is part of. A stage here gives an
item out when that little is known, and keeps the rest; *what* it makes of the item is left to the library's
own decoder, asked about that item alone. So what the pieces add up to is what the library makes of the whole.

Some stages join all items into one (Fuse, ByteLevel). For those that follow there is one single item that
grows, given as pieces of it; where its pieces are cut has no meaning.

The rules are those of tokenizers 0.23.3, tokenizers/src/decoders/*.rs. `agrees` compares with the library
that is installed; a decoder that is not known here, or behaves differently there, waits for the last token.
"""

from __future__ import annotations

import codecs
import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

from dijiang_engines.errors import BundleError

_MOST_CACHED = 1 << 17
_LONGEST_PATTERN = 64
"""Of a literal that is looked for at the end of every piece; longer ones are nobody's."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Stage(Protocol):
    """One stage. What it holds back is a string, bytes or a list, so that `Pipeline.copy` knows how."""

    def push(self, items: list[str]) -> list[str]:
        """What has become certain with these items."""

    def finish(self) -> list[str]:
        """The rest: there are no more items."""


class Pipeline:
    """All stages of a decoder, from tokens to text."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages

    def push(self, tokens: list[str]) -> str:
        """The text that has become certain with these tokens; may be empty."""
        for stage in self._stages:
            tokens = stage.push(tokens)
        return "".join(tokens)

    def finish(self) -> str:
        """The rest of the text: there are no more tokens."""
        text = ""
        for number, stage in enumerate(self._stages):
            items = stage.finish()
            for later in self._stages[number + 1 :]:
                items = later.push(items)
            text += "".join(items)
        return text

    def copy(self) -> Pipeline:
        """Another pipeline that stands where this one does; what is known of tokens they share."""
        stages = [copy.copy(stage) for stage in self._stages]
        for stage in stages:
            held = {name: list(value) for name, value in vars(stage).items() if isinstance(value, list)}
            vars(stage).update(held)
        return Pipeline(stages)


def pipeline_for(decoder: Any) -> Pipeline:
    """The stages of a decoder of the library, or of None, which joins tokens with spaces."""
    if decoder is None:
        return Pipeline([_Later(lambda items: " ".join(items))])
    specs = flat_stages(json.loads(decoder.__getstate__()))
    stages: list[Stage] = []
    fused = False
    for number, spec in enumerate(specs):
        make = (_ON_ONE_ITEM if fused else _ON_ITEMS).get(spec["type"])
        made = make(spec, _library(spec)) if make else None
        if made is None:
            rest = {"type": "Sequence", "decoders": specs[number:]}
            stages.append(_Whole(_library(rest), fused))
            break
        if isinstance(made, _LastDiffers):
            made.last_stage = number + 1 == len(specs)
        stages.append(made)
        fused = fused or spec["type"] in ("Fuse", "ByteLevel")
    return Pipeline(stages)


def whole(decode: Callable[[list[str]], str]) -> Pipeline:
    """A pipeline that is right for every decoder, because it waits for the last token."""
    return Pipeline([_Whole(decode, fused=False)])


def agrees(decoder: Any, tokens: Sequence[str]) -> bool:
    """Whether the stages make of some shuffled tokens what the installed library makes of them."""
    rng = random.Random(0)  # noqa: S311  a sample, no secret
    decode, fresh = guarded(decoder.decode), pipeline_for(decoder)
    try:
        for _ in range(4):
            sample, pipeline = rng.choices(tokens, k=64), fresh.copy()
            text = "".join(pipeline.push([token]) for token in sample)
            if text + pipeline.finish() != decode(sample):
                return False
    except BundleError:
        return False
    return True


def guarded(decode: Callable[[list[str]], str]) -> Callable[[list[str]], str]:
    """A decoder's function whose failures are sentences."""

    def call(items: list[str]) -> str:
        with library_call("the tokenizer fails to decode tokens"):
            return decode(items)

    return call


@contextmanager
def library_call(what: str) -> Iterator[None]:
    """Say what failed in the library.

    Raises:
        BundleError: something did. The library raises plain Exception, and its panics are not even that.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise BundleError(what, got=" ".join(str(error).split())[:200]) from error
        raise


def common_length(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    return next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def flat_stages(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a decoder as the library writes it, one after another."""
    if spec["type"] != "Sequence":
        return [spec]
    return [stage for inner in spec["decoders"] for stage in flat_stages(inner)]


def _library(spec: dict[str, Any]) -> Callable[[list[str]], str]:
    """The library's own decoder for one stage."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    backend: Any = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "decoder": spec}))
    return guarded(backend.decoder.decode)


class _Cache(dict[Any, str]):
    """What a function makes of an item; bounded, since items need not be tokens."""

    def __init__(self, function: Callable[[Any], str]) -> None:
        self._function = function

    def __missing__(self, item: Any) -> str:
        if len(self) >= _MOST_CACHED:
            self.clear()
        value = self[item] = self._function(item)
        return value


# -- stages on items -------------------------------------------------------------------------------------


class _Local:
    """Each item for itself: Replace, Strip."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._made = _Cache(lambda item: decode([item]))

    def push(self, items: list[str]) -> list[str]:
        made = self._made
        return [made[item] for item in items]

    def finish(self) -> list[str]:
        return []


class _Later(_Local):
    """The first item is special: Metaspace, WordPiece, and no decoder at all."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        super().__init__(decode)
        self._later = _Cache(lambda item: decode(["", item]))
        self._begun = False

    def push(self, items: list[str]) -> list[str]:
        if not items:
            return []
        first = [] if self._begun else super().push(items[:1])
        later = self._later
        rest = [later[item] for item in items[len(first) :]]
        self._begun = True
        return first + rest


class _NotTwice(_Local):
    """An item that equals the one before is dropped, and so is what becomes empty: CTC."""

    _before: str | None = None

    def push(self, items: list[str]) -> list[str]:
        kept = [item for before, item in zip([self._before, *items], items, strict=False) if item != before]
        self._before = items[-1] if items else self._before
        return [made for made in super().push(kept) if made]


class _LastDiffers(_Local):
    """The last item is special, and any may turn out to be it: BPEDecoder."""

    last_stage = False
    """If so, the beginning that both ways have in common can be given out at once."""
    _held: str | None = None
    _given = 0

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        super().__init__(decode)
        self._inner = _Cache(lambda item: decode([item, ""]))

    def push(self, items: list[str]) -> list[str]:
        result = []
        for item in items:
            if self._held is not None:
                result.append(self._inner[self._held][self._given :])
            self._held, self._given = item, 0
            if self.last_stage:
                self._given = common_length(self._inner[item], self._made[item])
                result.append(self._made[item][: self._given])
        return result

    def finish(self) -> list[str]:
        held, self._held = self._held, None
        return [] if held is None else [self._made[held][self._given :]]


class _ByteRuns:
    """ByteFallback: a run of byte tokens is one text if all of it is UTF-8, else as many U+FFFD.

    So a run is certain when it has ended, and not before: one more byte can undo all of it.
    """

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._made = _Cache(lambda item: decode([item]))
        self._run: list[str] = []

    def push(self, items: list[str]) -> list[str]:
        result: list[str] = []
        made = self._made
        for item in items:
            if made[item] != item:  # a byte token: others stay as they are
                self._run.append(item)
                continue
            if self._run:
                result += self.finish()
            result.append(item)
        return result

    def finish(self) -> list[str]:
        run, self._run = self._run, []
        text = self._decode(run)
        undone = len(text) == len(run) and set(text) == {_REPLACEMENT}
        return list(text) if undone else [text] * bool(run)


class _Bytes:
    """ByteLevel: a token's characters stand for bytes, and the bytes of all tokens are one UTF-8 text."""

    def __init__(self) -> None:
        self._bytes: dict[str, bytes] = {}
        self._rest = b""
        """The beginning of a character."""

    def push(self, items: list[str]) -> list[str]:
        data = self._rest + b"".join([self._bytes_of(item) for item in items])
        # As String::from_utf8_lossy: one U+FFFD for each maximal beginning of a character (Unicode 3.9)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return [text] if text else []

    def finish(self) -> list[str]:
        rest, self._rest = self._rest, b""
        return [rest.decode("utf-8", "replace")] if rest else []

    def _bytes_of(self, item: str) -> bytes:
        known = self._bytes.get(item)
        if known is None:
            known = byte_level_bytes(item)
            if len(self._bytes) < _MOST_CACHED:
                self._bytes[item] = known
        return known


def byte_level_bytes(token: str) -> bytes:
    """What a token of a byte-level tokenizer stands for."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[c] for c in token])
    except KeyError:  # an added token in plain text
        return token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes (openai/gpt-2@master:src/encoder.py, bytes_to_unicode): printable Latin-1
    stands for itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


# -- stages on one item that grows -----------------------------------------------------------------------


class _Same:
    """Fuse; and what has nothing to do on a single item."""

    def push(self, items: list[str]) -> list[str]:
        return items

    def finish(self) -> list[str]:
        return []


class _EachCharacter(_Same):
    """Metaspace on one item: every character for itself."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode

    def push(self, items: list[str]) -> list[str]:
        return [self._decode([item]) for item in items]


class _Literal:
    """Replace with a literal pattern, and BPEDecoder on one item: certain but for what may be the beginning
    of the pattern."""

    def __init__(self, pattern: str, decode: Callable[[list[str]], str]) -> None:
        self._pattern, self._decode = pattern, decode
        self._rest = ""

    def push(self, items: list[str]) -> list[str]:
        text = self._rest + "".join(items)
        end = 0  # of the last match: they are found from the left and do not overlap
        while (place := text.find(self._pattern, end)) >= 0:
            end = place + len(self._pattern)
        hold = min(len(text) - end, len(self._pattern) - 1)
        while hold and not self._pattern.startswith(text[len(text) - hold :]):
            hold -= 1
        self._rest = text[len(text) - hold :]
        text = text[: len(text) - hold]
        return [self._decode([text]) if end else text]

    def finish(self) -> list[str]:
        rest, self._rest = self._rest, ""  # shorter than the pattern
        return [rest]


class _Ends:
    """Strip on one item: up to `start` characters from its beginning, up to `stop` from its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._rest = ""
        """Characters that are stripped if nothing follows."""

    def push(self, items: list[str]) -> list[str]:
        text = self._rest + "".join(items)
        self._rest = ""
        if self._start and text:
            begun = text[: self._start]
            cut = len(begun) - len(begun.lstrip(self._content))
            self._start = self._start - cut if cut == len(text) else 0
            text = text[cut:]
        hold = min(len(text) - len(text.rstrip(self._content)), self._stop)
        self._rest = text[len(text) - hold :]
        return [text[: len(text) - hold]]

    def finish(self) -> list[str]:
        self._rest = ""
        return []


class _Whole:
    """Everything at the end, by the library: a decoder whose every word may depend on every other."""

    def __init__(self, decode: Callable[[list[str]], str], fused: bool) -> None:
        self._decode, self._fused = decode, fused
        self._items: list[str] = []

    def push(self, items: list[str]) -> list[str]:
        self._items += items
        return []

    def finish(self) -> list[str]:
        items, self._items = self._items, []
        return [self._decode(["".join(items)] if self._fused else items)]


# -- which stage is which --------------------------------------------------------------------------------

_Maker = Callable[[dict[str, Any], Callable[[list[str]], str]], "Stage | None"]

_ON_ITEMS: dict[str, _Maker] = {
    "Replace": lambda spec, decode: _Local(decode),
    "Strip": lambda spec, decode: _Local(decode),
    "Metaspace": lambda spec, decode: _Later(decode),
    "WordPiece": lambda spec, decode: _Later(decode),
    "CTC": lambda spec, decode: _NotTwice(decode),
    "BPEDecoder": lambda spec, decode: _LastDiffers(decode),
    "ByteFallback": lambda spec, decode: _ByteRuns(decode),
    "Fuse": lambda spec, decode: _Same(),
    "ByteLevel": lambda spec, decode: _Bytes(),
}


def _literal(pattern: str | None, decode: Callable[[list[str]], str]) -> Stage | None:
    return _Literal(pattern, decode) if pattern and len(pattern) <= _LONGEST_PATTERN else None


_ON_ONE_ITEM: dict[str, _Maker] = {
    "Replace": lambda spec, decode: _literal(spec["pattern"].get("String"), decode),
    "Strip": lambda spec, decode: _Ends(spec["content"], spec["start"], spec["stop"]),
    "Metaspace": lambda spec, decode: _EachCharacter(decode),
    "WordPiece": lambda spec, decode: None if spec["cleanup"] else _Same(),
    "BPEDecoder": lambda spec, decode: _literal(spec["suffix"], decode),
    "Fuse": lambda spec, decode: _Same(),
}
