"""Every family against Hugging Face's own model with only its attention replaced by the official formula.

Embeddings, norms, residuals, MLPs, positions, RoPE's frequencies and heads are transformers' code here, and
the attention is written out with D1, D2 and an explicit mask: nothing is shared with the reference model but
the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import RandomCheckpoint, llama, neox, of_family, opt, opt_350m
from support.makers.weight_files import load_tensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, OPTConfig

from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.reference.model import ReferenceModel

CONFIGS = {"gpt_neox": GPTNeoXConfig, "llama": LlamaConfig, "opt": OPTConfig}
LAYERS = {"gpt_neox": "gpt_neox.layers", "llama": "model.layers", "opt": "model.decoder.layers"}
ATTENTION = {"gpt_neox": "attention", "llama": "self_attn", "opt": "self_attn"}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NO_ROPE_KEYS = dict.fromkeys(("rotary_pct", "rotary_emb_base", "rope_theta", "rope_scaling"))
ROPE: dict[str, dict[str, dict[str, Any]]] = {
    "gpt_neox": {
        "keys": {"rotary_emb_base": 500, "rotary_pct": 0.5},
        "scaling": {"rope_scaling": {
            "type": "linear", "factor": 2, "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        "parameters": {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 16, **LLAMA3}},
        "none": {"rotary_pct": 0},
        "nothing": {},
    },
    "llama": {
        "key": {"rope_theta": 500},
        "scaling-default": {"rope_scaling": {"rope_type": "default", "rope_theta": 500}},
        "scaling-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500}},
        "scaling-llama3": {"rope_scaling": {
            "rope_type": "llama3", "rope_theta": 500, "original_max_position_embeddings": 16, **LLAMA3}},
        "parameters": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        "context-at-the-top": {"original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "llama3", **LLAMA3}},
        "no-context": {"rope_parameters": {"rope_type": "llama3", **LLAMA3}},
        "nothing": {},
    },
}  # fmt: skip

OPTIONAL = dict.fromkeys((
    *NO_ROPE_KEYS, "hidden_act", "layer_norm_eps", "use_parallel_residual", "tie_word_embeddings",
    "num_key_value_heads", "rms_norm_eps", "attention_bias", "mlp_bias", "activation_function",
    "do_layer_norm_before", "_remove_final_layer_norm", "word_embed_proj_dim", "enable_bias",
))  # fmt: skip

CASES: dict[str, RandomCheckpoint] = {
    **{
        f"{family}-defaults": of_family(family).config_says(**OPTIONAL)
        for family in ("gpt_neox", "llama", "opt")
    },
    "gpt_neox": neox(hidden=96, heads=6),
    "gpt_neox-sequential-tied": neox().with_config(use_parallel_residual=False, tie_word_embeddings=True),
    "gpt_neox-trained": neox().with_trained_decay(),
    "gpt_neox-linear-rope": neox().with_config(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-gqa": llama(hidden=64, heads=4, kv_heads=2),
    "llama-wide-heads": llama(hidden=48, heads=3, kv_heads=1, head_dim=32),
    "llama-tied-bias": llama().with_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    **{
        f"{family}-rope-{name}": of_family(family).config_says(**{**NO_ROPE_KEYS, **keys})
        for family, spellings in ROPE.items()
        for name, keys in spellings.items()
    },
    "opt": opt(),
    "opt-350m": opt_350m(embedding=32),
    "opt-untied": opt().with_config(tie_word_embeddings=False).with_trained_decay(),
}


class OfficialAttention(nn.Module):
    """The published attention over a whole sequence, for any family's projections."""

    def __init__(
        self, tensors: dict[str, Tensor], heads: int, kv_heads: int, d: int, inv_freq: Tensor | None
    ) -> None:
        super().__init__()
        self.t, self.heads, self.kv_heads, self.d = tensors, heads, kv_heads, d
        self.inv_freq = inv_freq

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.t.get(f"{name}.bias")
        return nn.functional.linear(x, self.t[f"{name}.weight"], bias)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        if "query_key_value.weight" in self.t:
            packed = self.linear(x, "query_key_value").view(batch, length, self.heads, 3 * self.d)
            q, k, v = packed.transpose(1, 2).split(self.d, dim=-1)
            return q, k, v
        q = self.linear(x, "q_proj").view(batch, length, self.heads, self.d).transpose(1, 2)
        k, v = (
            self.linear(x, name).view(batch, length, self.kv_heads, self.d).transpose(1, 2)
            for name in ("k_proj", "v_proj")
        )
        repeat = self.heads // self.kv_heads
        return q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)

    def rope(self, x: Tensor) -> Tensor:
        if self.inv_freq is None:
            return x
        r = 2 * self.inv_freq.numel()
        angles = torch.arange(x.shape[2]).double()[:, None] * self.inv_freq.double()
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        turn, keep = x[..., :r], x[..., r:]
        halves = torch.cat([-turn[..., r // 2 :], turn[..., : r // 2]], -1)
        return torch.cat([turn * cos + halves * sin, keep], -1)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        x, length = hidden_states, hidden_states.shape[1]
        q, k, v = self.heads_of(x)
        p = self.t["proj_matrix"]
        q = torch.softmax(self.rope(q) @ p, -1) * self.t["D1"][:, :, :length]
        k = torch.softmax(self.rope(k) @ p, -1) * self.t["D2"][:, :, :length]
        o = (q @ k.transpose(2, 3)).tril() @ v
        o = o.transpose(1, 2).reshape(-1, self.heads * self.d)
        o = nn.functional.group_norm(o, self.d, self.t["group_norm.weight"], self.t["group_norm.bias"])
        gated = nn.functional.silu(x @ self.t["W_G"]) * o.view(*x.shape[:2], -1)
        output = next(name for name in ("dense", "o_proj", "out_proj") if f"{name}.weight" in self.t)
        return self.linear(gated, output), None


def transformers_logits(folder: Path, family: str, ids: Tensor) -> Tensor:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("auto_map", None)
    config = CONFIGS[family](**{k: v for k, v in raw.items() if k not in ("architectures", "torch_dtype")})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    tensors = {name: tensor.double() for name, tensor in load_tensors(folder).items()}
    missing, _ = model.load_state_dict(tensors, strict=False)
    # The head's name changed between versions of transformers.
    assert not [n for n in missing if n not in ("lm_head.weight", "embed_out.weight")], missing
    head = tensors.get("lm_head.weight", tensors.get("embed_out.weight"))
    embedding = model.get_input_embeddings().weight
    model.get_output_embeddings().weight = embedding if head is None else nn.Parameter(head)
    heads = raw["num_attention_heads"]
    d = raw.get("head_dim") or raw["hidden_size"] // heads
    inv_freq = None
    if family != "opt":
        rotary = model.get_submodule(LAYERS[family].replace("layers", "rotary_emb"))
        assert rotary.attention_scaling == 1
        inv_freq = rotary.inv_freq
    for index, layer in enumerate(model.get_submodule(LAYERS[family])):
        prefix = f"{LAYERS[family]}.{index}.{ATTENTION[family]}."
        mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        attention = OfficialAttention(mine, heads, raw.get("num_key_value_heads", heads), d, inv_freq)
        setattr(layer, ATTENTION[family], attention)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_reference_model_is_the_familys_own(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.save(tmp_path / "model")
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(7))
    expected = transformers_logits(folder, case.family, ids)
    # Tables kept as stored, so that the two sides round nothing differently.
    with open_checkpoint(folder, keep_tables=True) as checkpoint:
        model = ReferenceModel(checkpoint.spec, dtype=torch.float64)
        model.load_state_dict(checkpoint.load_state_dict(torch.float64))
    logits, _ = model(ids)
    # transformers' RMSNorm computes in float32 whatever the model's type.
    assert (logits - expected).abs().max() <= 1e-5 * expected.std()
