"""Held-out numbers: perplexity beside the teacher's, KL(teacher || student), how often both choose alike.

In float32 without TF32, summed in float64. Each window stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""ids int64 [B, L] -> logits float32 [B, L, V]."""


@dataclass(frozen=True)
class Numbers:
    """Of one student on one kind of text."""

    tokens: int
    """Predicted: every token of a window but its first."""
    perplexity: float
    teacher_perplexity: float
    kl: float
    """Nats per token."""
    top1: float
    """Share of tokens at which student and teacher hold the same token most likely."""

    @property
    def ratio(self) -> float:
        """Of the perplexities."""
        return self.perplexity / self.teacher_perplexity

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ratio": self.ratio}


@torch.no_grad()
def measure(student: Logits, teacher: Logits, windows: Tensor, rows: int) -> Numbers:
    """Compare two models on windows int64 [N, L], `rows` windows at a time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    sums = torch.zeros(4, dtype=torch.float64, device=windows.device)
    for part in windows.split(rows):
        targets = part[:, 1:].unsqueeze(-1)
        ours = student(part)[:, :-1].log_softmax(-1)
        theirs = teacher(part)[:, :-1].log_softmax(-1)
        sums[0] -= ours.gather(-1, targets).double().sum()
        sums[1] -= theirs.gather(-1, targets).double().sum()
        sums[2] += (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
        sums[3] += (ours.argmax(-1) == theirs.argmax(-1)).double().sum()
    torch.set_float32_matmul_precision(precision)
    count = windows.shape[0] * (windows.shape[1] - 1)
    own, teachers, kl, same = (sums / count).tolist()
    return Numbers(count, math.exp(min(own, 700.0)), math.exp(teachers), kl, same)
