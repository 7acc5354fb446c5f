"""Losses over a vocabulary, a few thousand tokens at a time: all logits at once would not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

ROWS = 8192
"""Tokens whose logits are in memory at a time."""

Loss = Callable[..., Tensor]
"""(hidden [N, E], beside [N, ...], weight [V, E], others ...) -> the sum of N tokens' losses, nats."""


def divergence(hidden: Tensor, seen: Tensor, weight: Tensor, teacher_weight: Tensor) -> Tensor:
    """Σ KL(teacher || student): hidden [N, E] and seen [N, E'] before heads [V, E] and [V, E']."""
    ours = linear(hidden, weight).float().log_softmax(-1)
    theirs = linear(seen, teacher_weight).float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum()


def surprise(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Σ -ln p(target): hidden [N, E] before the head [V, E], targets int64 [N]."""
    return cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")


def mean_by_rows(loss: Loss, hidden: Tensor, beside: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    """The mean of a loss over all tokens, with gradients of `hidden` and `weight`.

    Args:
        loss: `divergence` or `surprise`, compiled or not.
        hidden: [B, L, E].
        beside: [B, L, ...], what each token is compared with.
        weight: of the head, [V, E].
        others: further arguments of the loss, without gradients.
    """
    return _ByRows.apply(loss, hidden, beside, weight, *others)


class _ByRows(torch.autograd.Function):
    """Gradients are made with the loss, while logits are there: to make them again later costs more."""

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, hidden: Tensor, beside: Tensor, weight: Tensor, *others: Tensor
    ) -> Tensor:
        rows, compared = hidden.detach().flatten(0, 1), beside.detach().flatten(0, 1)
        to_rows, to_weight = torch.empty_like(rows), torch.zeros_like(weight)
        total = torch.zeros((), device=hidden.device)
        leaf = weight.detach().requires_grad_(True)
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            with torch.enable_grad():
                taken = rows[part].requires_grad_(True)
                value = loss(taken, compared[part], leaf, *others)
            to_rows[part], one = torch.autograd.grad(value, (taken, leaf))
            to_weight += one
            total += value.detach()
        ctx.save_for_backward(to_rows.view_as(hidden), to_weight)
        ctx.count = len(rows)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        factor = towards / ctx.count
        return None, to_hidden * factor, None, to_weight * factor, *[None] * (len(ctx.needs_input_grad) - 4)
