"""What the teacher writes when nobody asks: text of every kind that it knows, without a download."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .teacher import Teacher
from .tokens import number

TEMPERATURES = (0.7, 0.85, 1.0)
"""One row each in turn: likely text and varied text."""


@torch.no_grad()
def own_samples(
    teacher: Teacher,
    starts: Sequence[int],
    rows: int,
    length: int,
    seed: str,
    on_token: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Sample `rows` texts with a KV cache.

    Args:
        teacher: in the type in which it shall run.
        starts: tokens to begin with, one row each in turn.
        rows: texts, all at once.
        length: tokens of each, the first included. An end of text is a token like any other: the next begins.
        seed: of the choices.
        on_token: told how many tokens there are more.

    Returns:
        int32 [rows, length], on the CPU.
    """
    device = teacher.head_weight.device
    generator = torch.Generator(device).manual_seed(number(f"{seed} own samples"))
    heat = torch.tensor([TEMPERATURES[row % len(TEMPERATURES)] for row in range(rows)], device=device)
    ids = torch.tensor([starts[row // len(TEMPERATURES) % len(starts)] for row in range(rows)], device=device)
    out, cache = [ids], None
    for _ in range(length - 1):
        answer = teacher.net.base_model(ids.unsqueeze(1), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        logits = teacher.net.get_output_embeddings()(answer.last_hidden_state[:, -1]).float()
        chances = torch.softmax(logits / heat.unsqueeze(1), dim=-1)
        ids = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        out.append(ids)
        on_token(rows)
    return torch.stack(out, dim=1).to("cpu", torch.int32)
