"""Does a value satisfy a JSON schema: the words that the tests use, as JSON Schema 2020-12 defines them."""

from __future__ import annotations

import re
from typing import Any

KINDS = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
}  # fmt: skip
KNOWN = {
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "properties", "required",
    "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength",
    "pattern", "minimum", "maximum", "exclusiveMinimum", "multipleOf",
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Equal as JSON values: 1 is 1.0, and neither is true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def of_kind(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("number", "integer"):
        return number and (kind == "number" or value == int(value))
    return isinstance(value, KINDS[kind])


def satisfies(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a value is what a schema describes."""
    if isinstance(schema, bool):
        return schema
    root = schema if root is None else root
    assert schema.keys() <= KNOWN, schema

    def below(part: Any, inner: Any) -> bool:
        return satisfies(part, inner, root)

    checks = []
    if "$ref" in schema:
        target = root
        for key in schema["$ref"].removeprefix("#").split("/")[1:]:
            target = target[key]
        checks.append(below(value, target))
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        checks.append(any(of_kind(value, kind) for kind in kinds))
    if "enum" in schema:
        checks.append(any(same(value, one) for one in schema["enum"]))
    if "const" in schema:
        checks.append(same(value, schema["const"]))
    checks += [all(below(value, one) for one in schema.get("allOf", []))]
    checks += [any(below(value, one) for one in schema["anyOf"])] if "anyOf" in schema else []
    checks += [sum(below(value, one) for one in schema["oneOf"]) == 1] if "oneOf" in schema else []
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        checks.append(set(schema.get("required", [])) <= value.keys())
        checks += [below(part, known.get(key, others)) for key, part in value.items()]
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        checks += [below(part, one) for part, one in zip(value, first, strict=False)]
        checks += [below(part, schema.get("items", True)) for part in value[len(first) :]]
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
    if isinstance(value, str):
        checks.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
        checks.append("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        checks.append("multipleOf" not in schema or value % schema["multipleOf"] == 0)
    return all(checks)
