"""JSON schemas that a text can be kept to, every word of them: what is not enforced is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.safe_files import parse_json

MAX_SCHEMA_BYTES = 256 << 10
MAX_SCHEMA_VALUES = 20_000

_MAX_INTEGER = 2**53
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00[01][0-9a-f]|[\x7f\ud800-\udfff]")
"""In JSON text: what has no escape but \\uXXXX, and halves of surrogate pairs."""
_SCHEMAS = ("items", "additionalItems", "additionalProperties")
"""Keywords whose value is a schema."""
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
"""... a list of schemas; `items` was one until draft 2019-09."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
"""... a mapping to schemas."""
# guidance-ai/llguidance@v1.8.0:parser/src/json/schema.rs, IMPLEMENTED and META_AND_ANNOTATIONS. The library
# refuses some of the words that it does not implement, and takes others for annotations without a word.
_ENFORCED = frozenset({
    "anyOf", "oneOf", "allOf", "$ref", "const", "enum", "type",
    "items", "additionalItems", "prefixItems", "minItems", "maxItems",
    "properties", "additionalProperties", "patternProperties", "required", "minProperties", "maxProperties",
    "minLength", "maxLength", "pattern", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
})  # fmt: skip
_SAID_ONLY = frozenset({
    "$anchor", "$defs", "definitions", "$schema", "$id", "id", "$comment", "title", "description", "default",
    "readOnly", "writeOnly", "examples", "contentMediaType", "contentEncoding",
    "example", "deprecated", "discriminator",  # OpenAPI 3.1's; the last says which alternative it is
})  # fmt: skip


def read_schema(schema: object, what: str) -> dict[str, Any]:
    """A schema as the grammar's library takes it, with every word of it known to be enforced.

    Args:
        schema: JSON text, its bytes, or the value.
        what: names it in messages.

    Raises:
        UsageError: no schema, too large, too deep, or with words that a text cannot be kept to.
    """
    data = _text(schema, what)
    try:
        value = parse_json(data, what, error=UsageError, most_values=MAX_SCHEMA_VALUES)
    except UsageError as error:
        raise UsageError(
            error.what, got=error.got, expected=error.expected
        ) from None  # its hint is for files
    if value is True:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{what} is not a schema", got=json.dumps(value), expected="an object")
    _Walk(value, what).check()
    return value


def _text(schema: object, what: str) -> bytes:
    if isinstance(schema, str | bytes):
        try:
            data = schema.encode() if isinstance(schema, str) else schema
        except UnicodeEncodeError:
            raise UsageError(f"{what} holds half a surrogate pair") from None
    else:
        try:
            data = json.dumps(schema, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{what} is no JSON value", got=error) from None
    if len(data) > MAX_SCHEMA_BYTES:
        raise UsageError(
            f"{what} is too large", got=f"{len(data)} bytes", expected=f"at most {MAX_SCHEMA_BYTES} bytes"
        )
    return data


class _Walk:
    """All schemas within a schema, each once."""

    def __init__(self, root: dict[str, Any], what: str) -> None:
        self._root, self._what = root, what
        self._seen: set[int] = set()

    def check(self) -> None:
        # llguidance 1.9 leaves such characters of a constant out where \\uXXXX may not come (`matchers`).
        if found := _CONTROL.search(json.dumps(self._root, ensure_ascii=False)):
            raise UsageError(f"{self._what} holds a control character", got=found[0])
        self._check_integers()
        waiting: list[tuple[str, Any]] = [("#", self._root)]
        while waiting:
            place, schema = waiting.pop()
            if isinstance(schema, bool) or id(schema) in self._seen:
                continue
            if not isinstance(schema, dict):
                raise self._error(place, "is not a schema", schema, "an object, true or false")
            self._seen.add(id(schema))
            self._check_words(place, schema)
            waiting += self._within(place, schema)

    def _check_integers(self) -> None:
        """llguidance 1.9 computes with float64, and would have another number in the text."""
        waiting: list[Any] = [self._root]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict | list):
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
                raise UsageError(
                    f"{self._what} holds an integer that is too large", got=value, expected="at most 2**53"
                )

    def _check_words(self, place: str, schema: Mapping[str, Any]) -> None:
        for word in schema:
            if word not in _ENFORCED | _SAID_ONLY and not (word.startswith("x-") and word != "x-guidance"):
                raise UsageError(
                    f"{self._what} has a keyword that no text can be kept to",
                    got=f"{word!r} at {place}",
                    hint="leave it out, and check the text for it afterwards",
                )
        if place != "#" and ("$id" in schema or "id" in schema):
            raise self._error(place, "has an identifier of its own", schema.get("$id", schema.get("id")))
        least, required = schema.get("minProperties", 0), schema.get("required", ())
        if isinstance(least, int) and least > max(1, len(required) if isinstance(required, list) else 0):
            # Names beyond `properties` may come twice, so that there are fewer than were counted.
            raise self._error(
                place, "has minProperties beyond those that are required", least, "at most as many, or 1"
            )

    def _within(self, place: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for word in _SCHEMAS:
            if word in schema and not isinstance(schema[word], list):
                yield f"{place}/{word}", schema[word]
        for word in _LISTS:
            if isinstance(schema.get(word), list):
                yield from ((f"{place}/{word}/{n}", item) for n, item in enumerate(schema[word]))
        for word in _MAPS:
            if isinstance(schema.get(word), dict):
                yield from ((f"{place}/{word}/{name}", item) for name, item in schema[word].items())
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            yield reference, self._target(place, reference)
        elif reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
            raise self._error(place, "refers to another document", reference, "a $ref that begins with #")

    def _target(self, place: str, reference: str) -> Any:
        """What a JSON pointer (RFC 6901) points to."""
        from urllib.parse import unquote

        value: Any = self._root
        for part in unquote(reference[2:]).split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key[:9]) < len(value):
                value = value[int(key[:9])]
            else:
                raise self._error(place, "refers to what is not there", reference)
        return value

    def _error(self, place: str, problem: str, got: object, expected: str | None = None) -> UsageError:
        shown = got if isinstance(got, str) else json.dumps(got)
        return UsageError(f"{self._what} {problem}", got=f"{shown[:200]} at {place}", expected=expected)
