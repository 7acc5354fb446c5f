"""What a manifest says about quantised weights: formats, recipe, and what they cost; checked value by value.

Key `quantisation` of manifest.json, which a bundle of format version 2 has and one of version 1 has not, and
of engine.json, where an engine was built from such a bundle:

    {"weight_format": "int4", "block_size": 32,
     "matrices": {"embed_tokens.weight": "int8", "layers.0.attention.qkv.qk.weight": "int4", ...},
     "kept_in_int8": [{"matrices": "lm_head.weight", "reason": "..."}, ...],
     "activations": {"prefill": "float", "step": "int8"},
     "calibration": null, or {"file": "text.txt", "tokens": 16384},
     "cost": null, or {"text": "...", "tokens": 1024, "kl": 0.03, "top1": 0.93,
                       "perplexity": 12.1, "perplexity_float": 11.9}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.spec import ModelSpec, is_number
from dijiang_engines.weight_formats import BLOCK, Activations, Matrix, MatrixFormat, matrices

KEY = "quantisation"
_KEYS = {"weight_format", "block_size", "matrices", "kept_in_int8", "activations", "calibration", "cost"}
_MOST_KEPT = 1000
_MOST_TEXT = 1000


@dataclass(frozen=True)
class QuantisationCost:
    """What quantised weights do to the model, beside its float weights, over some text."""

    text: str
    """Which, a phrase for people."""
    tokens: int
    """How many next tokens were compared."""
    kl: float
    """Mean KL(float || quantised) of the next token's distribution, in nats."""
    top1: float
    """Share of places where both think the same token the likeliest."""
    perplexity: float
    perplexity_float: float

    @property
    def sentence(self) -> str:
        """In words."""
        change = 100 * (self.perplexity / self.perplexity_float - 1)
        return (
            f"perplexity {self.perplexity:.4g} for {self.perplexity_float:.4g} ({change:+.2f}%), "
            f"KL {self.kl:.2g}, the same likeliest token at {100 * self.top1:.1f}% of {self.tokens} places; "
            f"over {self.text}"
        )


@dataclass(frozen=True)
class Quantisation:
    """Of one bundle."""

    weight_format: MatrixFormat
    parts: Mapping[str, Sequence[Matrix]]
    """Canonical name -> its stored matrices."""
    kept_in_int8: Sequence[tuple[str, str]]
    """Patterns of names, and why."""
    activations: Mapping[str, Activations]
    """Of the products of the graphs "prefill" and "step"."""
    calibration: Mapping[str, Any] | None
    cost: QuantisationCost | None

    @property
    def stored(self) -> list[Matrix]:
        """All of them, in the order of weights.data."""
        return [part for parts in self.parts.values() for part in parts]

    @property
    def formats(self) -> dict[str, str]:
        """Name of each stored matrix -> int8 or int4, as `weight_formats.matrices` takes them."""
        return {part.name: part.format for part in self.stored}

    @property
    def multiplied_with(self) -> str:
        """`activations` in words."""
        return ", ".join(f"{kind} in a {graph}" for graph, kind in self.activations.items())


AGAIN = "export the checkpoint again, or copy the bundle again"


def read_quantisation(value: Any, spec: ModelSpec, what: str, again: str = AGAIN) -> Quantisation:
    """Check the manifest's object.

    Args:
        value: of the key.
        spec: of the model.
        what: the file, and
        again: what to do about it, for messages.

    Raises:
        BundleError: anything is missing, unknown, or not what a bundle may say.
    """

    def need(good: bool, where: str, expected: str, got: Any = None) -> None:
        if not good:
            raise BundleError(
                f"{what} has a bad or missing value for {KEY}{where}",
                got=None if got is None else repr(got)[:100],
                expected=expected,
                hint=again,
            )

    need(isinstance(value, dict) and set(value) == _KEYS, "", f"an object with {', '.join(sorted(_KEYS))}")
    kind, formats, kept, activations = (
        value[key] for key in ("weight_format", "matrices", "kept_in_int8", "activations")
    )
    need(kind in ("int8", "int4"), ".weight_format", "int8 or int4", kind)
    need(
        value["block_size"] == BLOCK and not isinstance(value["block_size"], bool), ".block_size", str(BLOCK)
    )
    good = isinstance(formats, dict) and all(isinstance(v, str) for v in formats.values())
    need(good, ".matrices", "an object: name of a matrix, int8 or int4")
    try:
        parts = matrices(spec, formats)
    except ValueError as error:
        need(False, ".matrices", "every matrix of the model, once, as int8 or int4", str(error))
    good = isinstance(kept, list) and len(kept) <= _MOST_KEPT and all(map(_is_rule, kept))
    need(good, ".kept_in_int8", "a list of objects with matrices and reason")
    good = isinstance(activations, dict) and set(activations) == {"prefill", "step"}
    good = good and all(v in ("float", "int8") for v in activations.values())
    need(good, ".activations", "float or int8, for prefill and step", activations)
    calibration = value["calibration"]
    need(
        calibration is None or _is_calibration(calibration), ".calibration", "null, or a file and its tokens"
    )
    cost = value["cost"]
    need(cost is None or _is_cost(cost), ".cost", "null, or numbers of a text")
    return Quantisation(
        kind, parts, tuple((rule["matrices"], rule["reason"]) for rule in kept),
        MappingProxyType(activations), calibration, None if cost is None else QuantisationCost(**cost),
    )  # fmt: skip


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def _is_rule(rule: Any) -> bool:
    return (
        isinstance(rule, dict) and set(rule) == {"matrices", "reason"} and all(map(_is_text, rule.values()))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53


def _is_calibration(value: Any) -> bool:
    keys = {"file", "tokens"}
    return (
        isinstance(value, dict)
        and set(value) == keys
        and _is_text(value["file"])
        and _is_count(value["tokens"])
    )


def _is_cost(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != set(QuantisationCost.__dataclass_fields__):
        return False
    numbers = [value[name] for name in ("kl", "top1", "perplexity", "perplexity_float")]
    good = all(is_number(number) and math.isfinite(number) for number in numbers)
    return (
        good and _is_text(value["text"]) and _is_count(value["tokens"])
        and value["kl"] >= -1e-6 and 0 <= value["top1"] <= 1 and min(numbers[2:]) >= 1
    )  # fmt: skip
