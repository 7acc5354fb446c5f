"""The recurrence of DiJiang attention for training: all tokens of a window at once, with gradients.

    o_n = Σ_{m≤n} γ^(n-m) (φ(q_n)·φ(k_m)) v_m          for each head (docs/mathematics.md)

    chunked   batched matrix products in chunks, in plain PyTorch: any device, any type
    fla       flash-linear-attention's kernel (`fla.ops.simple_gla`, fla-core on PyPI), CUDA only: the same
              sum in bfloat16 products with float32 accumulators and decay

tests/samples/test_distill.py compares `chunked` with the project's reference in float64, gradients too;
`python -m samples.distill.check_kernel` does it for `fla` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64
"""Tokens that meet in one matrix product of `chunked`."""

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, log_decay) -> o: q, k [B, L, H, d] after φ; v, o [B, L, H, d]; log_decay [H] = ln γ <= 0."""


class _Fading(torch.autograd.Function):
    """q and k as they are; backward, what their gradients say about the decay.

    γ^(n-m) is γ^n on q_n and γ^-m on k_m, so that dL/d ln γ = Σ_n n (q_n·dL/dq_n - k_n·dL/dk_n): no gradient
    has to flow through powers of γ. Σ_n q_n·dL/dq_n = Σ_n k_n·dL/dk_n: positions are counted from the middle,
    where rounding matters less.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k)
        ctx.dtype = log_decay.dtype
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx: Any, to_q: Tensor, to_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k = ctx.saved_tensors
        at = torch.arange(q.shape[1], device=q.device, dtype=q.dtype) - (q.shape[1] - 1) / 2
        each = ((q * to_q).sum(-1) - (k * to_k).sum(-1)).sum(0)  # [L, H]
        return to_q, to_k, (at @ each).to(ctx.dtype)


def _with_learned_decay(recurrence: Recurrence) -> Recurrence:
    """A recurrence that takes decay for fixed, for one that is learned too."""

    def learned(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if log_decay.requires_grad:
            q, k = _Fading.apply(q, k, log_decay)
        return recurrence(q, k, v, log_decay.detach())

    return learned


def chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The sum inside chunks as a masked product, what came before a chunk as one state [d, d] a head.

    Arithmetic is in q's type, and so is o.
    """
    batch, length, heads, size = q.shape
    chunk = min(CHUNK, length)
    count = -(-length // chunk)
    log_decay, v = log_decay.to(q.dtype), v.to(q.dtype)

    def cut(x: Tensor) -> Tensor:
        """[B, L, H, d] -> [B, H, count, chunk, d]; tokens added behind the end reach nobody."""
        x = pad(x, (0, 0, 0, 0, 0, count * chunk - length))
        return x.view(batch, count, chunk, heads, size).permute(0, 3, 1, 2, 4)

    def powers(exponents: Tensor) -> Tensor:
        """γ^n [H, ...], zero for negative n; masked before exp, which would overflow there."""
        rate = log_decay.view(-1, *[1] * exponents.ndim)
        return (rate * exponents.clamp(min=0)).exp() * (exponents >= 0)

    q, k, v = cut(q), cut(k), cut(v)
    at = torch.arange(chunk, device=q.device)
    inside = powers(at[:, None] - at).unsqueeze(1)  # [H, 1, chunk, chunk]
    mixed = (q @ k.mT * inside) @ v
    if count > 1:
        # What each chunk adds to the state, as of the chunk's last token; a chunk starts from the sum of what
        # those before it added, faded.
        added = (k * powers(chunk - 1 - at).view(heads, 1, chunk, 1)).mT @ v
        chunks = torch.arange(count, device=q.device)
        between = powers((chunks[:, None] - chunks - 1) * chunk)  # [H, count, count]
        state = torch.einsum("hnm,bhmfv->bhnfv", between, added)
        mixed = mixed + (q * powers(at + 1).view(heads, 1, chunk, 1)) @ state
    return mixed.permute(0, 2, 3, 1, 4).reshape(batch, count * chunk, heads, size)[:, :length]


def fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The same by flash-linear-attention. Products are in bfloat16, whatever type comes; o is bfloat16."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x.to(torch.bfloat16).contiguous() for x in (q, k, v))
    return chunk_simple_gla(q, k, v, g_gamma=log_decay.float(), scale=1.0)[0]


RECURRENCES: dict[str, Recurrence] = {
    "chunked": _with_learned_decay(chunked),
    "fla": _with_learned_decay(fla),
}
