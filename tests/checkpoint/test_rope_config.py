"""RoPE settings of config.json: read as transformers 5's own models read them, or refused.

The oracle is transformers: its configuration classes standardise a config, its rotary embeddings make the
frequencies. For every config of a generated matrix either ours are theirs, or ours are a CheckpointError.
"""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import of_family
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.config import build_spec
from dijiang_export.checkpoint.families import FAMILIES
from dijiang_export.reference.rope import inverse_frequencies

logging.set_verbosity_error()

OWN = {"gpt_neox": (GPTNeoXConfig, GPTNeoXRotaryEmbedding), "llama": (LlamaConfig, LlamaRotaryEmbedding)}
ROPE_KEYS = ("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rope_scaling")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXT = {"original_max_position_embeddings": 16}


def config_of(family: str, **keys: Any) -> dict[str, Any]:
    """A config without any RoPE key but `keys`."""
    config = of_family(family, hidden=128, layers=1).config
    return copy.deepcopy({k: v for k, v in config.items() if k not in ROPE_KEYS} | keys)


def theirs(family: str, config: dict[str, Any]) -> torch.Tensor | None:
    """inv_freq of transformers' own model; None if it cannot be built, or its attention cannot be run."""
    make, embed = OWN[family]
    config = copy.deepcopy(config)
    for name in ("architectures", "auto_map", "torch_dtype", "model_type"):
        config.pop(name, None)
    try:
        rotary = embed(make(**config))
    except Exception:  # noqa: BLE001  (of many kinds, from KeyError to torch's own)
        return None
    inv_freq: torch.Tensor = rotary.inv_freq
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turned = 2 * inv_freq.numel()
    if turned > head or (family == "llama" and turned != head):  # q * cos has no common shape
        return None
    assert rotary.attention_scaling == 1
    return inv_freq


def ours(family: str, config: dict[str, Any], folder: Path = Path("/nowhere")) -> ModelSpec:
    return build_spec(folder, copy.deepcopy(config), FAMILIES[family])


def frequencies(spec: ModelSpec) -> torch.Tensor:
    return inverse_frequencies(spec) if spec.rotary_dim else torch.empty(0)


def agree(family: str, config: dict[str, Any]) -> bool:
    """True if the config is read, and then as transformers reads it; False if it is refused."""
    try:
        spec = ours(family, config)
    except CheckpointError:
        return False
    own = theirs(family, config)
    assert own is not None, f"transformers cannot run this, we do: {config}"
    inv_freq = frequencies(spec)
    assert inv_freq.shape == own.shape, config
    torch.testing.assert_close(inv_freq, own, rtol=1e-6, atol=0, msg=str(config))
    return True


# Spellings that say a thing once: all are read

BASES = (500, 500.0, 1e6, 1.5)
SCALINGS: tuple[dict[str, Any], ...] = (
    {},
    {"rope_type": "default"},
    {"type": "default"},
    {"type": "linear", "rope_type": "linear", "factor": 4},
    {"type": "linear", "factor": 2.5},
    {"rope_type": "linear", "factor": 0.5},
    {"rope_type": "linear", "factor": 1},
    LLAMA3 | CONTEXT,
    LLAMA3 | {"original_max_position_embeddings": 64.0, "factor": 32},
    LLAMA3 | {"original_max_position_embeddings": 8192, "low_freq_factor": 0.5},
    LLAMA3,
)


def spelt_once(family: str) -> list[dict[str, Any]]:
    """Base at the top level, in one of the dictionaries, or nowhere; the same of the fraction."""
    base_key, part_key = {
        "gpt_neox": ("rotary_emb_base", "rotary_pct"),
        "llama": ("rope_theta", "partial_rotary_factor"),
    }[family]
    parts = (0.25, 0.5, 1, 1.0, 0, 0.0, 0.3, 0.0625) if family == "gpt_neox" else (1, 1.0)
    bases: list[Any] = [(where, base) for where in ("top", "in") for base in BASES] + [None]
    fractions: list[Any] = [(where, part) for where in ("top", "in") for part in parts] + [None]
    out = []
    for name, scaling, base, part in itertools.product(
        ("rope_scaling", "rope_parameters"), SCALINGS, bases, fractions
    ):
        section, top = dict(scaling), {}
        if base:
            {"top": top, "in": section}[base[0]][base_key if base[0] == "top" else "rope_theta"] = base[1]
        if part:
            {"top": top, "in": section}[part[0]][
                part_key if part[0] == "top" else "partial_rotary_factor"
            ] = part[1]
        out.append(config_of(family, **top, **{name: section}))
    return out


@pytest.mark.parametrize("family", OWN)
def test_what_is_said_once_is_read(family: str) -> None:
    configs = spelt_once(family)
    assert len(configs) >= 900
    odd = 0
    for config in random.Random(1).sample(configs, 900):
        if not agree(family, config):
            odd += 1
            with pytest.raises(CheckpointError, match="odd number of dimensions"):
                ours(family, config)
    assert odd < 200 if family == "gpt_neox" else odd == 0  # 0.3 of 32 is 9


# Any mixture of places and values: read alike, or refused

TOP_VALUES: dict[str, tuple[Any, ...]] = {
    "rope_theta": (10000, 10000.0, 500, 500.0, None, "500", True, -1, 0, float("nan"), 10**400, [500]),
    "rotary_emb_base": (10000, 500, 500.0, None, "500", 0, float("inf")),
    "rotary_pct": (0.25, 0.5, 1.0, 0, None, "0.5", 1.5, -0.5, True, float("nan")),
    "partial_rotary_factor": (0.25, 0.5, 1, 1.0, None, "0.5", 1.5, False),
    "original_max_position_embeddings": (16, 64, None, "16", 0, -16, 1e400),
    "head_dim": (32, 64, None, 0, 32.0, "32", True),
    "rope_type": ("linear",),
    "factor": (2.0,),
}
INNER_VALUES: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default", "linear", "llama3", "dynamic", "yarn", "longrope", "proportional", "axial", "su",
                  None, 5, ["linear"], "Linear"),
    "type": ("default", "linear", "llama3", "dynamic", None, "mrope"),
    "rope_theta": (10000, 500, 500.0, None, "500", True, -500, 10**400, float("nan"), {}),
    "partial_rotary_factor": (0.25, 0.5, 1.0, 1, 0, None, "1", 2, float("inf")),
    "factor": (1, 2.0, 8, 0, -2, None, "2", True, 10**400, float("nan"), [2]),
    "low_freq_factor": (1.0, 1, 4.0, 8, 0, None, "1"),
    "high_freq_factor": (4.0, 4, 1.0, None, "4", float("inf")),
    "original_max_position_embeddings": (16, 64.0, 128, None, "16", 0, True),
    "rotary_emb_base": (500,),
    "rotary_pct": (0.5,),
    "base": (500,),
    "beta_fast": (32,),
    "attention_factor": (1.0, None, 2.0),
    "mscale": (1.0,),
    "short_factor": ([1.0] * 16,),
    "full_attention": ({"rope_type": "default", "rope_theta": 500.0}, None),
    "rope_scaling": ({"type": "linear", "factor": 2.0},),
}  # fmt: skip
SECTIONS: tuple[Any, ...] = (None, {}, [], "linear", 0, False, [{"type": "linear"}], 4.0)


def mixture(rng: random.Random) -> dict[str, Any]:
    """A few keys in each place; good values are more frequent than bad ones."""

    def pick(values: dict[str, tuple[Any, ...]], names: list[str]) -> dict[str, Any]:
        return {name: rng.choice(values[name][:4] if rng.random() < 0.85 else values[name]) for name in names}

    def section() -> Any:
        if rng.random() < 0.15:
            return rng.choice(SECTIONS)
        usual = ["rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"]
        names = [name for name in usual if rng.random() < 0.4]
        if rng.random() < 0.3:
            names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor"]
        if rng.random() < 0.15:
            names.append(rng.choice(list(INNER_VALUES)))
        return pick(INNER_VALUES, names)

    keys = pick(TOP_VALUES, [name for name in TOP_VALUES if rng.random() < 0.15])
    if rng.random() < 0.6:
        keys["rope_scaling"] = section()
    if rng.random() < 0.4:
        keys["rope_parameters"] = section()
    if rng.random() < 0.1:
        keys["layer_types"] = ["full_attention"]
    return keys


@pytest.mark.parametrize("family", OWN)
def test_any_mixture_is_read_alike_or_refused(family: str) -> None:
    rng = random.Random(7)
    read = sum(agree(family, config_of(family, **mixture(rng))) for _ in range(3000))
    assert read > 250


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, None), (1, None), (8, None), (2, 32), (3, 48), (5, 80)])
def test_other_head_sizes(family: str, heads: int, head_dim: int | None) -> None:
    """int(d · fraction), for fractions that binary numbers do not hold."""
    read = 0
    for fraction in (0.1, 0.15, 0.2, 0.25, 0.35, 0.4, 0.55, 0.7, 0.85, 0.95, 0.999, 1.0):
        hidden = (head_dim or 128 // heads) * heads
        config = config_of(family, rope_parameters={"partial_rotary_factor": fraction, "rope_theta": 500.0})
        config |= {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads}
        read += agree(family, config if head_dim is None else config | {"head_dim": head_dim})
    assert read >= (4 if family == "gpt_neox" else 1)


# What is refused, and in which words


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("llama", {"rope_theta": 1e4, "rope_scaling": {"rope_theta": 500}}, ("10000.0", "500")),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 500}}, ("10000.0", "500")),
        ("llama", {"rotary_emb_base": 500}, ("10000.0", "rotary_emb_base = 500")),
        ("llama", {"partial_rotary_factor": 0.5}, ("0.5", "16 of 32", "1.0")),
        ("llama", {"rope_scaling": {"partial_rotary_factor": 0.5}}, ("0.5", "16 of 32", "1.0")),
        ("llama", {"rotary_pct": 0.25}, ("rotary_pct = 0.25", "1.0")),
        ("gpt_neox", {"rope_theta": 500.0}, ("rotary_emb_base, by default = 10000.0", "rope_theta = 500.0")),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, ("rotary_pct, by default = 0.25", "0.5")),
        ("gpt_neox", {"rotary_pct": 0.25, "rope_scaling": {"partial_rotary_factor": 0.5}}, ("0.25", "0.5")),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
         ("linear", "llama3")),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 500}},
         ("linear", "500", "rope_scaling and rope_parameters")),
        ("llama", {"rope_scaling": LLAMA3 | CONTEXT, "original_max_position_embeddings": 64}, ("16", "64")),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, ("beta_fast = 32",)),
        ("llama", {"rope_scaling": {"factor": 2.0}}, ("default", "factor = 2.0")),
        ("gpt_neox", {"rope_scaling": {"rotary_pct": 0.5}}, ("rotary_pct = 0.5",)),
        ("gpt_neox", {"rope_parameters": {"full_attention": {"rope_theta": 5}}}, ("full_attention",)),
        ("gpt_neox", {"rotary_emb_base": None}, ("rotary_emb_base", "null")),
        ("opt", {"rope_theta": 500.0}, ("rope_theta = 500.0", "learned positions")),
        ("opt", {"rope_parameters": {"rope_theta": 500.0}}, ("500.0", "learned positions")),
        ("opt", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 1}, ("linear", "rotary_p")),
    ],
)  # fmt: skip
def test_refusals_name_what_they_found(family: str, keys: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours(family, config_of(family, **keys))
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"rope_scaling": None}, {"rope_parameters": {}, "rope_theta": None}])
def test_opt_has_no_rope(keys: dict[str, Any]) -> None:
    spec = ours("opt", config_of("opt", **keys))
    assert (spec.rotary_dim, spec.rope_scaling) == (0, None)


def test_places_that_agree_are_read() -> None:
    """As transformers 4 (all keys), transformers 5 (one dictionary), and files made for both spell it."""
    neox = {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 500, "rope_theta": 500.0}
    both = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    for family, keys in (
        ("gpt_neox", neox),
        ("gpt_neox", neox | {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
        ("llama", {"rope_theta": 500, "rope_scaling": both, "rope_parameters": both | {"factor": 2}}),
        ("llama", {"rope_theta": 500, "partial_rotary_factor": 1.0, "rotary_pct": 1, "rope_parameters": {}}),
        ("llama", {"partial_rotary_factor": None, "rope_theta": 500.0, "rope_scaling": None}),
        ("llama", {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0}}),
        ("llama", {"rope_scaling": LLAMA3 | CONTEXT, **CONTEXT}),
    ):
        assert agree(family, config_of(family, **keys)), keys
