"""Writes small random checkpoints in the official layouts, for everybody's tests.

    folder = write_checkpoint(tmp_path / "model", "llama", heads=4, kv_heads=2, decay="trained")

Weights are scaled so that activations stay near one and every parameter matters for the logits. Nothing
here uses the package under test: it is the other side of the reader.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.fft import dct

Family = Literal["gpt_neox", "llama", "opt"]
Decay = Literal["geometric", "trained", "none"]
Format = Literal["safetensors", "bin", "sharded-safetensors", "sharded-bin"]

ARCHITECTURES = {"gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def official_gammas(heads: int) -> torch.Tensor:
    """float32 [H]: the decay per head that the official code starts with."""
    return 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), heads))


def official_tables(heads: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D1 and D2, float32 [1, H, N, 1], as the official code initialises them."""
    powers = official_gammas(heads).view(heads, 1, 1) ** torch.arange(positions).unsqueeze(1)
    return powers.float().unsqueeze(0), (1 / powers).float().unsqueeze(0)


def trained_tables(heads: int, positions: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables that no γ describes: noise, negative entries, zeros and a few large ratios. float32."""
    d1, d2 = official_tables(heads, positions)
    d1 = d1 + 0.05 * torch.randn(d1.shape, generator=rng)
    d2 = d2 * (1 + 0.5 * torch.randn(d2.shape, generator=rng))
    flip = torch.rand(d2.shape, generator=rng) < 0.1
    d2 = torch.where(flip, -d2, d2)
    d2[:, :, positions // 3] = 0.0
    d2[:, 0, positions // 2] *= 100.0
    return d1, d2


def write_checkpoint(
    path: str | Path,
    family: Family = "gpt_neox",
    *,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int = 2,
    vocab: int = 256,
    intermediate: int = 96,
    dtype: str = "float32",
    decay_dtype: str | None = None,
    rotary_pct: float | None = None,
    rotary_base: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    parallel_residual: bool = True,
    tied: bool | None = None,
    attention_bias: bool | None = None,
    mlp_bias: bool | None = None,
    pre_norm: bool = True,
    embedding_size: int | None = None,
    hidden_act: str | None = None,
    decay: Decay = "geometric",
    max_positions: int = 128,
    format: Format = "safetensors",
    tokenizer: bool = False,
    leftovers: bool = False,
    config_overrides: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write config.json and weights into `path` (created) and return it.

    `head_dim` other than hidden / heads is for llama. `decay="none"` leaves the DiJiang parameters out: a
    vanilla checkpoint. `decay_dtype` stores D1 and D2 in another type than the rest. `pre_norm=False` and
    `embedding_size` make OPT-350M's shape. `leftovers` adds the buffers that old vanilla files carry.
    `config_overrides` replaces config.json keys (a value of None removes the key).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in locals().items() if name != "path"}
    config = make_config(**{k: v for k, v in options.items() if k in _CONFIG_OPTIONS})
    for key, value in (config_overrides or {}).items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (path / "config.json").write_text(json.dumps(config, indent=2))
    tensors = make_tensors(**{k: v for k, v in options.items() if k in _TENSOR_OPTIONS})
    save_tensors(path, tensors, format)
    if tokenizer:
        write_tokenizer(path, vocab)
    return path


_CONFIG_OPTIONS = {
    "family", "hidden", "heads", "kv_heads", "head_dim", "layers", "vocab", "intermediate", "dtype",
    "rotary_pct", "rotary_base", "rope_scaling", "parallel_residual", "tied", "attention_bias",
    "mlp_bias", "pre_norm", "embedding_size", "hidden_act", "max_positions",
}  # fmt: skip
_TENSOR_OPTIONS = {
    "family", "hidden", "heads", "kv_heads", "head_dim", "layers", "vocab", "intermediate", "dtype",
    "decay_dtype", "tied", "attention_bias", "mlp_bias", "pre_norm", "embedding_size", "decay",
    "max_positions", "leftovers", "seed",
}  # fmt: skip


def default_config(family: str, **options: Any) -> dict[str, Any]:
    """config.json as `write_checkpoint` makes it, without a checkpoint."""
    defaults = {name: p.default for name, p in inspect.signature(write_checkpoint).parameters.items()}
    return make_config(**{name: defaults[name] for name in _CONFIG_OPTIONS} | {"family": family} | options)


def make_config(
    *,
    family: str,
    hidden: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None,
    layers: int,
    vocab: int,
    intermediate: int,
    dtype: str,
    rotary_pct: float | None,
    rotary_base: float,
    rope_scaling: dict[str, Any] | None,
    parallel_residual: bool,
    tied: bool | None,
    attention_bias: bool | None,
    mlp_bias: bool | None,
    pre_norm: bool,
    embedding_size: int | None,
    hidden_act: str | None,
    max_positions: int,
) -> dict[str, Any]:
    """config.json of such a checkpoint, in the spellings of that family's own published files."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max_positions,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family == "gpt_neox":
        config |= {
            "auto_map": {"AutoModelForCausalLM": "modeling_gpt_neox_dijiang.GPTNeoXForCausalLM"},
            "intermediate_size": intermediate,
            "hidden_act": hidden_act or "gelu",
            "rotary_pct": 0.25 if rotary_pct is None else rotary_pct,
            "rotary_emb_base": rotary_base,
            "rope_scaling": rope_scaling,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": parallel_residual,
            "tie_word_embeddings": bool(tied),
        }
        if attention_bias is not None:
            config["attention_bias"] = attention_bias
    elif family == "llama":
        config |= {
            "intermediate_size": intermediate,
            "hidden_act": hidden_act or "silu",
            "num_key_value_heads": kv_heads or heads,
            "rope_theta": rotary_base,
            "rope_scaling": rope_scaling,
            "rms_norm_eps": 1e-6,
            "attention_bias": bool(attention_bias),
            "mlp_bias": bool(mlp_bias),
            "tie_word_embeddings": bool(tied),
        }
        if head_dim is not None:
            config["head_dim"] = head_dim
        if rotary_pct is not None:
            config["partial_rotary_factor"] = rotary_pct
    else:
        config |= {
            "ffn_dim": intermediate,
            "activation_function": hidden_act or "relu",
            "do_layer_norm_before": pre_norm,
            "_remove_final_layer_norm": False,
            "word_embed_proj_dim": embedding_size or hidden,
            "enable_bias": attention_bias is not False,
            "tie_word_embeddings": tied is not False,
        }
    return config


def make_tensors(
    *,
    family: str,
    hidden: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None,
    layers: int,
    vocab: int,
    intermediate: int,
    dtype: str,
    decay_dtype: str | None,
    tied: bool | None,
    attention_bias: bool | None,
    mlp_bias: bool | None,
    pre_norm: bool,
    embedding_size: int | None,
    decay: str,
    max_positions: int,
    leftovers: bool,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The weights under their official names, in `dtype`."""
    rng = torch.Generator().manual_seed(seed)
    d = head_dim or hidden // heads
    kv = kv_heads or heads
    out: dict[str, torch.Tensor] = {}

    def matrix(name: str, *shape: int) -> None:
        out[name] = torch.randn(shape, generator=rng) / math.sqrt(shape[-1])

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        matrix(f"{name}.weight", rows, columns)
        if bias:
            out[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=rng)

    def norm(name: str, size: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=rng)
        if bias:
            out[f"{name}.bias"] = 0.1 * torch.randn(size, generator=rng)

    def dijiang(at: str) -> None:
        if decay == "none":
            return
        w = torch.randn(d, generator=rng)
        out[f"{at}.proj_matrix"] = torch.from_numpy(dct(np.eye(d), axis=0, norm="ortho")).float() * w
        out[f"{at}.W_G"] = torch.randn(hidden, heads * d, generator=rng) / math.sqrt(hidden)
        norm(f"{at}.group_norm", heads * d)
        if decay == "trained":
            d1, d2 = trained_tables(heads, max_positions, rng)
        else:
            d1, d2 = official_tables(heads, max_positions)
        out[f"{at}.D1"], out[f"{at}.D2"] = d1, d2

    if family == "gpt_neox":
        bias = attention_bias is not False
        out["gpt_neox.embed_in.weight"] = torch.randn(vocab, hidden, generator=rng)
        for i in range(layers):
            at = f"gpt_neox.layers.{i}"
            norm(f"{at}.input_layernorm", hidden)
            norm(f"{at}.post_attention_layernorm", hidden)
            linear(f"{at}.attention.query_key_value", 3 * heads * d, hidden, bias)
            linear(f"{at}.attention.dense", hidden, heads * d, bias)
            dijiang(f"{at}.attention")
            linear(f"{at}.mlp.dense_h_to_4h", intermediate, hidden, True)
            linear(f"{at}.mlp.dense_4h_to_h", hidden, intermediate, True)
            if leftovers:
                tril = torch.tril(torch.ones(max_positions, max_positions, dtype=torch.bool))
                out[f"{at}.attention.bias"] = tril[None, None]
                out[f"{at}.attention.masked_bias"] = torch.tensor(-1e9)
                out[f"{at}.attention.rotary_emb.inv_freq"] = _inv_freq(d // 4)
        norm("gpt_neox.final_layer_norm", hidden)
        if not tied:
            matrix("embed_out.weight", vocab, hidden)
    elif family == "llama":
        bias = bool(attention_bias)
        out["model.embed_tokens.weight"] = torch.randn(vocab, hidden, generator=rng)
        for i in range(layers):
            at = f"model.layers.{i}"
            norm(f"{at}.input_layernorm", hidden, bias=False)
            norm(f"{at}.post_attention_layernorm", hidden, bias=False)
            linear(f"{at}.self_attn.q_proj", heads * d, hidden, bias)
            linear(f"{at}.self_attn.k_proj", kv * d, hidden, bias)
            linear(f"{at}.self_attn.v_proj", kv * d, hidden, bias)
            linear(f"{at}.self_attn.o_proj", hidden, heads * d, bias)
            dijiang(f"{at}.self_attn")
            linear(f"{at}.mlp.gate_proj", intermediate, hidden, bool(mlp_bias))
            linear(f"{at}.mlp.up_proj", intermediate, hidden, bool(mlp_bias))
            linear(f"{at}.mlp.down_proj", hidden, intermediate, bool(mlp_bias))
            if leftovers:
                out[f"{at}.self_attn.rotary_emb.inv_freq"] = _inv_freq(d)
        norm("model.norm", hidden, bias=False)
        if not tied:
            matrix("lm_head.weight", vocab, hidden)
    else:
        bias = attention_bias is not False
        width = embedding_size or hidden
        out["model.decoder.embed_tokens.weight"] = torch.randn(vocab, width, generator=rng)
        out["model.decoder.embed_positions.weight"] = 0.3 * torch.randn(
            max_positions + 2, hidden, generator=rng
        )
        if width != hidden:
            matrix("model.decoder.project_in.weight", hidden, width)
            matrix("model.decoder.project_out.weight", width, hidden)
        for i in range(layers):
            at = f"model.decoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{at}.self_attn.{part}", hidden, hidden, bias)
            dijiang(f"{at}.self_attn")
            norm(f"{at}.self_attn_layer_norm", hidden)
            linear(f"{at}.fc1", intermediate, hidden, bias)
            linear(f"{at}.fc2", hidden, intermediate, bias)
            norm(f"{at}.final_layer_norm", hidden)
        if pre_norm:
            norm("model.decoder.final_layer_norm", hidden)
        if tied is False:
            matrix("lm_head.weight", vocab, width)
        elif leftovers:
            out["lm_head.weight"] = out["model.decoder.embed_tokens.weight"].clone()

    def stored(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        is_table = name.endswith((".D1", ".D2"))
        return value.to(DTYPES[decay_dtype if is_table and decay_dtype else dtype]).contiguous()

    return {name: stored(name, value) for name, value in out.items()}


def _inv_freq(turned: int) -> torch.Tensor:
    """As old versions of transformers leave it among the weights, for the base 10000."""
    return 1.0 / 10000.0 ** (torch.arange(0, turned, 2).float() / turned)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], format: str = "safetensors") -> None:
    """Write `tensors` as one file, or as three shards with an index."""
    path.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if format.endswith("safetensors") else ("pytorch_model", "bin")

    def save(part: dict[str, torch.Tensor], file: Path) -> None:
        if suffix == "bin":
            torch.save(part, file)
        else:
            save_file(part, str(file), metadata={"format": "pt"})

    if not format.startswith("sharded"):
        save(tensors, path / f"{stem}.{suffix}")
        return
    names = list(tensors)
    count = 3
    weight_map: dict[str, str] = {}
    for shard in range(count):
        mine = names[shard::count]
        file = f"{stem}-{shard + 1:05d}-of-{count:05d}.{suffix}"
        save({name: tensors[name] for name in mine}, path / file)
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, read with the formats' own libraries."""
    from safetensors.torch import load_file

    out: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        out |= load_file(str(file))
    for file in sorted(path.glob("pytorch_model*.bin")):
        out |= torch.load(file, weights_only=True)
    return out


def write_tokenizer(path: Path, vocab: int, extra_tokens: int = 0) -> None:
    """A byte-level tokenizer: every byte one token, and `<|endoftext|>` as id 0 where `vocab` has room.

    `extra_tokens` adds that many tokens after the bytes (to make a vocabulary that is too large).
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    if vocab < 256:
        raise ValueError("a byte-level tokenizer needs vocab >= 256")
    alphabet = sorted(ByteLevel.alphabet())
    names = (["<|endoftext|>"] if vocab > 256 else []) + alphabet
    names += [f"extra{i}" for i in range(extra_tokens)]
    tok = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tok.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = ByteLevelDecoder()
    if vocab > 256:
        tok.add_special_tokens(["<|endoftext|>"])
    tok.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
