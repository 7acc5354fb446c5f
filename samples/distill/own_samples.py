"""What the teacher writes when nobody asks: text of every kind that it knows, without a download."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .teacher import Teacher
from .tokens import number

TEMPERATURES = (0.7, 0.85, 1.0)
"""One row each in turn: likely text and varied text."""
REACH = 64
"""Positions by which what attention looks at grows: a CUDA graph for each size."""
ATTENTION = "one query, shared keys"
"""What `_attend` is called in transformers' table."""


class Writer:
    """Writes many texts at once, a token of each at a time.

    Keys and values have room for the longest text from the start, so that a step always does the same to the
    same memory: on a GPU it is a CUDA graph, without which the host could not keep up with so small a model.

    Args:
        teacher: in the type in which it shall run.
        rows: texts at a time.
        length: tokens of each.
    """

    def __init__(self, teacher: Teacher, rows: int, length: int) -> None:
        self.teacher, self.rows, self.length = teacher, rows, length
        device = teacher.head_weight.device
        self._cache = _Cache(length, device)
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._places = torch.arange(length, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def write(
        self, starts: Sequence[int], seed: str, on_token: Callable[[int], None] = lambda _: None
    ) -> Tensor:
        """Sample texts.

        Args:
            starts: tokens to begin with, one row each in turn.
            seed: of the choices.
            on_token: told how many tokens there are more.

        Returns:
            int32 [rows, length], on the CPU. An end of text is a token like any other: the next begins.
        """
        device, rows = self._ids.device, range(self.rows)
        generator = torch.Generator(device).manual_seed(number(f"{seed} own samples"))
        heat = torch.tensor([[TEMPERATURES[row % len(TEMPERATURES)]] for row in rows], device=device)
        begin = [[starts[row // len(TEMPERATURES) % len(starts)]] for row in rows]
        self._ids.copy_(torch.tensor(begin, device=device))
        out = torch.empty(self.rows, self.length, dtype=torch.int32, device=device)
        out[:, :1] = self._ids
        with _attention(self.teacher):
            for at in range(self.length - 1):
                self._cache.position.fill_(at)
                logits = self._step(min(self.length, (at // REACH + 1) * REACH))
                chances = torch.softmax(logits / heat, dim=-1)
                self._ids.copy_(torch.multinomial(chances, 1, generator=generator))
                out[:, at + 1 : at + 2] = self._ids
                on_token(self.rows)
        return out.cpu()

    def _step(self, reach: int) -> Tensor:
        """Logits float32 [rows, V] after the present tokens, from a graph if there is a GPU."""
        if not self._ids.is_cuda:
            return self._logits(reach)
        if reach not in self._graphs:
            self._logits(reach)  # what is set up at a first call must not be captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._logits(reach)
            self._graphs[reach] = graph, logits
        graph, logits = self._graphs[reach]
        graph.replay()
        return logits

    def _logits(self, reach: int) -> Tensor:
        self._cache.reach = reach
        position = self._cache.position
        later = self._places[:reach] > position
        mask = torch.zeros(reach, dtype=self.teacher.head_weight.dtype, device=later.device)
        answer = self.teacher.net.base_model(
            self._ids,
            attention_mask=mask.masked_fill(later, float("-inf")).view(1, 1, 1, reach),
            position_ids=position.view(1, 1).expand(self.rows, 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = self.teacher.net.get_output_embeddings()(answer.last_hidden_state[:, -1])
        return logits.float()


class _Cache:
    """Keys and values of all layers, [B, H', length, d] each; what transformers' models ask of a cache."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.length, self.reach = length, length
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keep one token's [B, H', 1, d]; what is kept of the first `reach` positions."""
        if layer_idx not in self._kept:
            batch, heads, _one, size = keys.shape
            shape = (2, batch, heads, self.length, size)
            self._kept[layer_idx] = tuple(torch.zeros(shape, dtype=keys.dtype, device=keys.device))
        kept = self._kept[layer_idx]
        for all_of_them, one in zip(kept, (keys, values), strict=True):
            all_of_them.index_copy_(2, self.position, one)
        return kept[0][:, :, : self.reach], kept[1][:, :, : self.reach]

    def get_seq_length(self, *_: Any) -> int:
        """Not used for anything: positions and mask are given."""
        return 0


def _attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one token: query [B, H, 1, d], key and value [B, H', reach, d] -> [B, 1, H, d].

    The queries of a shared key are the rows of one product, and no key is copied for them.
    """
    batch, heads, _one, size = query.shape
    shared = key.shape[1]
    scores = query.reshape(batch, shared, heads // shared, size) @ key.mT * scaling + mask
    return (scores.softmax(-1, torch.float32).to(value.dtype) @ value).view(batch, 1, heads, size), None


ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attend


@contextmanager
def _attention(teacher: Teacher) -> Iterator[None]:
    config = teacher.net.config
    before, config._attn_implementation = config._attn_implementation, ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
