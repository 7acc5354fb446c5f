"""ReferenceModel: a DiJiang language model of any supported family, written once over ModelSpec.

It is what the graphs are traced from, and the oracle that they are compared with. Parameter names are
canonical (docs/bundle-format.md): `dijiang_export.checkpoint.checkpoint` translates each family's names to
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dijiang_engines.op_contract import CONSTANTS, Attributes, attributes_of
from dijiang_engines.spec import ModelSpec
from dijiang_export.reference.attention import Decay, Form, dijiang_attention
from dijiang_export.reference.rope import inverse_frequencies

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types of exported and converted weights, by the names that bundles have for them."""

AttentionOp = Callable[..., tuple[Tensor, Tensor]]
"""Called with the op contract's tensors in order, a Decay and Attributes (by keyword)."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight, in float32 or better (Llama)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


def _norm(spec: ModelSpec) -> nn.Module:
    if spec.norm == "rms_norm":
        return RMSNorm(spec.hidden_size, spec.norm_epsilon)
    return nn.LayerNorm(spec.hidden_size, eps=spec.norm_epsilon)


class DijiangAttention(nn.Module):
    """Projections around the op: y = dense(op(qkv(x), gate(x)))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attributes = attributes_of(spec)
        width = spec.attention_size
        self.qkv = nn.Linear(spec.hidden_size, spec.qkv_size, bias=spec.attention_bias)
        self.gate = nn.Linear(spec.hidden_size, width, bias=False)
        self.dense = nn.Linear(width, spec.hidden_size, bias=spec.dense_bias)

        def constant(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape), requires_grad=False)

        # The op's constants stay float32 (or float64) whatever type the rest of the model has.
        self.proj = constant(spec.head_dim, spec.head_dim)
        self.norm_weight = constant(width)
        self.norm_bias = constant(width)
        self.gain: nn.Parameter | None = None
        self.read_scale: nn.Parameter | None = None
        if spec.decay == "geometric":
            self.log_decay = constant(spec.num_heads)
        else:
            self.log_decay = constant(spec.decay_rows, spec.num_heads)
            self.gain = constant(spec.decay_rows, spec.num_heads)
            self.read_scale = constant(spec.decay_rows, spec.num_heads)

    def forward(
        self,
        x: Tensor,
        past_state: Tensor,
        positions: Tensor,
        seq_lens: Tensor,
        inv_freq: Tensor,
        op: AttentionOp,
    ) -> tuple[Tensor, Tensor]:
        """x [B, L, h] -> (y [B, L, h], present_state [B, H, d, d])."""
        output, present = op(
            self.qkv(x), self.gate(x), past_state, positions, seq_lens,
            self.proj, self.norm_weight, self.norm_bias, inv_freq,
            decay=Decay(self.log_decay, self.gain, self.read_scale), attributes=self.attributes,
        )  # fmt: skip
        return self.dense(output), present


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.gate: nn.Linear | None = None
        if spec.gated_mlp:
            self.gate = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention and MLP with the family's order of norms and residual additions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.parallel_residual, self.post_norm = spec.parallel_residual, spec.post_norm
        self.attention_norm = _norm(spec)
        self.attention = DijiangAttention(spec)
        self.mlp_norm = _norm(spec)
        self.mlp = MLP(spec)

    def forward(
        self,
        x: Tensor,
        past_state: Tensor,
        positions: Tensor,
        seq_lens: Tensor,
        inv_freq: Tensor,
        op: AttentionOp,
    ) -> tuple[Tensor, Tensor]:
        """x [B, L, h] -> (x' [B, L, h], present_state)."""
        inner = x if self.post_norm else self.attention_norm(x)
        y, present = self.attention(inner, past_state, positions, seq_lens, inv_freq, op)
        if self.parallel_residual:
            return x + y + self.mlp(self.mlp_norm(x)), present
        x = x + y
        if self.post_norm:
            x = self.attention_norm(x)
            return self.mlp_norm(x + self.mlp(x)), present
        return x + self.mlp(self.mlp_norm(x)), present


class ReferenceModel(nn.Module):
    """Token ids to logits, with an explicit recurrent state.

    Example:
        model = ReferenceModel(checkpoint.spec, dtype=torch.float64)
        model.load_state_dict(checkpoint.load_state_dict(torch.float64))
        logits, states = model(input_ids, positions, seq_lens, model.new_states(batch))
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype = torch.float32, device: str | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        with torch.device(device) if device else torch.device(torch.get_default_device()):
            self.embed_tokens = nn.Embedding(spec.vocab_size, spec.embedding_size)
            self.embed_positions: nn.Embedding | None = None
            if spec.position_embeddings:
                rows = spec.position_embeddings + spec.position_offset
                self.embed_positions = nn.Embedding(rows, spec.hidden_size)
            self.project_in: nn.Linear | None = None
            self.project_out: nn.Linear | None = None
            if spec.embedding_size != spec.hidden_size:
                self.project_in = nn.Linear(spec.embedding_size, spec.hidden_size, bias=False)
                self.project_out = nn.Linear(spec.hidden_size, spec.embedding_size, bias=False)
            self.layers = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
            self.final_norm = _norm(spec) if spec.final_norm else None
            self.lm_head = nn.Linear(spec.embedding_size, spec.vocab_size, bias=False)
        if spec.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
            self.register_load_state_dict_pre_hook(_tie_head)  # type: ignore[no-untyped-call]
        inv_freq = inverse_frequencies(spec)
        self.register_buffer("inv_freq", inv_freq.to(device) if device else inv_freq, persistent=False)
        self.requires_grad_(False)
        cast_weights(self, dtype)

    def new_states(self, batch: int) -> list[Tensor]:
        """Zeroed states for `batch` sequences: [B, H, d, d] per layer, float32 (float64 if the model is)."""
        weight = self.embed_tokens.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (batch, *self.spec.state_shape)
        return [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in self.layers]

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [B, L] that start at `positions` [B] -> hidden [B, L, h]."""
        hidden: Tensor = self.embed_tokens(input_ids)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        if self.embed_positions is not None:
            offsets = torch.arange(input_ids.shape[1], device=input_ids.device)
            rows = positions.unsqueeze(-1) + offsets + self.spec.position_offset
            # Padding may lie past the table; the runner has checked the valid tokens.
            hidden = hidden + self.embed_positions(rows.clamp(max=self.embed_positions.num_embeddings - 1))
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] -> logits [..., V], float32 (float64 if the model is)."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        logits: Tensor = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        seq_lens: Tensor | None = None,
        states: list[Tensor] | None = None,
        *,
        form: Form = "chunked",
        all_logits: bool = True,
        official_angles: bool = False,
        op: AttentionOp | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run up to L tokens of each row.

        Args:
            input_ids: int64 [B, L], right padded.
            positions: int64 [B], tokens already in the state (default 0).
            seq_lens: int64 [B], valid tokens (default L).
            states: one [B, H, d, d] per layer (default zeros).
            form: which form of the mathematics.
            all_logits: logits of every token rather than of each row's last valid one.
            official_angles: RoPE angles rounded as the official code rounds them (oracles only).
            op: what stands for the attention op; tracing passes the custom op.

        Returns:
            logits [B, L, V] or [B, 1, V], and the new states.
        """
        batch, length = input_ids.shape
        if positions is None:
            positions = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
        if seq_lens is None:
            seq_lens = torch.full((batch,), length, dtype=torch.int64, device=input_ids.device)
        if states is None:
            states = self.new_states(batch)
        if op is None:

            def op(*tensors: Any, decay: Decay, attributes: Attributes) -> tuple[Tensor, Tensor]:
                return dijiang_attention(
                    *tensors, decay=decay, attributes=attributes, form=form, official_angles=official_angles
                )

        hidden = self.embed(input_ids, positions)
        # The op takes int32; one cast serves all layers.
        positions32, seq_lens32 = positions.to(torch.int32), seq_lens.to(torch.int32)
        inv_freq = self.get_buffer("inv_freq")
        presents = []
        for layer, past in zip(self.layers, states, strict=True):
            hidden, present = layer(hidden, past, positions32, seq_lens32, inv_freq, op)
            presents.append(present)
        if not all_logits:
            hidden = last_valid(hidden, seq_lens)
        return self.head(hidden), presents


def _tie_head(_: nn.Module, state: dict[str, Any], *__: object) -> None:
    """A tied checkpoint has one tensor for both ends."""
    if "embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["embed_tokens.weight"])


def last_valid(hidden: Tensor, seq_lens: Tensor) -> Tensor:
    """hidden [B, L, h] -> [B, 1, h]: each row's token max(seq_lens - 1, 0)."""
    index = (seq_lens - 1).clamp(min=0).reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
    return hidden.gather(1, index)


def is_op_constant(name: str) -> bool:
    """Whether a canonical parameter is one of the op's constants, never stored in half precision."""
    return name.rsplit(".", 1)[-1] in CONSTANTS


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters to `dtype`, the op's constants to float32 (float64 if `dtype` is)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(wide if is_op_constant(name) else dtype)
