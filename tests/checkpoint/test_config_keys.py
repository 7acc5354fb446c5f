"""Every key of config.json that changes a model is read as transformers 5 reads it, or refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import of_family
from transformers import GPTNeoXConfig, LlamaConfig, OPTConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from dijiang_engines.errors import BundleError, CheckpointError
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.config import ACTIVATIONS, build_spec
from dijiang_export.checkpoint.families import FAMILIES, NEUTRAL
from dijiang_export.reference import model as reference

FAMILY_NAMES = ("gpt_neox", "llama", "opt")
OWN = {"gpt_neox": GPTNeoXConfig, "llama": LlamaConfig, "opt": OPTConfig}
SIZE_KEYS = {"vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "num_hidden_layers",
             "num_attention_heads", "max_position_embeddings"}  # fmt: skip


def spec_of(family: str, config: dict[str, Any]) -> ModelSpec:
    return build_spec(Path("/nowhere"), copy.deepcopy(config), FAMILIES[family])


def sizes_only(family: str) -> dict[str, Any]:
    return {k: v for k, v in of_family(family, hidden=128).config.items() if k in SIZE_KEYS}


# Defaults


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    spec, own = spec_of(family, sizes_only(family)), OWN[family](**sizes_only(family))
    activation = own.activation_function if family == "opt" else own.hidden_act
    assert spec.activation == ACTIVATIONS[activation]
    assert spec.tied_embeddings == own.tie_word_embeddings
    assert spec.head_dim == (getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads)
    assert spec.num_kv_heads == getattr(own, "num_key_value_heads", own.num_attention_heads)
    if family != "opt":
        assert spec.attention_bias == spec.dense_bias == own.attention_bias
        assert spec.rope_theta == own.rope_parameters["rope_theta"]
        assert spec.rotary_dim == int(spec.head_dim * own.rope_parameters.get("partial_rotary_factor", 1.0))
    if family == "gpt_neox":
        assert (spec.norm_epsilon, spec.parallel_residual) == (own.layer_norm_eps, own.use_parallel_residual)
    elif family == "llama":
        assert (spec.norm_epsilon, spec.mlp_bias) == (own.rms_norm_eps, own.mlp_bias)
    else:
        assert spec.attention_bias == spec.dense_bias == spec.mlp_bias == own.enable_bias
        assert spec.post_norm != own.do_layer_norm_before
        assert spec.final_norm == (own.do_layer_norm_before and not own._remove_final_layer_norm)
        assert spec.embedding_size == own.word_embed_proj_dim


WITHOUT_EFFECT = {
    # training
    "attention_dropout", "hidden_dropout", "dropout", "layerdrop", "classifier_dropout", "initializer_range",
    "init_std",
    # how it is run; pretraining_tp and chunk_size_feed_forward only cut the same products into pieces
    "use_cache", "dtype", "output_hidden_states", "return_dict", "transformers_version", "pretraining_tp",
    "chunk_size_feed_forward", "pad_token_id", "is_decoder", "is_encoder_decoder",
    # other tasks
    "id2label", "label2id", "problem_type",
}  # fmt: skip
READ_ELSEWHERE = {"architectures", "bos_token_id", "eos_token_id", "rope_parameters"}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_field_of_transformers_is_known(family: str) -> None:
    """A version of transformers with a new setting fails here until somebody has looked at it."""
    own = {field.name for field in dataclasses.fields(OWN[family])}
    assert {field.name for field in dataclasses.fields(PreTrainedConfig)} <= own
    read = {key.name for key in FAMILIES[family].keys.values()} | {*FAMILIES[family].neutral}
    assert own - read - WITHOUT_EFFECT - READ_ELSEWHERE == set()
    assert not own & {*NEUTRAL}, "a setting that this family has, and that we say it has not"


# Activations


def test_activations_are_transformers_own() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    for name in ACT2FN:
        config = sizes_only("llama") | {"hidden_act": name}
        if name in ACTIVATIONS:
            ours = reference.ACTIVATIONS[spec_of("llama", config).activation](x)
            torch.testing.assert_close(ours, ACT2FN[name](x), rtol=0, atol=1e-8)
        else:
            with pytest.raises(CheckpointError, match="activation"):
                spec_of("llama", config)


# Settings that the families do not have

CHANGED: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (12.0, 0, "1"),
    "residual_multiplier": (0.22,),
    "attention_multiplier": (0.0078125, 1),
    "logits_scaling": (8.0,),
    "logit_scale": (0.0625, True),
    "output_multiplier_scale": (0.577,),
    "embedding_multiplier_scale": (78.4,),
    "scale_emb": (12,),
    "scale_depth": (1.4,),
    "dim_model_base": (256,),
    "query_pre_attn_scalar": (224,),
    "attn_logit_softcapping": (50.0,),
    "final_logit_softcapping": (30.0,),
    "clip_qkv": (8.0,),
    "qk_layernorm": (True,),
    "use_qk_norm": (True, 1),
    "no_rope_layers": ([1, 1, 1, 0], [0], 0),
    "no_rope_layer_interval": (4,),
    "nope_layer_interval": (4,),
    "rope_interleave": (True,),
    "rope_interleaved": (True,),
    "rope_local_base_freq": (10000.0,),
    "use_rope": (False,),
    "alibi": (True,),
    "use_alibi": (True,),
    "position_embedding_type": ("alibi", "nope"),
    "layer_types": (["sliding_attention", "full_attention"], ["linear_attention"], "full"),
    "use_sliding_window": (True,),
    "per_layer_config": ({"0": {"num_attention_heads": 2}}, [{"hidden_size": 1}]),
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", NEUTRAL)
def test_settings_of_other_families(family: str, name: str) -> None:
    for value in CHANGED[name]:
        with pytest.raises(CheckpointError, match=f"{name} = .* is not supported"):
            spec_of(family, sizes_only(family) | {name: value})
    plain = spec_of(family, sizes_only(family))
    for value in (None, [], *NEUTRAL[name], *([item] * 3 for item in NEUTRAL[name])):
        assert spec_of(family, sizes_only(family) | {name: value}) == plain
    if NEUTRAL[name] and type(NEUTRAL[name][0]) is int:
        assert spec_of(family, sizes_only(family) | {name: 1.0}) == plain


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_geometry_that_the_family_does_not_read(family: str) -> None:
    plain = spec_of(family, sizes_only(family))
    same = {"num_key_value_heads": plain.num_heads, "head_dim": plain.head_dim}
    assert spec_of(family, sizes_only(family) | same) == plain
    for keys in ({"num_key_value_heads": 2}, {"head_dim": 64}, {"head_dim": True}, {"head_dim": "32"}):
        with pytest.raises(CheckpointError, match="does not fit this family"):
            spec_of(family, sizes_only(family) | keys)


# Values of every kind in every key

VALUES: tuple[Any, ...] = (
    10**400, -(10**400), 2**63, 2**31, 2**31 - 1, 2**24 + 1, 10**6, 0, -1, -0.0, 0.5, 1e-320, 1e300, 64.0,
    float("inf"), float("-inf"), float("nan"), True, False, None, "", "64", "gelu_10", [], [64], {}, {"a": 1},
    [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]],
)  # fmt: skip
NULL_STANDS_FOR_THE_DEFAULT = {"num_key_value_heads", "head_dim", "word_embed_proj_dim", "rope_scaling",
                               "rope_parameters", "partial_rotary_factor", "bos_token_id", "eos_token_id",
                               "quantization_config"}  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_any_value_in_any_key_is_read_or_refused_quickly(family: str, tmp_path: Path) -> None:
    folder = of_family(family, layers=1).save(tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = {key.name for key in FAMILIES[family].keys.values()} - {""}
    names |= NULL_STANDS_FOR_THE_DEFAULT | {"rope_theta", "rotary_emb_base", "rotary_pct"}
    for name in sorted(names):
        for value in VALUES:
            path.write_text(json.dumps(config | {name: value}))
            started = time.monotonic()
            read = opens(folder)
            assert time.monotonic() - started < 10, (name, value)
            if read and value is None:
                assert name in NULL_STANDS_FOR_THE_DEFAULT or name not in config, name


def opens(folder: Path) -> bool:
    """Raises what is not a CheckpointError."""
    try:
        open_checkpoint(folder).close()
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon"),
        ({"group_norm_epsilon": True}, "group_norm_epsilon"),
    ],
)
def test_bundles_are_held_to_the_same(change: dict[str, Any], match: str) -> None:
    good = spec_of("llama", sizes_only("llama")).to_json()
    assert ModelSpec.from_json(good | {"rope_scaling": {"rope_type": "linear", "factor": 2}})
    with pytest.raises(BundleError, match=f"bad value for {match}"):
        ModelSpec.from_json(good | change)
