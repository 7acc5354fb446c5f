"""The normalizer of a tokenizer.json, before the library loads the file and without reading its vocabulary.

Loading is work too: the library normalizes added tokens while it loads them. So whether a normalizer takes
work in proportion to a text has to be known first.
"""

from __future__ import annotations

import json
import re

from dijiang_engines.errors import BundleError

_MOST_VALUES = 4_000_000
"""The largest published files, of 260,000 tokens and 500,000 merges, have half as many."""
_SPACE = re.compile(r"[ \t\r\n]*")
_MODEL = "model"
_HIDDEN = re.compile(r'"normalizer"|"model"|\\u00[67]')  # the last one: a small letter that is spelt out
_SKELETON = '{"version":"1.0","model":{"type":"WordLevel","vocab":{"x":0},"unk_token":"x"},"normalizer":%s}'


def only_normalizer(data: bytes, what: str) -> str:
    """A tokenizer.json of one token, with the normalizer of another file and nothing else of it.

    What follows the model, which is most of a file and usually its end, is only parsed if its text could hold
    another normalizer.

    Args:
        data: the other file's bytes.
        what: names it in messages.

    Raises:
        BundleError: it is no JSON object, or has a key twice: readers differ in which one counts.
    """
    try:
        text = data.decode()
        if sum(map(text.count, ",[{")) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values")
        span = _keys(text).get("normalizer")
    except (ValueError, IndexError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError
        got = " ".join(str(error).split())[:200]
        raise BundleError(f"{what} is not a tokenizer", got=got, expected="a JSON object") from None
    return _SKELETON % ("null" if span is None else text[slice(*span)])


def _keys(text: str) -> dict[str, tuple[int, int]]:
    """Where each value of the object begins and ends."""
    decoder = json.JSONDecoder()
    found: dict[str, tuple[int, int]] = {}
    at = _skip(text, _after(text, 0, "{"))
    while text[at] != "}":
        key, at = decoder.raw_decode(text, _after(text, at, '"') - 1)
        at = _skip(text, _after(text, at, ":"))
        if key in found:
            raise ValueError(f"the key {key[:80]!r} twice")
        found[key] = (at, at)
        if key == _MODEL and _HIDDEN.search(text, at) is None:
            return found
        _, end = decoder.raw_decode(text, at)
        found[key] = (at, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _after(text, at, ",")
        elif text[at] != "}":
            raise json.JSONDecodeError("expecting , or }", text, at)
    return found


def _after(text: str, at: int, mark: str) -> int:
    """Where the text goes on behind spaces and a mark."""
    at = _skip(text, at)
    if text[at] != mark:
        raise json.JSONDecodeError(f"expecting {mark}", text, at)
    return at + 1


def _skip(text: str, at: int) -> int:
    """Where something follows that is no space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
