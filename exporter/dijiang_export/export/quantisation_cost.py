"""What quantised weights cost a model: beside its float weights, over a text, before the bundle is finished.

The text is the end of the calibration file if there is one, and else what the model writes itself with its
float weights: rows from random first tokens, each next one sampled from its distribution. Of such text the
mean KL divergence is the rate at which the two models' texts can be told apart, whatever the model is for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from dijiang_engines.formats.quantised.manifest import QuantisationCost
from dijiang_engines.progress import ProgressFactory
from dijiang_engines.sizes import part_sizes
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import Checkpoint
from dijiang_export.export.dequantised import DequantisedCheckpoint
from dijiang_export.export.windows import STATE_BYTES, IntArray, WindowModel

MOST_ROWS, MOST_TOKENS, LEAST_TOKENS = 32, 16, 6
"""Of the text that a model writes itself."""
WRITTEN_PARAMETERS = 1 << 31
"""Parameters times tokens a row: for each token all weights are read."""


@dataclass(frozen=True)
class MeasuredText:
    """What the two models are compared on."""

    windows: npt.NDArray[np.int64]
    """[W, T]: the first token of each is given, all others are predicted."""
    words: str
    """What it is, a phrase."""


def measure_cost(
    checkpoint: Checkpoint,
    quantised: DequantisedCheckpoint,
    dtype: torch.dtype,
    text: MeasuredText | None,
    progress: ProgressFactory,
) -> QuantisationCost:
    """Compare the two.

    Args:
        checkpoint: with the float weights, which are rounded to `dtype`.
        quantised: the same model with those that are stored.
        dtype: of activations; everything here is computed in float32.
        text: None: the model writes it.
        progress: of layers and tokens.
    """
    spec, given = checkpoint.spec, text
    plain, other = WindowModel(checkpoint, dtype), WindowModel(quantised, dtype)
    rows, tokens = _size(spec)
    total = spec.num_layers + (tokens if given is None else spec.num_layers)
    with torch.inference_mode(), progress("Measuring the cost of quantisation", total, "items") as bar:
        if given is None:
            first = np.random.default_rng(0).integers(0, spec.vocab_size, rows)
            windows, exact = plain.write(first, tokens, 0, bar)
            words = f"{rows} texts of {tokens} tokens that the float model wrote"
        else:
            windows, words = given.windows, given.words
            exact = plain.final(windows[:, :-1], bar)
        found = other.final(windows[:, :-1], bar)
        sums = _compare(plain, other, exact, found, windows[:, 1:])
    count = windows[:, 1:].size
    kl, same, loss, loss_float = (float(value) / count for value in sums)
    return QuantisationCost(words, count, max(kl, 0.0), same, _perplexity(loss), _perplexity(loss_float))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 60.0))  # of a model that is no model


def _size(spec: ModelSpec) -> tuple[int, int]:
    """Rows and tokens of a row that a model writes: fewer, the more it takes."""
    parameters = sum(part.count for part in part_sizes(spec).values())
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, WRITTEN_PARAMETERS // parameters))
    if spec.max_positions is not None:
        tokens = max(1, min(tokens, spec.max_positions - 1))
    return min(MOST_ROWS, max(1, STATE_BYTES // spec.state_bytes)), tokens


def _compare(
    plain: WindowModel, other: WindowModel, exact: Tensor, found: Tensor, targets: IntArray
) -> tuple[Tensor, ...]:
    """Sums over all tokens: KL(plain || other), the same likeliest token, the losses of other and plain."""
    wanted = torch.from_numpy(np.ascontiguousarray(targets)).reshape(-1)
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(4)]
    pairs = zip(
        plain.logits(exact.reshape(-1, exact.shape[-1])), other.logits(found.reshape(-1, found.shape[-1])),
        strict=True,
    )  # fmt: skip
    for (part, one), (_, two) in pairs:
        p, q = (functional.log_softmax(x.double(), -1) for x in (one, two))
        sums[0] += (p.exp() * (p - q)).sum()
        sums[1] += (one.argmax(-1) == two.argmax(-1)).sum()
        for index, values in ((2, q), (3, p)):
            sums[index] -= values.gather(-1, wanted[part].unsqueeze(-1)).sum()
    return tuple(sums)
