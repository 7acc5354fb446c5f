"""RoPE settings of config.json -> what turns, by which base and scaling, as transformers 5 reads them.

Files spell them in several places: keys at the top level, whose names differ between families, and the
dictionaries rope_parameters (transformers 5) and rope_scaling (before). transformers 5.23.0 reads them thus
(modeling_rope_utils.py, RotaryEmbeddingConfigMixin.convert_rope_params_to_dict and standardize_rope_params;
configuration_gpt_neox.py, GPTNeoXConfig.convert_rope_params_to_dict):

- rope_scaling, if it is there and not empty, replaces rope_parameters as a whole;
- what the dictionary holds counts before the top level, and the top level before the default;
- of the top level each family knows its own names only (`families.RopeKeys`);
- llama3's original_max_position_embeddings is the top level's, else the dictionary's, else
  max_position_embeddings.

transformers 4 and the official code read some of that otherwise: they look for the base at the top level
alone, for instance. A file does not tell which of them trained the model. So every place that says
something must say the same, also one that transformers 5 passes over; if two differ, both are named and
refused. For a file that is read, the result is transformers 5's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ROPE_SCALINGS, is_number, is_positive
from dijiang_export.checkpoint.families import Family, RopeKeys

DEFAULT_THETA = 10000.0
"""RotaryEmbeddingConfigMixin.default_theta."""

_SECTIONS = ("rope_scaling", "rope_parameters")
_THETAS = ("rope_theta", "rotary_emb_base")
_FRACTIONS = ("partial_rotary_factor", "rotary_pct")
_CONTEXT = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    """RoPE of a model: `ModelSpec`'s rotary_dim, rope_theta and rope_scaling."""

    dim: int
    theta: float = DEFAULT_THETA
    scaling: dict[str, Any] | None = None


def read_rope(where: Path, config: dict[str, Any], family: Family, head_dim: int) -> Rope:
    """RoPE of a family's model with heads of `head_dim`.

    Args:
        where: config.json, for messages.
        config: its content, in which max_position_embeddings is known to be good.
        family: says which names count.
        head_dim: d.

    Raises:
        CheckpointError: a bad value, a key that is not understood, two places that disagree, or a kind of
            scaling that is more than a change of the frequencies.
    """
    sections = {name: _section(where, config, name) for name in _SECTIONS}
    given = {name: section for name, section in sections.items() if section}
    if family.rope is None:
        _refuse_all(where, config, given, family)
        return Rope(0)
    found = {
        name: _Reader(where, config, family.rope, head_dim, name, section).read()
        for name, section in (given or {_SECTIONS[0]: {}}).items()
    }
    first, *others = found.values()
    if others and others[0] != first:
        raise CheckpointError(
            f"{where} has both rope_scaling and rope_parameters, and they differ",
            got=", ".join(f"{name} {json.dumps(section)}" for name, section in given.items()),
            hint="remove the wrong one; transformers 5 takes rope_scaling, and nothing from rope_parameters",
        )
    return first


@dataclass(frozen=True)
class _Setting:
    """A number, and where it may stand."""

    key: str
    """In the dictionaries."""
    own: str
    """At the top level, in this family."""
    others: tuple[str, ...]
    """At the top level, in any family."""
    default: float
    good: Callable[[Any], bool]
    nullable: bool = False
    """null at the top level stands for the default. Elsewhere transformers 5 fails on it."""


@dataclass(frozen=True)
class _Reader:
    """One dictionary, which may be empty, together with the top level."""

    where: Path
    config: Mapping[str, Any]
    keys: RopeKeys
    head_dim: int
    name: str
    section: dict[str, Any]

    def read(self) -> Rope:
        kind = self._kind()
        self._check_keys(kind)
        theta = self._agreed(_Setting("rope_theta", self.keys.theta, _THETAS, DEFAULT_THETA, is_positive))
        dim = self._dim()
        scaling = self._scaling(kind)
        return Rope(dim, float(theta), scaling if dim else None)

    def _kind(self) -> str:
        spelt: dict[str, Any] = {k: self.section[k] for k in ("rope_type", "type") if k in self.section}
        kind, *others = spelt.values() or ["default"]
        if others and others[0] != kind:
            raise CheckpointError(
                f"{self.where}: {self.name} has two types, and they differ", got=_pairs(spelt)
            )
        if not isinstance(kind, str) or kind not in ("default", *ROPE_SCALINGS):
            raise CheckpointError(
                f"{self.where}: {self.name} of type {kind!r} is not supported",
                expected=" or ".join(("default", *ROPE_SCALINGS)),
                hint="dynamic, yarn and longrope make angles depend on the sequence's length",
            )
        return kind

    def _check_keys(self, kind: str) -> None:
        """transformers 5 warns of other keys and goes on without them (_check_received_keys)."""
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_SCALINGS.get(kind, ()))
        unknown = {key: value for key, value in self.section.items() if key not in known}
        if unknown:
            raise CheckpointError(
                f"{self.where}: {self.name} of type {kind!r} has keys that mean nothing there",
                got=_pairs(unknown),
                expected=", ".join(known),
                hint="correct the type, or remove what does not belong to it",
            )

    def _dim(self) -> int:
        """r = int(d · fraction), the product in float64, as transformers takes it."""
        keys, d = self.keys, self.head_dim
        fraction = self._agreed(
            _Setting(
                "partial_rotary_factor", keys.fraction, _FRACTIONS, keys.fraction_default, _is_fraction,
                nullable=keys.whole_heads,
            )
        )  # fmt: skip
        dim = int(d * fraction)
        if keys.whole_heads and dim != d:
            raise CheckpointError(
                f"{self.where}: models of this family turn whole heads, not a part",
                got=f"partial_rotary_factor = {fraction}: {dim} of {d} dimensions",
                expected=f"1.0, all {d} dimensions",
                hint="transformers' own model ignores the key: remove it if that is what trained the model",
            )
        if dim % 2:
            raise CheckpointError(
                f"{self.where}: RoPE would turn an odd number of dimensions",
                got=f"{dim} = int({d} · {fraction})",
                expected="an even number: they turn in pairs",
            )
        return dim

    def _scaling(self, kind: str) -> dict[str, Any] | None:
        if kind == "default":
            return None
        out: dict[str, Any] = {"rope_type": kind}
        for name in ROPE_SCALINGS[kind]:
            if name == _CONTEXT:
                default = self.config["max_position_embeddings"]
                out[name] = self._agreed(_Setting(name, name, (), default, is_positive, nullable=True))
            else:
                out[name] = self.section.get(name)
            if not is_positive(out[name]):
                raise CheckpointError(
                    f"{self.where}: {self.name} of type {kind!r} needs {name}", got=json.dumps(out[name])
                )
        if kind == "llama3" and not out["high_freq_factor"] > out["low_freq_factor"]:
            raise CheckpointError(
                f"{self.where}: {self.name} needs high_freq_factor > low_freq_factor",
                got=json.dumps(self.section),
            )
        return out

    def _agreed(self, setting: _Setting) -> Any:
        """What all places that give a setting say alike."""
        given: dict[str, Any] = {}
        own = setting.own
        if setting.key in self.section:
            given[f"{self.name}.{setting.key}"] = self.section[setting.key]
        elif self.config.get(own) is None:
            if own in self.config and not setting.nullable:
                raise CheckpointError(f"{self.where} has a bad value for {own}", got="null")
            given[f"{own}, by default"] = setting.default
        given |= {n: self.config[n] for n in (own, *setting.others) if self.config.get(n) is not None}
        for name, value in given.items():
            if not setting.good(value):
                raise CheckpointError(f"{self.where} has a bad value for {name}", got=json.dumps(value))
        taken, *others = given.values()
        if any(value != taken for value in others):
            raise CheckpointError(
                f"{self.where} gives {setting.key} in several places, and they differ",
                got=_pairs(given),
                hint="remove the wrong ones: versions of transformers differ in which of them they take",
            )
        return taken


def _section(where: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where} has a bad {name}", got=json.dumps(value), expected="an object or null"
        )
    return value


def _refuse_all(where: Path, config: Mapping[str, Any], given: dict[str, Any], family: Family) -> None:
    given |= {name: config[name] for name in (*_THETAS, *_FRACTIONS) if config.get(name) is not None}
    if given:
        raise CheckpointError(
            f"{where} has RoPE settings, and {family.name} models have learned positions instead",
            got=_pairs(given),
            hint="transformers' own model ignores them: remove them if that is what trained the model",
        )


def _is_fraction(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
