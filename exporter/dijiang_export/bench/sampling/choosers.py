"""Who chooses tokens: our kernel, and PyTorch's operators as decoding loops put them together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dijiang_engines import sampling
from dijiang_engines.kernels.sampling import SamplingKernels
from dijiang_engines.sampling import SamplingOptions

SEED = 7
WIDTH = 2.5
"""Standard deviation of the logits: top-p 0.9 then keeps some thousands of 50,000 tokens."""
COMPARED = 32
"""Draws of a row that are compared with those on the host."""


def make_logits(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """Random, float32 [rows, vocabulary]."""
    draw = torch.Generator(device).manual_seed(rows)
    return WIDTH * torch.randn(rows, vocabulary, generator=draw, device=device)


class Ours:
    """`dijiang_sample` for all rows.

    Args:
        kernels: the library.
        options: how tokens are chosen.
        logits: float32 [B, V].
    """

    def __init__(self, kernels: SamplingKernels, options: SamplingOptions, logits: Tensor) -> None:
        self._kernels, self._options, self._logits = kernels, options, logits
        rows, device = len(logits), logits.device
        self.tokens = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.status = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.draws = torch.zeros(rows, dtype=torch.int64, device=device)

    def run(self) -> None:
        """Enqueue a choice; row r takes number draws[r] of stream r."""
        stream = int(torch.cuda.current_stream().cuda_stream) if self._logits.is_cuda else 0
        self._kernels.sample(
            self._options, logits=self._logits, tokens=self.tokens, row_status=self.status, seed=SEED,
            draws=self.draws, stream=stream,
        )  # fmt: skip

    def different(self, rows: int = 8) -> float:
        """The share of tokens that differ from `sampling.sample`'s: rounding decides between two of many.

        Args:
            rows: of the first ones, those that are compared.
        """
        logits = self._logits[:rows].cpu().numpy()
        count = 1 if self._options.greedy else COMPARED
        wrong = 0
        for index in range(count):
            self.tokens.fill_(-1)
            self.draws.fill_(index)
            self.run()
            uniforms = np.array([sampling.uniform(SEED, row, index) for row in range(len(logits))])
            expected = sampling.sample(logits, self._options, uniforms)
            wrong += int((self.tokens[:rows].cpu().numpy() != expected).sum()) + int(self.status.any())
        return wrong / (count * len(logits))


def torch_chooser(options: SamplingOptions) -> Callable[[Tensor, Tensor], None]:
    """What chooses with PyTorch's operators: from logits [B, V], to tokens int64 [B].

    Filters mask what they leave out, and the draw divides probabilities by exponentially distributed numbers
    and takes the largest, which needs no copy to the host and may be captured in a CUDA graph.
    """

    def choose(logits: Tensor, tokens: Tensor) -> None:
        if options.greedy:
            tokens.copy_(logits.argmax(-1))
            return
        scores = logits / options.temperature
        if options.top_k:
            least = torch.topk(scores, options.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if options.top_p < 1:
            ordered, places = scores.sort(descending=True, stable=True)
            shares = torch.softmax(ordered, -1)
            late = shares.cumsum(-1) - shares >= options.top_p
            scores = scores.masked_fill(late.scatter(-1, places, late), -torch.inf)
        shares = torch.softmax(scores, -1)
        if options.min_p:
            shares = shares.masked_fill(shares < options.min_p * shares.amax(-1, keepdim=True), 0)
        tokens.copy_((shares / torch.empty_like(shares).exponential_()).argmax(-1))

    return choose
