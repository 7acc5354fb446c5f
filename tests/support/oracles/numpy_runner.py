"""DiJiang in NumPy, straight from the recurrence: an oracle that shares no code with the exporter.

    S_n = exp(a_n)·S_{n-1} + b_n·φ(k_n) ⊗ v_n      o_n = r_n·φ(q_n)ᵀ S_n      φ(u) = softmax(u @ P)

token by token, in float64 by default. It is a `Runner`, so whatever works on runners works on it.
Parameters are a dict of arrays under canonical names (docs/architecture.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from support.oracles.array_rows import ArrayRows

from dijiang_engines.runners.checks import check_batch, check_call, check_layers
from dijiang_engines.spec import ModelSpec

Array = npt.NDArray[Any]

_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))).astype(x.dtype),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class NumpyRunner(ArrayRows):
    """One model. A state is a list of arrays [B, H, d, d], one per layer."""

    name = "numpy"

    def __init__(
        self,
        spec: ModelSpec,
        parameters: Mapping[str, Array],
        dtype: Any = np.float64,
        all_logits: bool = False,
    ) -> None:
        self.spec, self.dtype, self.all_logits = spec, dtype, all_logits
        self.weights = {name: np.asarray(value, dtype) for name, value in parameters.items()}
        self.calls: list[tuple[str, int, int]] = []
        """("prefill" | "step", B, L) of every call."""

    # -- Runner ----------------------------------------------------------------------------------------

    def new_state(self, batch: int) -> list[Array]:
        check_batch(self, batch)
        return [np.zeros((batch, *self.spec.state_shape), self.dtype) for _ in range(self.spec.num_layers)]

    def prefill(self, input_ids: Array, positions: Array, seq_lens: Array, state: list[Array]) -> Array:
        input_ids, positions, seq_lens = check_call(self, input_ids, positions, seq_lens, len(state[0]))
        self.calls.append(("prefill", *input_ids.shape))
        return self._run(input_ids, positions, seq_lens, state)

    def step(self, input_ids: Array, positions: Array, seq_lens: Array, state: list[Array]) -> Array:
        input_ids, positions, seq_lens = check_call(
            self, input_ids, positions, seq_lens, len(state[0]), step=True
        )
        self.calls.append(("step", *input_ids.shape))
        return self._run(input_ids, positions, seq_lens, state)

    def export_state(self, state: list[Array]) -> list[Array]:
        return [layer.astype(np.float32) for layer in state]

    def import_state(self, layers: list[Array]) -> list[Array]:
        return [layer.astype(self.dtype) for layer in check_layers(self.spec, layers)]

    # -- the model -------------------------------------------------------------------------------------

    def _run(self, input_ids: Array, positions: Array, seq_lens: Array, state: list[Array]) -> Array:
        batch, length = input_ids.shape
        logits = np.zeros((batch, length if self.all_logits else 1, self.spec.vocab_size), np.float32)
        for row in range(batch):
            for t in range(int(seq_lens[row])):
                hidden = self._embed(int(input_ids[row, t]), int(positions[row]) + t)
                for i in range(self.spec.num_layers):
                    hidden, state[i][row] = self._block(i, hidden, int(positions[row]) + t, state[i][row])
                logits[row, t if self.all_logits else 0] = self._head(hidden)
        return logits

    def _embed(self, token: int, position: int) -> Array:
        x = self.weights["embed_tokens.weight"][token]
        if "project_in.weight" in self.weights:
            x = self.weights["project_in.weight"] @ x
        if self.spec.position_embeddings:
            x = x + self.weights["embed_positions.weight"][position + self.spec.position_offset]
        return x

    def _head(self, x: Array) -> Array:
        if self.spec.final_norm:
            x = self._norm("final_norm", x)
        if "project_out.weight" in self.weights:
            x = self.weights["project_out.weight"] @ x
        return self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"]) @ x

    def _block(self, i: int, x: Array, position: int, state: Array) -> tuple[Array, Array]:
        at = f"layers.{i}"
        if self.spec.post_norm:
            y, state = self._attention(i, x, position, state)
            x = self._norm(f"{at}.attention_norm", x + y)
            return self._norm(f"{at}.mlp_norm", x + self._mlp(i, x)), state
        y, state = self._attention(i, self._norm(f"{at}.attention_norm", x), position, state)
        if self.spec.parallel_residual:
            return x + y + self._mlp(i, self._norm(f"{at}.mlp_norm", x)), state
        x = x + y
        return x + self._mlp(i, self._norm(f"{at}.mlp_norm", x)), state

    def _attention(self, i: int, x: Array, position: int, state: Array) -> tuple[Array, Array]:
        at, spec, weights = f"layers.{i}.attention", self.spec, self.weights
        heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
        packed = self._linear(f"{at}.qkv", x)
        q = packed[: heads * d].reshape(heads, d)
        k = packed[heads * d : (heads + kv_heads) * d].reshape(kv_heads, d)
        v = packed[(heads + kv_heads) * d :].reshape(kv_heads, d)
        phi_q = _softmax(self._rotate(q, position) @ weights[f"{at}.proj"])
        phi_k = _softmax(self._rotate(k, position) @ weights[f"{at}.proj"])
        log_decay, gain, read_scale = self._decay(at, position)
        new, out = np.empty_like(state), np.empty((heads, d), self.dtype)
        for h in range(heads):
            g = h // (heads // kv_heads)
            new[h] = np.exp(log_decay[h]) * state[h] + gain[h] * np.outer(phi_k[g], v[g])
            out[h] = read_scale[h] * (phi_q[h] @ new[h])
        gate = weights[f"{at}.gate.weight"] @ x
        return self._linear(f"{at}.dense", ACTIVATIONS["silu"](gate) * self._group_norm(at, out)), new

    def _decay(self, at: str, position: int) -> tuple[Array, Array, Array]:
        log_decay = self.weights[f"{at}.log_decay"]
        if self.spec.decay == "geometric":
            one = np.ones_like(log_decay)
            return log_decay, one, one
        row = min(position, log_decay.shape[0] - 1)
        return log_decay[row], self.weights[f"{at}.gain"][row], self.weights[f"{at}.read_scale"][row]

    def _group_norm(self, at: str, heads_out: Array) -> Array:
        """d groups of H neighbouring channels of the heads' concatenation, biased variance."""
        groups = heads_out.reshape(self.spec.head_dim, self.spec.num_heads).astype(np.float64)
        centred = groups - groups.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + self.spec.group_norm_epsilon)
        normed = (centred / deviation).reshape(-1).astype(self.dtype)
        return normed * self.weights[f"{at}.norm_weight"] + self.weights[f"{at}.norm_bias"]

    def _rotate(self, x: Array, position: int) -> Array:
        half = self.spec.rotary_dim // 2
        if half == 0:
            return x
        angle = np.float64(position) * inverse_frequencies(self.spec).astype(np.float64)
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        a, b, rest = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin, rest), axis=1)

    def _mlp(self, i: int, x: Array) -> Array:
        at, activate = f"layers.{i}.mlp", ACTIVATIONS[self.spec.activation]
        up = self._linear(f"{at}.up", x)
        inner = activate(self._linear(f"{at}.gate", x)) * up if self.spec.gated_mlp else activate(up)
        return self._linear(f"{at}.down", inner)

    def _linear(self, at: str, x: Array) -> Array:
        y = self.weights[f"{at}.weight"] @ x
        return y + self.weights[f"{at}.bias"] if f"{at}.bias" in self.weights else y

    def _norm(self, at: str, x: Array) -> Array:
        if self.spec.norm == "rms_norm":
            return x / np.sqrt((x**2).mean() + self.spec.norm_epsilon) * self.weights[f"{at}.weight"]
        centred = x - x.mean()
        normed = centred / np.sqrt((centred**2).mean() + self.spec.norm_epsilon)
        return normed * self.weights[f"{at}.weight"] + self.weights[f"{at}.bias"]


def inverse_frequencies(spec: ModelSpec) -> npt.NDArray[np.float32]:
    """float32 [r/2], radians per token."""
    exponents = np.arange(0, spec.rotary_dim, 2, dtype=np.float32) / np.float32(spec.rotary_dim)
    inv_freq = (1 / np.power(np.float32(spec.rope_theta), exponents)).astype(np.float32)
    scaling = spec.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / np.float32(scaling["factor"])
    assert scaling["rope_type"] == "llama3"
    # Llama 3.1: wavelengths up to context/high stay, those from context/low on are divided, a ramp between.
    context, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    ramp = np.clip((context * inv_freq / (2 * math.pi) - low) / (high - low), 0, 1)
    return (inv_freq * (ramp + (1 - ramp) / scaling["factor"])).astype(np.float32)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def random_parameters(
    spec: ModelSpec, seed: int = 0, scale: float = 1.0
) -> dict[str, npt.NDArray[np.float32]]:
    """Every canonical parameter of a model of this geometry, sized so that activations stay near one."""
    rng = np.random.default_rng(seed)
    h, size, d, wide = spec.hidden_size, spec.attention_size, spec.head_dim, spec.intermediate_size
    out: dict[str, Array] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"] = scale * rng.standard_normal((rows, columns)) / math.sqrt(columns)

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        matrix(name, rows, columns)
        if bias:
            out[f"{name}.bias"] = 0.1 * rng.standard_normal(rows)

    def norm(name: str) -> None:
        out[f"{name}.weight"] = 1 + 0.1 * rng.standard_normal(h)
        if spec.norm == "layer_norm":
            out[f"{name}.bias"] = 0.1 * rng.standard_normal(h)

    out["embed_tokens.weight"] = rng.standard_normal((spec.vocab_size, spec.embedding_size))
    if spec.position_embeddings:
        rows = spec.position_embeddings + spec.position_offset
        out["embed_positions.weight"] = 0.3 * rng.standard_normal((rows, h))
    if spec.embedding_size != h:
        matrix("project_in", h, spec.embedding_size)
        matrix("project_out", spec.embedding_size, h)
    for i in range(spec.num_layers):
        at = f"layers.{i}.attention"
        norm(f"layers.{i}.attention_norm")
        norm(f"layers.{i}.mlp_norm")
        linear(f"{at}.qkv", spec.qkv_size, h, spec.attention_bias)
        matrix(f"{at}.gate", size, h)
        linear(f"{at}.dense", h, size, spec.dense_bias)
        out[f"{at}.proj"] = rng.standard_normal((d, d))
        out[f"{at}.norm_weight"] = 1 + 0.1 * rng.standard_normal(size)
        out[f"{at}.norm_bias"] = 0.1 * rng.standard_normal(size)
        if spec.decay == "geometric":
            out[f"{at}.log_decay"] = np.log(
                1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), spec.num_heads))
            )
        else:
            shape = (spec.decay_rows, spec.num_heads)
            out[f"{at}.log_decay"] = -np.abs(0.1 * rng.standard_normal(shape))
            out[f"{at}.gain"] = rng.uniform(-1, 1, shape)
            out[f"{at}.read_scale"] = rng.standard_normal(shape)
        linear(f"layers.{i}.mlp.up", wide, h, spec.mlp_bias)
        if spec.gated_mlp:
            linear(f"layers.{i}.mlp.gate", wide, h, spec.mlp_bias)
        linear(f"layers.{i}.mlp.down", h, wide, spec.mlp_bias)
    if spec.final_norm:
        norm("final_norm")
    if not spec.tied_embeddings:
        matrix("lm_head", spec.vocab_size, spec.embedding_size)
    return {name: value.astype(np.float32) for name, value in out.items()}
