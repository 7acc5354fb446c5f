"""What a request says about the form of its answer, in the fields of OpenAI's and vLLM's interfaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.generation.grammar import Grammar, Grammars

_FORMS = {
    "text": set[str](), "json_object": set[str](), "json_schema": {"json_schema"}, "regex": {"pattern"},
}  # fmt: skip
"""Types of a response_format, and the fields beside `type`."""


def requested_grammar(
    grammars: Callable[[], Grammars],
    *,
    response_format: object = None,
    guided_json: object = None,
    guided_regex: object = None,
) -> Grammar | None:
    """The grammar that a request asks for.

    Args:
        grammars: the model's; asked for if there is something to make.
        response_format: {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema":
            {"name": ..., "schema": {...}, "strict": ...}} or {"type": "regex", "pattern": ...}. A schema is
            kept to whether or not `strict` says so.
        guided_json: a schema, as a value or as JSON text.
        guided_regex: a regular expression.

    Returns:
        None if the answer may be any text.

    Raises:
        UsageError: a field is wrong, and is named; or there are several.
        BundleError: texts cannot be kept to a grammar with this model's tokenizer.
    """
    form = _checked(response_format)
    asked = {
        "response_format": form if form and form["type"] != "text" else None,
        "guided_json": guided_json, "guided_regex": guided_regex,
    }  # fmt: skip
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError("the answer's form is said twice", got=" and ".join(given), expected="one of them")
    if not given:
        return None
    if guided_json is not None:
        return grammars().json_schema(guided_json, "guided_json")
    if guided_regex is not None:
        return grammars().regex(guided_regex, "guided_regex")
    assert form is not None
    if form["type"] == "json_object":
        return grammars().json_object()
    if form["type"] == "regex":
        return grammars().regex(form["pattern"], "response_format.pattern")
    schema = _schema(form["json_schema"])
    return grammars().json_schema(schema, "response_format.json_schema.schema")


def _checked(value: object) -> dict[str, Any] | None:
    """A response_format with a known type and the fields that belong to it."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UsageError("response_format is not an object", got=_kind(value))
    name = value.get("type")
    if not isinstance(name, str) or name not in _FORMS:
        raise UsageError(
            "response_format.type is none that is known", got=_kind(name), expected=", ".join(_FORMS)
        )
    _check_fields(value, "response_format", {"type", *_FORMS[name]}, set())
    return value


def _schema(value: object) -> object:
    field = "response_format.json_schema"
    if not isinstance(value, dict):
        raise UsageError(f"{field} is not an object", got=_kind(value))
    _check_fields(value, field, {"schema"}, {"name", "description", "strict"})
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(value.get(name), kind | None):
            raise UsageError(f"{field}.{name} is no {kind.__name__}", got=_kind(value[name]))
    if not isinstance(value["schema"], dict):
        raise UsageError(f"{field}.schema is not an object", got=_kind(value["schema"]))
    return value["schema"]


def _check_fields(value: dict[str, Any], field: str, needed: set[str], optional: set[str]) -> None:
    missing, foreign = sorted(needed - set(value)), sorted(set(value) - needed - optional)
    if missing:
        raise UsageError(f"{field}.{missing[0]} is missing")
    if foreign:
        raise UsageError(f"{field} has a field that is not known", got=repr(foreign[0])[:200])


def _kind(value: object) -> str:
    return repr(value)[:200] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
