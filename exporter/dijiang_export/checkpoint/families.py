"""Model families as data: where config.json keeps each number, and where the weights keep each parameter.

A family is one `Family` record. Canonical parameter names (docs/bundle-format.md) are the same for all; the
tables say which stored tensors make each of them, with shapes in letters:

    V vocabulary, E embedding width, h hidden, I intermediate, A = H·d, K = Hkv·d, Q = 3·A, d head size,
    P rows of a learned position table, H heads, N rows of the decay tables (max_position_embeddings)

Sources of the layouts: modeling_gpt_neox_dijiang.py@3459531 (GPT-NeoX and the DiJiang parameters), and
transformers' modeling_llama.py and modeling_opt.py for the other two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dijiang_engines.spec import ModelSpec

REQUIRED = object()
"""The default of a key that config.json must have."""


@dataclass(frozen=True)
class Key:
    """Where config.json keeps a value: under `name`, else it is `default`; no name = always `default`.

    null stands for the default only where that is None: elsewhere transformers 5 refuses it, and older
    versions took it for false.
    """

    name: str
    default: Any = REQUIRED
    kind: Literal["size", "flag", "positive", "activation"] = "size"
    most: int = 2**31 - 1
    """Of a size."""


@dataclass(frozen=True)
class RopeKeys:
    """Where a family's config.json keeps RoPE settings outside rope_parameters and rope_scaling."""

    theta: str
    fraction: str
    fraction_default: float
    whole_heads: bool = False
    """The family's attention turns all dimensions of a head: no other fraction works."""


@dataclass(frozen=True)
class Parameter:
    """One canonical parameter and the stored tensors that make it.

    `{i}` in names is the layer. `layout`: "rows" stacks the sources along the first axis; "heads" takes the
    per-head [q|k|v] rows of one source apart into all q, all k, all v; "transposed" turns one matrix.
    `when` names a condition of `conditions()`; empty = always there.
    """

    name: str
    sources: tuple[tuple[str, str], ...]
    layout: Literal["rows", "heads", "transposed"] = "rows"
    when: str = ""


@dataclass(frozen=True)
class Family:
    """Everything that is particular about a family."""

    name: str
    architectures: tuple[str, ...]
    keys: Mapping[str, Key]
    parameters: tuple[Parameter, ...]
    attention: str
    """Prefix of a layer's attention parameters, with {i}."""
    bases: tuple[str, ...]
    """Prefixes that names lack if the model without its head was saved (transformers' base_model_prefix)."""
    norm: Literal["layer_norm", "rms_norm"]
    rope: RopeKeys | None
    """None = no RoPE, but learned positions."""
    gated_mlp: bool = False
    position_offset: int = 0
    """Unused rows before a learned position table."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of stored names that are buffers, not weights."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Beginnings of names that some files have, and the official ones."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """As NEUTRAL: what config.json may say where this package supports one value only."""

    def dijiang(self) -> tuple[Parameter, ...]:
        """What DiJiang adds to a layer's attention, decay tables apart."""
        at = self.attention
        return (
            Parameter("layers.{i}.attention.proj", ((f"{at}.proj_matrix", "d d"),)),
            Parameter("layers.{i}.attention.gate.weight", ((f"{at}.W_G", "h A"),), "transposed"),
            Parameter("layers.{i}.attention.norm_weight", ((f"{at}.group_norm.weight", "A"),)),
            Parameter("layers.{i}.attention.norm_bias", ((f"{at}.group_norm.bias", "A"),)),
        )

    def decay_tables(self, layer: int) -> tuple[str, str]:
        """Stored names of D1 and D2, [1, H, N, 1] both."""
        at = self.attention.format(i=layer)
        return f"{at}.D1", f"{at}.D2"


def conditions(spec: ModelSpec) -> dict[str, bool]:
    """The conditions that `Parameter.when` names."""
    return {
        "": True,
        "attention_bias": spec.attention_bias,
        "dense_bias": spec.dense_bias,
        "mlp_bias": spec.mlp_bias,
        "final_norm": spec.final_norm,
        "projected": spec.embedding_size != spec.hidden_size,
        "untied": not spec.tied_embeddings,
    }


def sizes(spec: ModelSpec) -> dict[str, int]:
    """The letters that shapes are written in."""
    return {
        "V": spec.vocab_size,
        "E": spec.embedding_size,
        "h": spec.hidden_size,
        "I": spec.intermediate_size,
        "A": spec.attention_size,
        "K": spec.num_kv_heads * spec.head_dim,
        "Q": 3 * spec.attention_size,
        "d": spec.head_dim,
        "P": spec.position_embeddings + spec.position_offset,
    }


def _norm(name: str, source: str, *, bias: bool = True, when: str = "") -> tuple[Parameter, ...]:
    weight = Parameter(f"{name}.weight", ((f"{source}.weight", "h"),), when=when)
    return (weight, Parameter(f"{name}.bias", ((f"{source}.bias", "h"),), when=when)) if bias else (weight,)


def _linear(name: str, source: str, rows: str, columns: str, bias: str) -> tuple[Parameter, ...]:
    return (
        Parameter(f"{name}.weight", ((f"{source}.weight", f"{rows} {columns}"),)),
        Parameter(f"{name}.bias", ((f"{source}.bias", rows),), when=bias),
    )


def _split_qkv(at: str) -> tuple[Parameter, ...]:
    parts = (("q_proj", "A"), ("k_proj", "K"), ("v_proj", "K"))
    weights = tuple((f"{at}.{part}.weight", f"{rows} h") for part, rows in parts)
    biases = tuple((f"{at}.{part}.bias", rows) for part, rows in parts)
    return (
        Parameter("layers.{i}.attention.qkv.weight", weights),
        Parameter("layers.{i}.attention.qkv.bias", biases, when="attention_bias"),
    )


MOST_POSITIONS = 2**24
"""Of max_position_embeddings: decay tables have so many rows. The longest published contexts are 10^7."""

_COMMON_KEYS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "intermediate_size": Key("intermediate_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("", None),
    "head_dim": Key("", None),
    "embedding_size": Key("", None),
    "max_position_embeddings": Key("max_position_embeddings", most=MOST_POSITIONS),
    "parallel_residual": Key("", False, "flag"),
    "pre_norm": Key("", True, "flag"),
    "remove_final_norm": Key("", False, "flag"),
    "tied_embeddings": Key("tie_word_embeddings", False, "flag"),
}

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # factors: Granite, MiniCPM, Cohere, Gemma, Grok
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "output_multiplier_scale": (1,),
    "embedding_multiplier_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "dim_model_base": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    # positions: SmolLM3, Llama 4, DeepSeek, Falcon, MPT, Granite
    "no_rope_layers": (1,),
    "no_rope_layer_interval": (),
    "nope_layer_interval": (),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "use_rope": (True,),
    "alibi": (False,),
    "use_alibi": (False,),
    "position_embedding_type": ("rope", "rotary", "absolute"),
    # layers that differ
    "layer_types": ("full_attention",),
    "use_sliding_window": (False,),
    "per_layer_config": (),
}
"""Settings of related families and of transformers itself that change what a model computes and leave no
trace among its tensors: name -> the values (or a list's entries) that change nothing, null and empty ones
apart. The families here have no such setting. sliding_window alone is not among them: files that were
rewritten for LLaMA often keep it, and neither that family nor DiJiang's attention has a window."""

_ROPE_BUFFERS = r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
"""Of every layer in files of transformers < 4.44, of the whole model in later ones."""

_N = "gpt_neox.layers.{i}"
GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    norm="layer_norm",
    rope=RopeKeys("rotary_emb_base", "rotary_pct", 0.25),
    attention=f"{_N}.attention",
    bases=("gpt_neox.",),
    renamed=(("lm_head.", "embed_out."),),  # transformers >= 5.14 calls it so in memory, but not in its files
    keys=_COMMON_KEYS
    | {
        "norm_epsilon": Key("layer_norm_eps", 1e-5, "positive"),
        "activation": Key("hidden_act", "gelu", "activation"),
        "parallel_residual": Key("use_parallel_residual", True, "flag"),
        "attention_bias": Key("attention_bias", True, "flag"),
        "dense_bias": Key("attention_bias", True, "flag"),
        "mlp_bias": Key("", True, "flag"),
    },
    parameters=(
        Parameter("embed_tokens.weight", (("gpt_neox.embed_in.weight", "V E"),)),
        *_norm("layers.{i}.attention_norm", f"{_N}.input_layernorm"),
        Parameter(
            "layers.{i}.attention.qkv.weight", ((f"{_N}.attention.query_key_value.weight", "Q h"),), "heads"
        ),
        Parameter(
            "layers.{i}.attention.qkv.bias",
            ((f"{_N}.attention.query_key_value.bias", "Q"),),
            "heads",
            when="attention_bias",
        ),
        *_linear("layers.{i}.attention.dense", f"{_N}.attention.dense", "h", "A", "dense_bias"),
        *_norm("layers.{i}.mlp_norm", f"{_N}.post_attention_layernorm"),
        *_linear("layers.{i}.mlp.up", f"{_N}.mlp.dense_h_to_4h", "I", "h", "mlp_bias"),
        *_linear("layers.{i}.mlp.down", f"{_N}.mlp.dense_4h_to_h", "h", "I", "mlp_bias"),
        *_norm("final_norm", "gpt_neox.final_layer_norm", when="final_norm"),
        Parameter("lm_head.weight", (("embed_out.weight", "V E"),), when="untied"),
    ),
    ignored=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|mask)",
        rf"gpt_neox\.(layers\.\d+\.attention\.)?{_ROPE_BUFFERS}",
    ),
)

_L = "model.layers.{i}"
LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    norm="rms_norm",
    rope=RopeKeys("rope_theta", "partial_rotary_factor", 1.0, whole_heads=True),
    gated_mlp=True,
    attention=f"{_L}.self_attn",
    bases=("model.",),
    keys=_COMMON_KEYS
    | {
        "num_kv_heads": Key("num_key_value_heads", None),
        "head_dim": Key("head_dim", None),
        "norm_epsilon": Key("rms_norm_eps", 1e-6, "positive"),
        "activation": Key("hidden_act", "silu", "activation"),
        "attention_bias": Key("attention_bias", False, "flag"),
        "dense_bias": Key("attention_bias", False, "flag"),
        "mlp_bias": Key("mlp_bias", False, "flag"),
    },
    parameters=(
        Parameter("embed_tokens.weight", (("model.embed_tokens.weight", "V E"),)),
        *_norm("layers.{i}.attention_norm", f"{_L}.input_layernorm", bias=False),
        *_split_qkv(f"{_L}.self_attn"),
        *_linear("layers.{i}.attention.dense", f"{_L}.self_attn.o_proj", "h", "A", "dense_bias"),
        *_norm("layers.{i}.mlp_norm", f"{_L}.post_attention_layernorm", bias=False),
        *_linear("layers.{i}.mlp.gate", f"{_L}.mlp.gate_proj", "I", "h", "mlp_bias"),
        *_linear("layers.{i}.mlp.up", f"{_L}.mlp.up_proj", "I", "h", "mlp_bias"),
        *_linear("layers.{i}.mlp.down", f"{_L}.mlp.down_proj", "h", "I", "mlp_bias"),
        *_norm("final_norm", "model.norm", bias=False, when="final_norm"),
        Parameter("lm_head.weight", (("lm_head.weight", "V E"),), when="untied"),
    ),
    ignored=(rf"model\.(layers\.\d+\.self_attn\.)?{_ROPE_BUFFERS}",),
)

_O = "model.decoder.layers.{i}"
OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM", "OPTModel"),
    norm="layer_norm",
    rope=None,
    attention=f"{_O}.self_attn",
    bases=("model.", "model.decoder."),
    position_offset=2,  # transformers' OPTLearnedPositionalEmbedding
    keys=_COMMON_KEYS
    | {
        "intermediate_size": Key("ffn_dim"),
        "embedding_size": Key("word_embed_proj_dim", None),
        "norm_epsilon": Key("", 1e-5, "positive"),  # modeling_opt.py leaves torch's default
        "activation": Key("activation_function", "relu", "activation"),
        "attention_bias": Key("enable_bias", True, "flag"),
        "dense_bias": Key("enable_bias", True, "flag"),
        "mlp_bias": Key("enable_bias", True, "flag"),
        "pre_norm": Key("do_layer_norm_before", True, "flag"),
        "remove_final_norm": Key("_remove_final_layer_norm", False, "flag"),
        "tied_embeddings": Key("tie_word_embeddings", True, "flag"),
    },
    parameters=(
        Parameter("embed_tokens.weight", (("model.decoder.embed_tokens.weight", "V E"),)),
        Parameter("embed_positions.weight", (("model.decoder.embed_positions.weight", "P h"),)),
        Parameter("project_in.weight", (("model.decoder.project_in.weight", "h E"),), when="projected"),
        *_norm("layers.{i}.attention_norm", f"{_O}.self_attn_layer_norm"),
        *_split_qkv(f"{_O}.self_attn"),
        *_linear("layers.{i}.attention.dense", f"{_O}.self_attn.out_proj", "h", "A", "dense_bias"),
        *_norm("layers.{i}.mlp_norm", f"{_O}.final_layer_norm"),
        *_linear("layers.{i}.mlp.up", f"{_O}.fc1", "I", "h", "mlp_bias"),
        *_linear("layers.{i}.mlp.down", f"{_O}.fc2", "h", "I", "mlp_bias"),
        *_norm("final_norm", "model.decoder.final_layer_norm", when="final_norm"),
        Parameter("project_out.weight", (("model.decoder.project_out.weight", "E h"),), when="projected"),
        Parameter("lm_head.weight", (("lm_head.weight", "V E"),), when="untied"),
    ),
    ignored=(r"model\.decoder\.version",),  # a mark that checkpoints from fairseq carry
    renamed=(("decoder.", "model.decoder."),),
    neutral={"layer_norm_elementwise_affine": (True,)},
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (GPT_NEOX, LLAMA, OPT)}
"""By config.json's model_type."""
