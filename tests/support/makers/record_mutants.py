"""Records with one value replaced: every place of a JSON document times every kind of odd value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]

ODD: tuple[Any, ...] = (
    None, True, 0, -1, -0.5, 1e-300, 1e300, 10**39, math.nan, math.inf, "", "\x1b[31m\u202e[red]",
    [], [None], {}, {"a": 1}, ...,
)  # fmt: skip
"""`...`: the key or entry is taken out."""


def places(value: Any, at: Path = ()) -> Iterator[Path]:
    """Every place in a document; of lists of objects alike the first entry only."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:1]):
            yield from places(inner, (*at, index))


def replaced(document: Any, at: Path, value: Any) -> Any:
    """The document with another value at a place; the rest of it is shared, so it is not to be changed."""
    if not at:
        return None if value is ... else value
    step, *rest = at
    copy = document.copy()
    if rest or value is not ...:
        copy[step] = replaced(document[step], tuple(rest), value)
    else:
        del copy[step]
    return copy


def mutants(document: Any) -> Iterator[tuple[Path, Any, Any]]:
    """(place, value, document with that value there)."""
    for at in places(document):
        for value in ODD:
            yield at, value, replaced(document, at, value)
