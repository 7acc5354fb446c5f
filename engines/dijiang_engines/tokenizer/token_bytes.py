"""The bytes that each token stands for in the middle of a text: what a grammar is followed by."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.tokenizer.decoder_stages import byte_level_bytes, flat_stages, guarded

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # ByteFallback's, in tokenizers/src/decoders/byte_fallback.rs
_SAMPLES, _SAMPLE = 8, 64


def token_bytes(decoder: Any, names: Sequence[str | None]) -> list[bytes | None]:
    """What each token adds to a text that has begun.

    Args:
        decoder: the tokenizer's, of the library; None joins tokens with spaces.
        names: [V], what tokens are called; None for special tokens and ids without a token.

    Returns:
        [V]; None where `names` has None.

    Raises:
        BundleError: with this decoder, what a token stands for depends on its neighbours.
    """
    decode = " ".join if decoder is None else guarded(decoder.decode)
    kinds = (
        []
        if decoder is None
        else [stage["type"] for stage in flat_stages(json.loads(decoder.__getstate__()))]
    )
    if "ByteLevel" in kinds:
        found = [None if name is None else byte_level_bytes(name) for name in names]
    else:
        before = _plain(decode, names)
        piece = _piece(decode, before, "ByteFallback" in kinds)
        found = [None if name is None else piece(name) for name in names]
    if not _agree(decode, names, found):
        raise _depends()
    return found


def _depends() -> BundleError:
    return BundleError(
        "texts cannot be kept to a grammar with this tokenizer",
        got="tokens whose text depends on their neighbours",
        expected="tokens that stand for the same bytes wherever they are",
    )


def _plain(decode: Callable[[list[str]], str], names: Sequence[str | None]) -> str:
    """A token that is text whatever comes after it."""
    for name in names:
        if name is not None and name.isalpha() and name.isascii() and name.lower() in decode([name]).lower():
            return name
    return "a"


def _piece(decode: Callable[[list[str]], str], before: str, bytes_fall_back: bool) -> Callable[[str], bytes]:
    head = decode([before])
    tail = len(decode([before, before])) - len(head)

    def piece(name: str) -> bytes:
        byte = _BYTE.fullmatch(name) if bytes_fall_back else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        within = decode([before, name, before])
        text = within[len(head) : len(within) - tail]
        if head + text != decode([before, name]):  # as BPEDecoder's, that takes a space off the last word
            raise _depends()
        return text.encode("utf-8", "replace")

    return piece


def _agree(
    decode: Callable[[list[str]], str], names: Sequence[str | None], found: Sequence[bytes | None]
) -> bool:
    """Whether shuffled tokens decode to the bytes that they are said to be, after a first that may differ."""
    whole = [
        (name, data) for name, data in zip(names, found, strict=True) if name and data and _is_text(data)
    ]
    if not whole:
        return True
    rng = random.Random(0)  # noqa: S311  a sample, no secret
    for _ in range(_SAMPLES):
        first, *sample = rng.choices(whole, k=1 + _SAMPLE)
        text = decode([first[0], *(name for name, _ in sample)])
        if text != decode([first[0]]) + b"".join(data for _, data in sample).decode():
            return False
    return True


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
