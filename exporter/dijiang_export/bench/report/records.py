"""Saved measurements as files: read with care, and every value that is used checked, in one place.

A record may come from another machine, version or person. What the tables and pictures use of one is listed
here, as what each value must be; everything else in a record is kept as it is and not looked at. Behind this
no code needs to ask whether a figure is a number, or zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dijiang_engines.errors import DijiangError
from dijiang_engines.formats.safe_files import LIMITS, parse_json, read_bounded

Record = dict[str, Any]
Rule = Callable[[Any, str], None]
"""Called with a value and where it stands; raises RecordError."""

MOST_ROWS = 1000
"""Entries of a list or an object; a run makes a few dozen."""
MOST_RECORDS = 100
MOST_TEXT = 10_000
MOST_SECONDS = 1e9
_LARGEST = 2.0**63


class RecordError(DijiangError):
    """A file that is no record of a measurement."""


def read_json(path: Path) -> Any:
    """The JSON in a record's file, which the user named.

    Raises:
        RecordError: it cannot be read, is too large, or is not JSON.
    """
    data = read_bounded(path, LIMITS["benchmark record"], links=True, error=RecordError)
    return parse_json(data, str(path), error=RecordError)


def check(record: Any, rule: Rule, source: Path) -> Record:
    """`record`, if `rule` takes it.

    Raises:
        RecordError: it does not; says which value is wrong.
    """
    try:
        rule(record, "")
    except RecordError as error:
        raise RecordError(
            f"{source} does not have what a record has: {error.what}",
            got=error.got,
            expected=error.expected,
            hint="measure again with this version of dijiang-export",
        ) from None
    assert isinstance(record, dict)
    return record


# -- what a value can have to be -------------------------------------------------------------------------


def number(least: float = 0, most: float = _LARGEST, *, above: bool = False) -> Rule:
    """A finite number in a range; `above` leaves `least` out."""

    def rule(value: Any, where: str) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not least <= value <= most or (above and value == least):
            raise _wrong(where, value, f"a number {'above' if above else 'from'} {least:g} to {most:g}")

    return rule


def whole(least: int = 0, most: int = 2**53) -> Rule:
    """A whole number in a range."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _wrong(where, value, f"a whole number from {least} to {most}")

    return rule


def text(*allowed: str) -> Rule:
    """A text that is not too long; one of `allowed` if there are any."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > MOST_TEXT or (allowed and value not in allowed):
            raise _wrong(where, value, " | ".join(allowed) or "a text")

    return rule


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(where, value, "true | false")


def maybe(inner: Rule) -> Rule:
    """null, or what `inner` takes."""

    def rule(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return rule


def either(*inner: Rule) -> Rule:
    """What one of several takes; the last one's complaint."""

    def rule(value: Any, where: str) -> None:
        for one in inner[:-1]:
            try:
                return one(value, where)
            except RecordError:
                continue
        return inner[-1](value, where)

    return rule


def rows(inner: Rule, most: int = MOST_ROWS) -> Rule:
    """A list of what `inner` takes."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise _wrong(where, value, f"a list of at most {most}")
        for index, entry in enumerate(value):
            inner(entry, f"{where}[{index}]")

    return rule


def named(inner: Rule) -> Rule:
    """An object of any keys whose values `inner` takes."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > MOST_ROWS:
            raise _wrong(where, value, f"an object of at most {MOST_ROWS} entries")
        for key, entry in value.items():
            text()(key, where)
            inner(entry, f"{where}.{key[:80]}")

    return rule


def table(needed: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """An object with these keys, and any others."""

    def rule(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        for key, inner in needed.items():
            if key not in value:
                raise RecordError(f"there is no {where}.{key}".replace(" .", " "))
            inner(value[key], f"{where}.{key}".lstrip("."))
        for key, inner in (optional or {}).items():
            if key in value:
                inner(value[key], f"{where}.{key}".lstrip("."))

    return rule


def _wrong(where: str, value: Any, expected: str) -> RecordError:
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return RecordError(f"a bad value for {where or 'the whole'}", got=shown[:200], expected=expected)


# -- records ---------------------------------------------------------------------------------------------

_COUNT, _TOKENS, _BYTES = whole(1, 2**31), whole(), whole(0, 2**63)
_SECONDS = number(0, MOST_SECONDS, above=True)
_RATE = number(1)
_TIMING = table({"median": _SECONDS, "low": _SECONDS, "high": _SECONDS})
_GPU = table({"name": text()})
_MACHINE = table({"cpu": text(), "gpus": rows(_GPU)})
_BANDWIDTH = maybe(table({"read": _RATE, "copy": _RATE}))
_NOTES = rows(text())

RUN = table(
    {
        "machine": _MACHINE,
        "versions": named(text()),
        "validated": text(),
        "model": table({"name": text(), "parameters": number()}),
        "bench": table(
            {
                "runner": text(),
                "dtype": text(),
                "bandwidth": _BANDWIDTH,
                "step_bytes": _BYTES,
                "state_bytes": _BYTES,
                "prefill": rows(table({"batch": _COUNT, "length": _TOKENS, "timing": _TIMING})),
                "steps": rows(
                    table({"batch": _COUNT, "position": _TOKENS, "timing": _TIMING}, {"gpu": maybe(_TIMING)})
                ),
                "notes": _NOTES,
            },
            {
                "loops": rows(
                    table(
                        {
                            "batch": _COUNT,
                            "position": _TOKENS,
                            "timing": _TIMING,
                            "gpu": maybe(_SECONDS),
                            "overhead": maybe(number(-MOST_SECONDS, MOST_SECONDS)),
                        }
                    )
                ),
                "memory": maybe(named(_BYTES)),
            },
        ),
    },
    {"kind": text(), "device": text(), "gpu": maybe(_GPU)},
)
"""Of `bench run`; what versions before the loop was measured lack is optional."""

_PEER = table(
    {
        "name": text(),
        "error": maybe(text()),
        "versions": named(text()),
        "decode": rows(
            table(
                {
                    "batch": _COUNT,
                    "context": _TOKENS,
                    "timing": _TIMING,
                    "peak_bytes": maybe(_BYTES),
                    "notes": _NOTES,
                },
                {
                    "context_bytes": maybe(_BYTES),
                    "process_bytes": maybe(table({"timing": maybe(_BYTES)}, {"proportional": maybe(_BYTES)})),
                },
            )
        ),
        "prefill": rows(
            table({"batch": _COUNT, "length": _TOKENS, "form": text(), "timing": _TIMING, "notes": _NOTES})
        ),
        "left_out": rows(table({"what": text(), "why": text()})),
    }
)
_FLOOR = table({"weights": _BYTES, "per_row": _BYTES, "per_token": _BYTES})

PEERS = table(
    {
        "machine": _MACHINE,
        "model": table({"name": text()}),
        "plan": table({"dtype": text()}),
        "bandwidth": _BANDWIDTH,
        "floor_bytes": table({"dijiang": _FLOOR, "hf": _FLOOR}),
        "peers": rows(_PEER, MOST_RECORDS),
    },
    {"device": text(), "gpu": maybe(_GPU)},
)
"""Of `bench peers`."""

_RIGHT = table({"errors": named(either(number(-_LARGEST), text())), "single": _TIMING, "rotated": _TIMING})
_WRONG = table({"errors": named(either(number(-_LARGEST), text()))})


def _result(value: Any, where: str) -> None:
    """Of a contestant at a cell: why there is none, or errors and, if these are small, two timings."""
    table({}, {"single": maybe(_TIMING), "rotated": maybe(_TIMING)})(value, where)
    if "skipped" in value:
        return text()(value["skipped"], f"{where}.skipped")
    table({"right": flag})(value, where)
    return (_RIGHT if value["right"] else _WRONG)(value, where)


_CELL = table(
    {
        "phase": text("decode", "prefill"),
        "heads": whole(1, 2**20),
        "head_dim": whole(1, 2**20),
        "batch": _COUNT,
        "length": whole(1, 2**31),
        "results": named(_result),
        "derived": table(
            {
                "bytes": table({"op": number(1)}),
                "operations": number(1),
                "floor": maybe(_SECONDS),
                "over_floor": maybe(number()),
                "share_of_copy": maybe(number()),
                "ratios": named(number()),
            }
        ),
    }
)
_CEILING = table({"per_second": _RATE})

KERNELS = table(
    {
        "versions": named(text()),
        "gpu": table({"name": text(), "cuda": maybe(text())}),
        "library": maybe(table({"version": text(), "architectures": text(), "sha256": text()})),
        "settings": table(
            {"dtype": text("float32", "float16", "bfloat16"), "quoted": text("single", "rotated")}
        ),
        "ceilings": table({"copy": _CEILING, "matmul": _CEILING}),
        "absent": named(text()),
        "notes": _NOTES,
        "cells": rows(_CELL),
    }
)
"""Of `bench kernels`."""
