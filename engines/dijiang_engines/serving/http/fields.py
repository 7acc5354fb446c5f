"""Fields of a request's JSON object, each taken once and checked; what nobody took is refused.

A field that changes what comes out, and that this server does not know, must not be passed over: the answer
would be another one than was asked for. What changes nothing, such as `user`, is taken and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dijiang_engines.serving.http.errors import ApiError

IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "request_id",
    }
)  # fmt: skip
"""Fields that change nothing in the answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "suffix": ("",),
    "echo": (False,), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "skip_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "use_beam_search": (False,),
    "length_penalty": (1,), "best_of": (1,), "min_tokens": (0,),
}  # fmt: skip
"""Fields that are taken with these values, which ask for nothing."""


class Fields:
    """Takes fields out of a JSON object.

    Args:
        values: the object. null stands for a field that is absent.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str) -> Any:
        """A field of any type, None if it is absent."""
        return self._left.pop(name, None)

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """A whole number within bounds, both included."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number within bounds, both included."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            bounds = (
                f"a number from {least} to {most}" if math.isfinite(most) else f"a number of {least} or more"
            )
            raise wrong(name, value, bounds)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def text(self, name: str, most: int) -> str | None:
        """A string of at most `most` characters."""
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or len(value) > most):
            raise wrong(name, value, f"a string of at most {most} characters")
        return None if value is None else str(value)

    def strings(self, name: str, most: int, length: int) -> tuple[str, ...]:
        """A string, or a list of at most `most`; each of 1 to `length` characters."""
        value = self.take(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        good = isinstance(values, list) and len(values) <= most
        if not good or not all(isinstance(each, str) and 0 < len(each) <= length for each in values):
            raise wrong(name, value, f"a string or at most {most}, each of 1 to {length} characters")
        return tuple(values)

    def object(self, name: str, known: Iterable[str] | None = None) -> dict[str, Any] | None:
        """A JSON object, with no other keys than `known` if they are given."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wrong(name, value, "an object")
        if known is not None and (foreign := sorted(value.keys() - set(known))):
            raise ApiError(
                400, f"{name} has a field that this server does not know: {foreign[0]}", param=name
            )
        return value

    def end(self) -> None:
        """Everything that was known has been taken.

        Raises:
            ApiError: something else is there.
        """
        for name, value in self._left.items():
            if name in IGNORED:
                continue
            if name not in NEUTRAL:
                raise ApiError(
                    400, f"this server does not know the field {shown(name)}", param=shown(name),
                    code="unknown_parameter",
                )  # fmt: skip
            if value not in NEUTRAL[name] or isinstance(value, bool) != isinstance(NEUTRAL[name][0], bool):
                allowed = " or ".join(repr(each) for each in NEUTRAL[name])
                raise ApiError(
                    400, f"this server takes {name} as {allowed} only: it cannot do what else it may ask for",
                    param=name, code="unsupported_parameter",
                )  # fmt: skip


def wrong(name: str, value: object, expected: str) -> ApiError:
    """The error for a field with a bad value."""
    return ApiError(400, f"{name} is {shown(value)}; it must be {expected}", param=name)


def shown(value: object) -> str:
    """A value in a message, cut."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:59] + "…"
