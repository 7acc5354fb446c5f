"""Random weights under their official names, in the shapes that a config.json asks for.

They are scaled so that activations stay near one and every parameter matters for the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from scipy.fft import dct
from support.makers.decay_tables import official_tables, trained_tables

DecayTables = Literal["geometric", "trained"]


def official_weights(
    config: dict[str, Any], decay: DecayTables | None, *, leftovers: bool = False
) -> dict[str, torch.Tensor]:
    """float32 (buffers of old files apart), the same for the same arguments.

    `decay=None` leaves DiJiang's parameters out. `leftovers` adds what old vanilla files carry besides.
    """
    weights = _Weights(config, decay)
    family: Callable[[_Weights, bool], None] = {"gpt_neox": _neox, "llama": _llama, "opt": _opt}[
        config["model_type"]
    ]
    family(weights, leftovers)
    return weights.tensors


class _Weights:
    """Tensors that are drawn one after another."""

    def __init__(self, config: dict[str, Any], decay: DecayTables | None) -> None:
        self.config = config
        self.tensors: dict[str, torch.Tensor] = {}
        self.vocab, self.hidden = config["vocab_size"], config["hidden_size"]
        self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        self.head_dim = config.get("head_dim") or self.hidden // self.heads
        self.positions = config["max_position_embeddings"]
        self._decay = decay
        self._rng = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._rng)

    def matrix(self, name: str, *shape: int) -> None:
        self.tensors[name] = self.normal(*shape) / math.sqrt(shape[-1])

    def linear(self, name: str, rows: int, columns: int, bias: bool) -> None:
        self.matrix(f"{name}.weight", rows, columns)
        if bias:
            self.tensors[f"{name}.bias"] = 0.1 * self.normal(rows)

    def norm(self, name: str, size: int, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.1 * self.normal(size)
        if bias:
            self.tensors[f"{name}.bias"] = 0.1 * self.normal(size)

    def dijiang(self, at: str) -> None:
        """DiJiang's parameters of one layer's attention."""
        if self._decay is None:
            return
        d, inner = self.head_dim, self.heads * self.head_dim
        basis = torch.from_numpy(dct(np.eye(d), axis=0, norm="ortho")).float()
        self.tensors[f"{at}.proj_matrix"] = basis * self.normal(d)
        self.tensors[f"{at}.W_G"] = self.normal(self.hidden, inner) / math.sqrt(self.hidden)
        self.norm(f"{at}.group_norm", inner)
        if self._decay == "trained":
            tables = trained_tables(self.heads, self.positions, self._rng)
        else:
            tables = official_tables(self.heads, self.positions)
        self.tensors[f"{at}.D1"], self.tensors[f"{at}.D2"] = tables


def _neox(w: _Weights, leftovers: bool) -> None:
    config, hidden, inner = w.config, w.hidden, w.heads * w.head_dim
    bias, intermediate = config.get("attention_bias", True), config["intermediate_size"]
    w.tensors["gpt_neox.embed_in.weight"] = w.normal(w.vocab, hidden)
    for i in range(w.layers):
        at = f"gpt_neox.layers.{i}"
        w.norm(f"{at}.input_layernorm", hidden)
        w.norm(f"{at}.post_attention_layernorm", hidden)
        w.linear(f"{at}.attention.query_key_value", 3 * inner, hidden, bias)
        w.linear(f"{at}.attention.dense", hidden, inner, bias)
        w.dijiang(f"{at}.attention")
        w.linear(f"{at}.mlp.dense_h_to_4h", intermediate, hidden, True)
        w.linear(f"{at}.mlp.dense_4h_to_h", hidden, intermediate, True)
        if leftovers:
            mask = torch.tril(torch.ones(w.positions, w.positions, dtype=torch.bool))
            w.tensors[f"{at}.attention.bias"] = mask[None, None]
            w.tensors[f"{at}.attention.masked_bias"] = torch.tensor(-1e9)
            w.tensors[f"{at}.attention.rotary_emb.inv_freq"] = _inv_freq(w.head_dim // 4)
    w.norm("gpt_neox.final_layer_norm", hidden)
    if not config["tie_word_embeddings"]:
        w.matrix("embed_out.weight", w.vocab, hidden)


def _llama(w: _Weights, leftovers: bool) -> None:
    config, hidden, d = w.config, w.hidden, w.head_dim
    inner, kv, intermediate = w.heads * d, config["num_key_value_heads"] * d, config["intermediate_size"]
    bias, mlp_bias = config["attention_bias"], config["mlp_bias"]
    w.tensors["model.embed_tokens.weight"] = w.normal(w.vocab, hidden)
    for i in range(w.layers):
        at = f"model.layers.{i}"
        w.norm(f"{at}.input_layernorm", hidden, bias=False)
        w.norm(f"{at}.post_attention_layernorm", hidden, bias=False)
        w.linear(f"{at}.self_attn.q_proj", inner, hidden, bias)
        w.linear(f"{at}.self_attn.k_proj", kv, hidden, bias)
        w.linear(f"{at}.self_attn.v_proj", kv, hidden, bias)
        w.linear(f"{at}.self_attn.o_proj", hidden, inner, bias)
        w.dijiang(f"{at}.self_attn")
        w.linear(f"{at}.mlp.gate_proj", intermediate, hidden, mlp_bias)
        w.linear(f"{at}.mlp.up_proj", intermediate, hidden, mlp_bias)
        w.linear(f"{at}.mlp.down_proj", hidden, intermediate, mlp_bias)
        if leftovers:
            w.tensors[f"{at}.self_attn.rotary_emb.inv_freq"] = _inv_freq(d)
    w.norm("model.norm", hidden, bias=False)
    if not config["tie_word_embeddings"]:
        w.matrix("lm_head.weight", w.vocab, hidden)


def _opt(w: _Weights, leftovers: bool) -> None:
    config, hidden, intermediate = w.config, w.hidden, w.config["ffn_dim"]
    bias, width = config["enable_bias"], config["word_embed_proj_dim"]
    w.tensors["model.decoder.embed_tokens.weight"] = w.normal(w.vocab, width)
    w.tensors["model.decoder.embed_positions.weight"] = 0.3 * w.normal(w.positions + 2, hidden)
    if width != hidden:
        w.matrix("model.decoder.project_in.weight", hidden, width)
        w.matrix("model.decoder.project_out.weight", width, hidden)
    for i in range(w.layers):
        at = f"model.decoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            w.linear(f"{at}.self_attn.{part}", hidden, hidden, bias)
        w.dijiang(f"{at}.self_attn")
        w.norm(f"{at}.self_attn_layer_norm", hidden)
        w.linear(f"{at}.fc1", intermediate, hidden, bias)
        w.linear(f"{at}.fc2", hidden, intermediate, bias)
        w.norm(f"{at}.final_layer_norm", hidden)
    if config["do_layer_norm_before"]:
        w.norm("model.decoder.final_layer_norm", hidden)
    if not config["tie_word_embeddings"]:
        w.matrix("lm_head.weight", w.vocab, width)
    elif leftovers:
        w.tensors["lm_head.weight"] = w.tensors["model.decoder.embed_tokens.weight"].clone()


def _inv_freq(turned: int) -> torch.Tensor:
    """As old versions of transformers leave it among the weights, for the base 10000."""
    return 1.0 / 10000.0 ** (torch.arange(0, turned, 2).float() / turned)
