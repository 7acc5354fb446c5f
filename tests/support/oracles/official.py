"""An independent oracle: the official full-sequence formula, straight from checkpoint names, in float64.

No recurrence, no packing, no state: scores = (D1 φ(q)) (D2 φ(k))ᵀ under a causal mask, as in
modeling_gpt_neox_dijiang.py of YuchuanTian/DiJiang@3459531. LLaMA and OPT follow transformers' modelling
of those families with the same attention in place of softmax attention. Nothing of the package under test
is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


def official_forward(
    tensors: Tensors,
    config: Mapping[str, Any],
    input_ids: Any,
    *,
    dtype: torch.dtype = torch.float64,
    float32_rope: bool = True,
    tables: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Logits [B, T, V] in `dtype` for `input_ids` int64 [B, T].

    Args:
        tensors: the checkpoint's tensors under their official names, any dtype.
        config: its config.json (model_type gpt_neox, llama or opt).
        input_ids: anything that torch.as_tensor takes.
        dtype: of the whole computation, except RoPE angles.
        float32_rope: compute angles, cos and sin in float32 as the official code does; else in `dtype`
            from the float32 inverse frequencies.
        tables: D1 and D2 [H, N] per layer to use instead of the stored ones.
    """
    tensors = {name: torch.as_tensor(value) for name, value in tensors.items()}
    weights = {name: v.to(dtype) if v.is_floating_point() else v for name, v in tensors.items()}
    ids = torch.as_tensor(input_ids)
    family = {"gpt_neox": _gpt_neox, "llama": _llama, "opt": _opt}[config["model_type"]]
    with torch.no_grad():
        return family(weights, config, ids, float32_rope, tables or {})


def attention(
    w: Tensors,
    at: str,
    x: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """silu(x W_G) * GroupNorm(scores v), before the output projection: [B, T, H·d].

    q, k, v are [B, H, T, d] after RoPE; `at` is the prefix of the layer's attention parameters.
    """
    batch, heads, length, d = q.shape
    phi_q = torch.softmax(q @ w[f"{at}.proj_matrix"], dim=-1)
    phi_k = torch.softmax(k @ w[f"{at}.proj_matrix"], dim=-1)
    if tables is None:
        d1, d2 = w[f"{at}.D1"][0, :, :length, :], w[f"{at}.D2"][0, :, :length, :]
    else:
        d1, d2 = (t[:, :length, None].to(x.dtype) for t in tables)
    scores = (phi_q * d1) @ (phi_k * d2).transpose(-1, -2)
    scores = scores * torch.ones(length, length, dtype=x.dtype).tril()
    merged = (scores @ v).transpose(1, 2).reshape(batch * length, heads * d)
    merged = F.group_norm(merged, d, w[f"{at}.group_norm.weight"], w[f"{at}.group_norm.bias"], eps=1e-5)
    return F.silu(x @ w[f"{at}.W_G"]) * merged.view(batch, length, heads * d)


def inverse_frequencies(rotary: int, base: float, scaling: Mapping[str, Any] | None) -> torch.Tensor:
    """float32 [rotary / 2], linear and llama3 scaling folded in (transformers' modeling_rope_utils)."""
    inv = 1.0 / (base ** (torch.arange(0, rotary, 2).float() / rotary))
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return inv
    factor = scaling["factor"]
    if kind == "linear":
        return inv / factor
    assert kind == "llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv
    blend = (context / wavelength - low) / (high - low)
    medium = (1 - blend) * inv / factor + blend * inv
    out = torch.where(wavelength > context / low, inv / factor, medium)
    return torch.where(wavelength < context / high, inv, out)


def rope(x: torch.Tensor, inv: torch.Tensor, float32: bool) -> torch.Tensor:
    """Rotate the first 2·len(inv) dimensions of x [B, H, T, d]; pairs are (i, i + r/2)."""
    half = len(inv)
    kind = torch.float32 if float32 else x.dtype
    angles = torch.arange(x.shape[2], dtype=kind)[:, None] * inv.to(kind)[None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _layer_norm(w: Tensors, at: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{at}.weight"], w[f"{at}.bias"], epsilon)


def _rms_norm(w: Tensors, at: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * w[f"{at}.weight"]


def _linear(w: Tensors, at: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{at}.weight"], w.get(f"{at}.bias"))


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _act(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "gelu":
        return F.gelu(x)
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return F.gelu(x, approximate="tanh")
    return {"relu": F.relu, "silu": F.silu, "swish": F.silu}[name](x)


def _gpt_neox(w: Tensors, c: Mapping[str, Any], ids: torch.Tensor, f32: bool, tables: Any) -> torch.Tensor:
    heads, epsilon = c["num_attention_heads"], c["layer_norm_eps"]
    d = c["hidden_size"] // heads
    inv = inverse_frequencies(int(d * c["rotary_pct"]), c["rotary_emb_base"], c.get("rope_scaling"))
    x = F.embedding(ids, w["gpt_neox.embed_in.weight"])
    for i in range(c["num_hidden_layers"]):
        at = f"gpt_neox.layers.{i}"
        y = _layer_norm(w, f"{at}.input_layernorm", x, epsilon)
        q, k, v = _heads(_linear(w, f"{at}.attention.query_key_value", y), heads).split(d, dim=-1)
        q, k = rope(q, inv, f32), rope(k, inv, f32)
        mixed = attention(w, f"{at}.attention", y, q, k, v, tables.get(i))
        attended = _linear(w, f"{at}.attention.dense", mixed)
        middle = x if c["use_parallel_residual"] else x + attended
        up = _linear(
            w, f"{at}.mlp.dense_h_to_4h", _layer_norm(w, f"{at}.post_attention_layernorm", middle, epsilon)
        )
        x = x + attended + _linear(w, f"{at}.mlp.dense_4h_to_h", _act(c["hidden_act"], up))
    x = _layer_norm(w, "gpt_neox.final_layer_norm", x, epsilon)
    return x @ w.get("embed_out.weight", w["gpt_neox.embed_in.weight"]).T


def _llama(w: Tensors, c: Mapping[str, Any], ids: torch.Tensor, f32: bool, tables: Any) -> torch.Tensor:
    heads, kv, epsilon = c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
    d = c.get("head_dim") or c["hidden_size"] // heads
    rotary = int(d * c.get("partial_rotary_factor", 1.0))
    inv = inverse_frequencies(rotary, c["rope_theta"], c.get("rope_scaling"))
    x = F.embedding(ids, w["model.embed_tokens.weight"])
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = _rms_norm(w, f"{at}.input_layernorm", x, epsilon)
        q = rope(_heads(_linear(w, f"{at}.self_attn.q_proj", y), heads), inv, f32)
        k = rope(_heads(_linear(w, f"{at}.self_attn.k_proj", y), kv), inv, f32)
        v = _heads(_linear(w, f"{at}.self_attn.v_proj", y), kv)
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        mixed = attention(w, f"{at}.self_attn", y, q, k, v, tables.get(i))
        x = x + _linear(w, f"{at}.self_attn.o_proj", mixed)
        y = _rms_norm(w, f"{at}.post_attention_layernorm", x, epsilon)
        gated = _act(c["hidden_act"], _linear(w, f"{at}.mlp.gate_proj", y))
        x = x + _linear(w, f"{at}.mlp.down_proj", gated * _linear(w, f"{at}.mlp.up_proj", y))
    x = _rms_norm(w, "model.norm", x, epsilon)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _opt(w: Tensors, c: Mapping[str, Any], ids: torch.Tensor, f32: bool, tables: Any) -> torch.Tensor:
    heads, before, top = c["num_attention_heads"], c["do_layer_norm_before"], "model.decoder"
    x = F.embedding(ids, w[f"{top}.embed_tokens.weight"])
    if f"{top}.project_in.weight" in w:
        x = _linear(w, f"{top}.project_in", x)
    x = x + w[f"{top}.embed_positions.weight"][2 : 2 + ids.shape[1]]
    for i in range(c["num_hidden_layers"]):
        at = f"{top}.layers.{i}"
        y = _layer_norm(w, f"{at}.self_attn_layer_norm", x, 1e-5) if before else x
        q, k, v = (_heads(_linear(w, f"{at}.self_attn.{part}_proj", y), heads) for part in "qkv")
        mixed = attention(w, f"{at}.self_attn", y, q, k, v, tables.get(i))
        x = x + _linear(w, f"{at}.self_attn.out_proj", mixed)
        if not before:
            x = _layer_norm(w, f"{at}.self_attn_layer_norm", x, 1e-5)
        y = _layer_norm(w, f"{at}.final_layer_norm", x, 1e-5) if before else x
        x = x + _linear(w, f"{at}.fc2", _act(c["activation_function"], _linear(w, f"{at}.fc1", y)))
        if not before:
            x = _layer_norm(w, f"{at}.final_layer_norm", x, 1e-5)
    if before and not c.get("_remove_final_layer_norm"):
        x = _layer_norm(w, f"{top}.final_layer_norm", x, 1e-5)
    if f"{top}.project_out.weight" in w:
        x = _linear(w, f"{top}.project_out", x)
    return x @ w.get("lm_head.weight", w[f"{top}.embed_tokens.weight"]).T
