"""The arithmetic of good kernels in plain PyTorch: float32 inside, operands of matrix products rounded to T.

A yardstick for the tolerances (they must let it pass and mutants fail) and a stand-in for the kernels, so
that the tests of the kernels are tested without a GPU.
"""

from __future__ import annotations

import torch
from support.makers.kernel_cases import Call
from support.oracles.kernel_bounds import CHUNK, widened
from torch import Tensor

from dijiang_export.reference import attention as att
from dijiang_export.reference.rope import rotate, rotation

FEATURE_UNIT = 256.0
"""What float16 kernels scale features by, so that small ones are no subnormals."""


def emulate(call: Call) -> tuple[Tensor, Tensor]:
    """Output in T and float32 state of one call; fades and gains go into keys."""
    dtype, g, wide = call.dtype, call.geometry, widened(call)

    def rounded(x: Tensor) -> Tensor:
        """To T and back, scaled so that nothing overflows, as a kernel must do with a state."""
        scale = x.abs().amax((-1, -2), keepdim=True).clamp(min=1)
        return (x / scale).to(dtype).float() * scale

    q, k, v = _heads(wide)
    p, shared = wide.proj.float(), g.num_heads // g.num_kv_heads
    q, k = (rounded(att.feature_map(rounded(y), p)) for y in (q, k))
    k, v = (y.repeat_interleave(shared, dim=1) for y in (k, v))
    terms = att.token_terms(wide.decay, wide.positions, wide.seq_lens, call.length, torch.float32)
    state, outputs = call.past_state, []
    for start in range(0, call.length, CHUNK):
        span = slice(start, start + CHUNK)
        o, state = _chunk(q[:, :, span], k[:, :, span], v[:, :, span], _part(terms, span), state, rounded)
        outputs.append(o)
    state = torch.where((wide.seq_lens == 0)[:, None, None, None], call.past_state, state)
    merged = torch.cat(outputs, dim=2).transpose(1, 2).flatten(-2)
    normed = att.group_norm(merged, g.head_dim, call.norm_weight, call.norm_bias, g.epsilon)
    gated = normed * torch.nn.functional.silu(wide.gate.float())
    return torch.where(wide.valid().unsqueeze(-1), gated, 0.0).to(dtype), state


def emulate_state(call: Call) -> Tensor:
    """The float32 state of one float16 call, made in another good way: fades and gains go into values.

    State and values have one scale: a power of two that keeps below float16's range what the state could
    become, were features one. It shrinks where it must, and never grows.
    """
    g, wide = call.geometry, widened(call)

    def half(x: Tensor) -> Tensor:
        return x.to(torch.float16).float()

    def largest(x: Tensor) -> Tensor:
        return x.abs().amax((-1, -2), keepdim=True)

    _, k, v = _heads(wide)
    k = half(FEATURE_UNIT * att.feature_map(half(k), wide.proj.float()))
    k, v = (y.repeat_interleave(g.num_heads // g.num_kv_heads, dim=1) for y in (k, v))
    terms = att.token_terms(wide.decay, wide.positions, wide.seq_lens, call.length, torch.float32)
    state = FEATURE_UNIT * call.past_state
    most, scale = largest(state), torch.ones(*state.shape[:2], 1, 1)
    for start in range(0, call.length, CHUNK):
        span = slice(start, start + CHUNK)
        shrink = torch.where(most > 65000, (11 - most.log2().floor()).exp2(), 1.0)
        state, most, scale = state * shrink, most * shrink, scale * shrink
        total = terms.log_decay[..., span].cumsum(-1).unsqueeze(-1)
        weight = half((total[..., -1:, :] - total).exp() * terms.gain[..., span, None])
        values, keep = half(half(weight * v[:, :, span]) * scale), total[..., -1:, :].exp()
        state = keep * state + k[:, :, span].mT @ values
        most = keep * most + CHUNK * FEATURE_UNIT * largest(values)
    state = state / (FEATURE_UNIT * scale)
    return torch.where((wide.seq_lens == 0)[:, None, None, None], call.past_state, state)


def _heads(wide: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v after RoPE, float32 [B, heads, L, d]."""
    g = wide.geometry
    split = [n * g.head_dim for n in (g.num_heads, g.num_kv_heads, g.num_kv_heads)]
    parts = torch.split(wide.qkv.float(), split, dim=-1)
    q, k, v = (y.reshape(*y.shape[:2], -1, g.head_dim).transpose(1, 2) for y in parts)
    if g.rotary_dim:
        at = wide.positions.unsqueeze(-1) + torch.arange(wide.length, device=q.device)
        cos, sin = (t.unsqueeze(1) for t in rotation(at, wide.inv_freq, torch.float32))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def _part(terms: att.TokenTerms, span: slice) -> att.TokenTerms:
    return att.TokenTerms(terms.log_decay[..., span], terms.gain[..., span], terms.read_scale[..., span])


def _chunk(q, k, v, terms, state, rounded):  # type: ignore[no-untyped-def]
    """attention.parallel with rounded operands."""
    total = terms.log_decay.cumsum(-1)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    gap = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~keep, -torch.inf)
    scores = rounded(q @ k.mT * gap.exp() * terms.gain.unsqueeze(-2))
    o = scores @ v + total.exp().unsqueeze(-1) * (q @ rounded(state))
    rest = (total[..., -1:] - total).exp() * terms.gain
    present = total[..., -1:, None].exp() * state + rounded(k * rest.unsqueeze(-1)).mT @ v
    return o * terms.read_scale.unsqueeze(-1), present
