"""DijiangAttention in PyTorch: one mathematics in three forms.

Every form computes, per sequence and head, for tokens t = 1..L,

    S_t = exp(a_t) · S_{t-1} + b_t · φ(k_t) ⊗ v_t            S: [d, d], [feature, value]
    o_t = r_t · φ(q_t)ᵀ S_t                                   φ(u) = softmax(u @ P)

with a = log_decay, b = gain, r = read_scale of the token's position (b = r = 1 for geometric decay).
This equals the official full-sequence forward (modeling_gpt_neox_dijiang.py@3459531:281-298), where
S_n = (D1[n]/D1[n-1])·S_{n-1} + D1[n]·D2[n]·φ(k_n)⊗v_n. Padding is a token with a = b = 0.

    recurrent   the definition, token by token: O(L) time, O(1) state
    parallel    the whole sequence as one masked matrix product: O(L²)
    chunked     parallel inside chunks, recurrent between them: O(L·C)

docs/mathematics.md derives one from another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dijiang_engines.op_contract import Attributes
from dijiang_export.reference.rope import rotate, rotation

Form = Literal["recurrent", "parallel", "chunked"]

DEFAULT_CHUNK = 64
"""Tokens per chunk of the chunked form."""

LEAST_EPSILON = 1e-37
"""Just above float32's smallest normal number: what GroupNorm's epsilon may shrink to, relative to the
largest magnitude of its group squared."""


@dataclass(frozen=True)
class Decay:
    """How a layer forgets. Float32 or float64.

    log_decay: [H], or [N, H] with gain and read_scale [N, H] (trained tables).
    Row n serves position n; the last row serves every later one.
    """

    log_decay: Tensor
    gain: Tensor | None = None
    read_scale: Tensor | None = None


@dataclass(frozen=True)
class TokenTerms:
    """Per-token factors [B, H, L] of the recurrence; padding has log_decay = gain = 0."""

    log_decay: Tensor
    gain: Tensor
    read_scale: Tensor


def token_terms(
    decay: Decay, positions: Tensor, seq_lens: Tensor, length: int, dtype: torch.dtype
) -> TokenTerms:
    """Look up the factors of `length` tokens that start at `positions` [B], valid up to `seq_lens` [B]."""
    offsets = torch.arange(length, device=positions.device)
    valid = (offsets < seq_lens.unsqueeze(-1)).to(dtype).unsqueeze(1)  # [B, 1, L]
    if decay.gain is None or decay.read_scale is None:
        log_decay = decay.log_decay.to(dtype).reshape(1, -1, 1)
        ones = torch.ones_like(log_decay)
        return TokenTerms(log_decay * valid, ones * valid, ones * valid)
    last = decay.log_decay.shape[0] - 1
    rows = (positions.unsqueeze(-1) + offsets).clamp(max=last).long()  # [B, L]

    def take(table: Tensor) -> Tensor:
        return table.to(dtype)[rows].transpose(1, 2) * valid

    return TokenTerms(take(decay.log_decay), take(decay.gain), take(decay.read_scale))


def feature_map(u: Tensor, proj: Tensor) -> Tensor:
    """φ(u) = softmax(u @ P) over the last dimension; no 1/sqrt(d), no normaliser (@3459531:281-282)."""
    return torch.softmax(u @ proj, dim=-1)


def recurrent(q: Tensor, k: Tensor, v: Tensor, terms: TokenTerms, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition. q, k: features [B, H, L, d]; v [B, H, L, d]; state [B, H, d, d]."""
    outputs = []
    for t in range(q.shape[2]):
        fade = terms.log_decay[:, :, t, None, None].exp()
        write = terms.gain[:, :, t, None, None] * k[:, :, t, :, None] * v[:, :, t, None, :]
        state = fade * state + write
        outputs.append(terms.read_scale[:, :, t, None] * (q[:, :, t, None, :] @ state).squeeze(2))
    return (torch.stack(outputs, dim=2) if outputs else torch.zeros_like(v)), state


def parallel(q: Tensor, k: Tensor, v: Tensor, terms: TokenTerms, state: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens at once: o = (φ(q)φ(k)ᵀ ∘ M) v + decayed past, M[t, s] = exp(Σ a over s+1..t), s <= t."""
    total = terms.log_decay.cumsum(-1)  # [B, H, L]
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    # Masked before exp: above the diagonal the sum is positive and may overflow.
    gap = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~keep, -torch.inf)
    written = k * terms.gain.unsqueeze(-1)
    o = (q @ written.mT * gap.exp()) @ v + total.exp().unsqueeze(-1) * (q @ state)
    rest = (total[..., -1:] - total).exp().unsqueeze(-1)
    present = total[..., -1:, None].exp() * state + (written * rest).mT @ v
    return o * terms.read_scale.unsqueeze(-1), present


def chunked(
    q: Tensor, k: Tensor, v: Tensor, terms: TokenTerms, state: Tensor, chunk: int = DEFAULT_CHUNK
) -> tuple[Tensor, Tensor]:
    """`parallel` inside chunks of `chunk` tokens, the state carried from one to the next."""
    outputs = []
    for start in range(0, q.shape[2], chunk):
        span = slice(start, start + chunk)
        part = TokenTerms(terms.log_decay[..., span], terms.gain[..., span], terms.read_scale[..., span])
        o, state = parallel(q[:, :, span], k[:, :, span], v[:, :, span], part, state)
        outputs.append(o)
    return torch.cat(outputs, dim=2), state


FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "recurrent": recurrent,
    "parallel": parallel,
    "chunked": chunked,
}


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """GroupNorm over the heads' concatenation x [B, L, H·d] with d groups of H neighbouring channels.

    Biased variance (torch.nn.GroupNorm; @3459531:111, 236). Each group is first divided by its
    largest magnitude if that exceeds one, and epsilon by its square: the same value, but a large
    read_scale cannot overflow the square.
    """
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1)
    grouped = grouped / scale
    centred = grouped - grouped.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    # A constant group (H = 1) at a huge scale: epsilon must not underflow to 0 · 1/0.
    shrunk = (epsilon / scale / scale).clamp(min=LEAST_EPSILON)
    normed = (centred * torch.rsqrt(variance + shrunk)).flatten(-2)
    return normed * weight + bias


def dijiang_attention(
    qkv: Tensor,
    gate: Tensor,
    past_state: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inv_freq: Tensor,
    *,
    decay: Decay,
    attributes: Attributes,
    form: Form = "chunked",
    official_angles: bool = False,
) -> tuple[Tensor, Tensor]:
    """The whole op: everything between the QKV and gate projections and the output projection.

    Shapes and types are the op contract's (docs/op-contract.md). Arithmetic is float64 if `qkv` is,
    float32 otherwise, whatever T is; only P is rounded to T first, as a kernel in T would hold it.

    Returns:
        output: T [B, L, H·d], normalised and gated, zero on padding.
        present_state: [B, H, d, d], float32 (float64 if `qkv` is).
    """
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    heads, kv_heads, d = attributes.num_heads, attributes.num_kv_heads, attributes.head_dim
    length = qkv.shape[1]
    q, k, v = torch.split(qkv.to(dtype), [heads * d, kv_heads * d, kv_heads * d], dim=-1)
    q = q.reshape(*q.shape[:2], heads, d).transpose(1, 2)
    k, v = (x.reshape(*x.shape[:2], kv_heads, d).transpose(1, 2) for x in (k, v))
    if attributes.rotary_dim:
        token_positions = positions.unsqueeze(-1) + torch.arange(length, device=qkv.device)
        cos, sin = rotation(token_positions, inv_freq, dtype, official_angles=official_angles)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    p = proj.to(qkv.dtype).to(dtype)
    shared = heads // kv_heads
    q, k = feature_map(q, p), feature_map(k, p).repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    terms = token_terms(decay, positions, seq_lens, length, dtype)
    o, present = FORMS[form](q, k, v, terms, past_state.to(dtype))
    merged = o.transpose(1, 2).flatten(-2)
    normed = group_norm(merged, d, norm_weight.to(dtype), norm_bias.to(dtype), attributes.epsilon)
    gated = normed * torch.nn.functional.silu(gate.to(dtype))
    valid = torch.arange(length, device=qkv.device) < seq_lens.unsqueeze(-1)
    return (gated * valid.unsqueeze(-1)).to(qkv.dtype), present
