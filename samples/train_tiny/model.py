"""The model: transformers' GPT-NeoX, and the same with DiJiang attention in its layers.

Attention is computed in chunks: inside a chunk every token looks at every earlier one, as in the official
code, and what came before the chunk is summed up in one [d, d] state per head. That is the same sum in
another order, and half the training time of the official [L, L] products at 1024 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

CHUNK = 64
"""Tokens that meet in one matrix product."""

FLOAT32_ALWAYS = (".D1", ".D2")
"""D2 reaches 1e13 at position 1024 and overflows float16 from position 350: these keep float32."""


def neox_config(
    *, vocab: int, hidden: int, heads: int, layers: int, intermediate: int, context: int
) -> dict[str, Any]:
    """config.json as Pythia's checkpoints have it (the official DiJiang code reads these names)."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": context,
        "model_type": "gpt_neox",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rope_scaling": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": vocab,
    }


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """o_i = Σ_{j≤i} γ^(i-j) (q_i·k_j) v_j for each head.

    q, k, v [B, H, L, d], q and k after φ; powers [H, N], γ_h^n for n = 0..N-1, N > L or N > CHUNK.
    Returns [B, H, L, d]. Lengths that CHUNK does not divide are one chunk.
    """
    batch, heads, length, size = q.shape
    chunk = CHUNK if length % CHUNK == 0 else length
    count = length // chunk
    q, k, v = (t.reshape(batch, heads, count, chunk, size) for t in (q, k, v))
    at = torch.arange(chunk, device=q.device)
    distance = at[:, None] - at
    inside = powers[:, distance.clamp(min=0)] * (distance >= 0)  # [H, chunk, chunk]
    mixed = (q @ k.transpose(-1, -2) * inside[:, None]) @ v
    if count > 1:
        # What each chunk adds to the state, as it stands at the chunk's last token: [B, H, count, d, d].
        added = (k * powers[:, chunk - 1 - at][:, None, :, None]).transpose(-1, -2) @ v
        # Chunk n starts from Σ_{m<n} γ^(chunk·(n-1-m)) added_m.
        at = torch.arange(count, device=q.device)
        gap = at[:, None] - at - 1
        between = powers[:, (gap * chunk).clamp(min=0)] * (gap >= 0)  # [H, count, count]
        state = torch.einsum("hnm,bhmfv->bhnfv", between, added)
        reach = powers[:, 1 : chunk + 1][:, None, :, None]
        mixed = mixed + (q * reach) @ state
    return mixed.reshape(batch, heads, length, size)


class DijiangAttention(nn.Module):
    """y = dense( silu(x·W_G) * GroupNorm(concat_h o) ),  o_n = Σ_{m≤n} D1[n]·D2[m] (φ(q_n)·φ(k_m)) v_m.

    φ(u) = softmax(u·P), without 1/sqrt(d) and without a normaliser (YuchuanTian/DiJiang@3459531,
    modeling_gpt_neox_dijiang.py:260-420). Parameter names and shapes are the official ones; with
    H heads of d and h = H·d:

        query_key_value [3h, h] per head q|k|v    dense [h, h]    W_G [h, h], used as x @ W_G
        group_norm.{weight,bias} [h], d groups    proj_matrix P [d, d]    D1, D2 [1, H, context, 1]

    P is frozen, as it is officially. D1 = γ^n and D2 = γ^-n are frozen too, which is not (see README.md):
    D1[n]·D2[m] is then γ^(n-m), and D1 a table of γ's powers.
    """

    def __init__(self, config: GPTNeoXConfig) -> None:
        super().__init__()
        size, positions = config.hidden_size, config.max_position_embeddings
        self.heads = config.num_attention_heads
        self.head_size = size // self.heads
        self.query_key_value = nn.Linear(size, 3 * size)
        self.dense = nn.Linear(size, size)
        self.W_G = nn.Parameter(torch.zeros(size, size))
        self.group_norm = nn.GroupNorm(self.head_size, size)
        self.proj_matrix = nn.Parameter(torch.zeros(self.head_size, self.head_size), requires_grad=False)
        self.D1 = nn.Parameter(torch.ones(1, self.heads, positions, 1), requires_grad=False)
        self.D2 = nn.Parameter(torch.ones(1, self.heads, positions, 1), requires_grad=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [B, L, h] -> ([B, L, h], None). Causal; takes no padding mask and no cache."""
        assert position_embeddings is not None
        batch, length, size = hidden_states.shape
        qkv = self.query_key_value(hidden_states).view(batch, length, self.heads, 3 * self.head_size)
        q, k, v = qkv.transpose(1, 2).float().chunk(3, dim=-1)  # each [B, H, L, d]
        cos, sin = position_embeddings
        q, k = apply_rotary_pos_emb(q, k, cos.float(), sin.float())
        # GroupNorm below divides by the spread of H neighbouring channels, which would enlarge the
        # rounding of a bfloat16 sum: the mixing of tokens stays float32 under autocast.
        with torch.autocast(hidden_states.device.type, enabled=False):
            q = (q @ self.proj_matrix).softmax(dim=-1)
            k = (k @ self.proj_matrix).softmax(dim=-1)
            mixed = mix(q, k, v, self.D1[0, :, :, 0])
            mixed = mixed.transpose(1, 2).reshape(batch * length, size)
            mixed = self.group_norm(mixed).view(batch, length, size)
        gate = nn.functional.silu(hidden_states @ self.W_G)
        return self.dense(gate * mixed), None


def build(config: dict[str, Any], *, dijiang: bool) -> GPTNeoXForCausalLM:
    """A fresh model for a config.json: softmax attention, or every layer's attention replaced."""
    unused = ("auto_map", "torch_dtype", "rope_scaling", "dijiang")
    hf_config = GPTNeoXConfig(**{key: value for key, value in config.items() if key not in unused})
    model = GPTNeoXForCausalLM(hf_config)
    if dijiang:
        for layer in model.gpt_neox.layers:
            layer.attention = DijiangAttention(hf_config)
    return model


def load(folder: Path, *, dijiang: bool) -> GPTNeoXForCausalLM:
    """Read config.json and model.safetensors; every tensor must be there, under its official name."""
    config = json.loads((folder / "config.json").read_text())
    model = build(config, dijiang=dijiang)
    tensors = {
        name.replace("embed_out.", _head(model)): tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    model.load_state_dict(tensors, strict=True)
    return model


def save(
    model: GPTNeoXForCausalLM, folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write config.json and model.safetensors with the names that Pythia's checkpoints have."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        kept = torch.float32 if name.endswith(FLOAT32_ALWAYS) else dtype
        tensors[name.replace(_head(model), "embed_out.")] = tensor.detach().to("cpu", kept).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def is_dijiang_parameter(name: str) -> bool:
    """Whether a parameter is one that vanilla GPT-NeoX does not have."""
    own = (".W_G", ".group_norm.weight", ".group_norm.bias", ".proj_matrix", ".D1", ".D2")
    return name.endswith(own)


def flops_per_token(model: GPTNeoXForCausalLM, context: int) -> int:
    """Floating-point operations of training on one token, forward and backward.

    6 for each weight that multiplies the token (the embedding is a look-up, not one of them), and 12 for
    each pair of a channel and a token it meets in attention: `context` of them for softmax attention
    (full squares, as is usual to count); for DiJiang a chunk, the state, and P.
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    weights += sum(m.W_G.numel() for m in model.modules() if isinstance(m, DijiangAttention))
    config = model.config
    attention = model.gpt_neox.layers[0].attention
    met = CHUNK + 2 * attention.head_size if isinstance(attention, DijiangAttention) else context
    return 6 * weights + 12 * config.num_hidden_layers * config.hidden_size * met


def _head(model: GPTNeoXForCausalLM) -> str:
    """What this version of transformers calls the output layer: Pythia's files say `embed_out`."""
    return "lm_head." if hasattr(model, "lm_head") else "embed_out."
