"""What rounding to a bundle's type costs its model: measured when cases are recorded, kept with them.

Two right runtimes differ by what their roundings make of the model, and models differ in that by far more
than runtimes do: in float32 five layers with plain weights lose 3e-6, thirty layers with activations of
some thousands a hundred times that. So `validate` judges by a multiple of what was measured (`tolerances`).

In the metadata of reference.safetensors, key `rounding_cost`, as JSON:

    {"version": 1, "dtype": "float32",
     "logits": {"error": 1e-4, "cosine_distance": 1e-9, "kl": 1e-9},
     "state": [{"error": 1e-5, "cosine_distance": 1e-10}, ...]}                       one for each layer

Units are those of the table of tolerances: of all recorded marks the largest. Key `rounding_cost_int8` has
the same, measured with activations rounded to int8 before each product of a quantised matrix: what some
runtimes' steps do with quantised weights.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.safe_files import parse_json
from dijiang_engines.op_contract import T_TYPES

KEY = "rounding_cost"
INT8_KEY = "rounding_cost_int8"
VERSION = 1


@dataclass(frozen=True)
class Cost:
    """Of one kind of output; all finite, none negative."""

    error: float
    """Largest error, in units of the reference's scale."""
    cosine_distance: float
    """Largest 1 - cosine."""
    kl: float | None = None
    """Largest KL divergence in nats; logits only."""

    def at_least(self, other: Cost) -> Cost:
        """The larger of each number."""
        kls = [kl for kl in (self.kl, other.kl) if kl is not None]
        return Cost(
            max(self.error, other.error),
            max(self.cosine_distance, other.cosine_distance),
            max(kls, default=None),
        )


@dataclass(frozen=True)
class RoundingCost:
    """A model's, in one type."""

    dtype: str
    logits: Cost
    layers: tuple[Cost, ...]
    """Of the states, as measured, layer by layer."""

    def state(self, layer: int) -> Cost:
        """Of one layer's state: the most of all layers up to it.

        A state is made from what the layers before it computed; where fewer roundings were seen in a later
        layer that was luck.
        """
        return self._up_to[layer]

    @cached_property
    def _up_to(self) -> tuple[Cost, ...]:
        return tuple(itertools.accumulate(self.layers, Cost.at_least))

    @property
    def finite(self) -> bool:
        """False if the type cannot hold the model's activations: then nothing was measured."""
        return all(
            math.isfinite(value)
            for cost in (self.logits, *self.layers)
            for value in asdict(cost).values()
            if value is not None
        )

    def to_json(self) -> dict[str, Any]:
        """As in the file."""
        return {
            "version": VERSION,
            "dtype": self.dtype,
            "logits": asdict(self.logits),
            "state": [_numbers(cost) for cost in self.layers],
        }


def read_rounding_cost(text: str, what: str, layers: int) -> RoundingCost:
    """Read what `RoundingCost.to_json` gave, from a file that may come from anywhere.

    Args:
        text: the JSON.
        what: names the file in messages.
        layers: how many the model has.

    Raises:
        BundleError: anything is missing, unknown, negative or not a number; another version.
    """
    value = parse_json(text.encode(), f"{KEY} in {what}")
    if isinstance(value, dict) and value.get("version") != VERSION:
        raise BundleError(
            f"{what} holds a rounding cost of a version that this program does not know",
            got=repr(value.get("version"))[:80],
            expected=VERSION,
            hint="update dijiang-export, or export the checkpoint again",
        )
    _need(value, {"version", "dtype", "logits", "state"}, what, "the object")
    if value["dtype"] not in T_TYPES:
        raise _bad(what, "dtype", f"one of {', '.join(T_TYPES)}", value["dtype"])
    states = value["state"]
    if not isinstance(states, list) or len(states) != layers:
        got = f"{len(states)} of them" if isinstance(states, list) else states
        raise _bad(what, "state", f"a list with one object for each of {layers} layers", got)
    logits = _cost(value["logits"], what, "logits", kl=True)
    costs = tuple(_cost(one, what, f"state[{i}]", kl=False) for i, one in enumerate(states))
    return RoundingCost(value["dtype"], logits, costs)


def _numbers(cost: Cost) -> dict[str, float]:
    return {name: value for name, value in asdict(cost).items() if value is not None}


def _cost(value: Any, what: str, name: str, *, kl: bool) -> Cost:
    keys = {"error", "cosine_distance"} | ({"kl"} if kl else set())
    _need(value, keys, what, name)
    for key in keys:
        number = value[key]
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise _bad(what, f"{name}.{key}", "a number", number)
        if not (math.isfinite(number) and number >= 0):
            raise _bad(what, f"{name}.{key}", "zero or more, and finite", number)
    return Cost(**{key: float(value[key]) for key in keys})


def _need(value: Any, keys: set[str], what: str, name: str) -> None:
    if not isinstance(value, dict) or set(value) != keys:
        got = sorted(value) if isinstance(value, dict) else value
        raise _bad(what, name, f"an object with {', '.join(sorted(keys))}", got)


def _bad(what: str, name: str, expected: str, got: Any) -> BundleError:
    return BundleError(
        f"{what} has a bad {KEY}: {name}",
        got=repr(got)[:100],
        expected=expected,
        hint="export the checkpoint again",
    )
