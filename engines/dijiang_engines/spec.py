"""ModelSpec: the geometry of a DiJiang model, whatever family it came from.

One frozen record describes GPT-NeoX, LLaMA and OPT models alike: a family is a choice of values here
plus a table of checkpoint names (`dijiang_export.checkpoint.families`). It travels in a bundle's manifest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from dijiang_engines.errors import BundleError

NormKind = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
DecayKind = Literal["geometric", "tables"]

ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Values of rope_scaling's rope_type, and the positive numbers that each needs beside it."""

_LARGEST = 1e30
"""Of a number that is no size: float32 holds it, and its inverse."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model except its weights.

    Sizes count elements. The state of one sequence is `num_layers` float32 tensors [H, d, d].
    """

    family: str
    """Where the checkpoint's names come from: gpt_neox, llama or opt."""
    vocab_size: int
    hidden_size: int
    """h, the width of the residual stream."""
    intermediate_size: int
    num_layers: int
    num_heads: int
    """H, query heads."""
    num_kv_heads: int
    """Hkv; divides H. Query head i reads key/value head i // (H // Hkv)."""
    head_dim: int
    """d."""
    rotary_dim: int
    """r: leading dimensions of each head that RoPE turns; 0 = none."""
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or rope_type (a key of ROPE_SCALINGS) and the numbers that it needs: folded into inv_freq."""
    norm: NormKind
    norm_epsilon: float
    activation: Activation
    gated_mlp: bool
    """down(act(gate(x)) * up(x)) rather than down(act(up(x)))."""
    parallel_residual: bool
    """GPT-NeoX: x + attention(norm(x)) + mlp(norm'(x)). Otherwise sequential."""
    post_norm: bool
    """OPT-350M: the norm follows the residual addition."""
    final_norm: bool
    attention_bias: bool
    """Biases on the qkv projection."""
    dense_bias: bool
    """A bias on the attention's output projection."""
    mlp_bias: bool
    position_embeddings: int
    """Rows of a learned position table after `position_offset` is taken off (OPT); 0 = none."""
    position_offset: int
    """OPT keeps position n in row n + 2."""
    embedding_size: int
    """Width of the token embedding; differs from hidden_size only with project_in/out (OPT-350M)."""
    tied_embeddings: bool
    max_position_embeddings: int
    """What config.json says: the trained context. No limit by itself."""
    decay: DecayKind
    decay_rows: int
    """Rows N of trained tables; 0 for geometric decay."""
    decay_extended: bool
    """Past the last row, tables go on with the last row instead of stopping."""
    group_norm_epsilon: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def attention_size(self) -> int:
        """H·d, the width of the heads' concatenation."""
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """(H + 2·Hkv)·d, the width of the packed projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, d, d] of one layer and sequence, indexed [head, feature, value]."""
        return (self.num_heads, self.head_dim, self.head_dim)

    @property
    def state_bytes(self) -> int:
        """Bytes of float32 state that one sequence needs, over all layers."""
        return 4 * self.num_layers * self.num_heads * self.head_dim * self.head_dim

    @property
    def max_positions(self) -> int | None:
        """Most tokens that a sequence may hold; None = no limit."""
        limits = []
        if self.position_embeddings:
            limits.append(self.position_embeddings)
        if self.decay == "tables" and not self.decay_extended:
            limits.append(self.decay_rows)
        return min(limits) if limits else None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, in declaration order."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """Read back what `to_json` wrote.

        Raises:
            BundleError: a field is missing, unknown, of the wrong type or range, or does not fit another.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            found = set(data) if isinstance(data, dict) else set()
            raise BundleError(
                "the manifest's model spec does not have the fields of this version",
                got=f"missing {sorted(names - found)}, unknown {sorted(found - names)}",
                hint="export the checkpoint again with this version of dijiang-export",
            )
        values = dict(data)
        for name in names:
            _check_type(name, values[name])
        _check_together(values)
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        return cls(**values)


MAX_LAYERS = 4096
"""The deepest models that were ever trained have about 1,000."""
_MOST_LIST = 1000
_MOST_TEXT = 200

_STRINGS = {
    "family": None,
    "norm": ("layer_norm", "rms_norm"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu"),
    "decay": ("geometric", "tables"),
}
_BOOLS = {
    "gated_mlp", "parallel_residual", "post_norm", "final_norm", "attention_bias", "dense_bias",
    "mlp_bias", "tied_embeddings", "decay_extended",
}  # fmt: skip
_FLOATS = {"rope_theta", "norm_epsilon", "group_norm_epsilon"}
_MAY_BE_ZERO = {"rotary_dim", "position_embeddings", "position_offset", "decay_rows"}


def _check_type(name: str, value: Any) -> None:
    if name in _STRINGS:
        allowed = _STRINGS[name]
        good = _is_text(value) and (allowed is None or value in allowed)
    elif name in _BOOLS:
        good = isinstance(value, bool)
    elif name in _FLOATS:
        good = is_positive(value)
    elif name == "rope_scaling":
        good = value is None or _is_scaling(value)
    elif name == "bos_token_id":
        good = value is None or _is_size(value, 0)
    elif name == "eos_token_ids":
        good = isinstance(value, (list, tuple)) and len(value) <= _MOST_LIST
        good = good and all(_is_size(v, 0) for v in value)
    elif name == "num_layers":
        good = _is_size(value, 1) and value <= MAX_LAYERS
    else:
        good = _is_size(value, 0 if name in _MAY_BE_ZERO else 1)
    if not good:
        raise BundleError(f"the manifest's model spec has a bad value for {name}", got=repr(value)[:200])


def _check_together(values: dict[str, Any]) -> None:
    for name, good, expected in (
        ("num_kv_heads", values["num_heads"] % values["num_kv_heads"] == 0, "a divisor of num_heads"),
        ("rotary_dim", values["rotary_dim"] <= values["head_dim"], "at most head_dim"),
        ("decay_rows", values["decay"] == "geometric" or values["decay_rows"] > 0, "rows of the tables"),
    ):
        if not good:
            raise BundleError(
                f"the manifest's model spec has a bad value for {name}", got=values[name], expected=expected
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT


def is_number(value: Any) -> bool:
    """True for an integer or a finite float of sensible size; true and false are no numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_positive(value: Any) -> bool:
    """True for a number above zero, its inverse of sensible size too."""
    return is_number(value) and value >= 1 / _LARGEST


def _is_scaling(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("rope_type"), str):
        return False
    needed = ROPE_SCALINGS.get(value["rope_type"], ())
    return set(value) == {"rope_type", *needed} and all(is_positive(value[key]) for key in needed)


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
