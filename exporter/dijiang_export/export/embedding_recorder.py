"""Record the case `embedding`: each token of the vocabulary once, and what the first layers make of it.

A wrong row of the embedding must show. It shows in a state as long as the decay leaves a share of it; so
rows of tokens are short, begin at positions where the tables (if there are any) neither drop a token nor
what was before it, and each begins with an empty state. Of a state, only the sum over its features is kept:
a feature map sums to one, so that is the decayed sum of the values, H·d numbers in place of H·d·d. Two
layers are enough: the first normalises the embedding, and so does not see its length; the second sees it.
That makes the case cheap to record, a pass through one layer and a third of all V tokens.
`dijiang_engines.validation.replay_embedding` replays it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dijiang_engines.formats.reference_cases import EMBEDDING
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.export.dequantised import ModelWeights
from dijiang_export.export.streamed_model import SEGMENT_BYTES, StreamedModel
from dijiang_export.reference.attention import dijiang_attention
from dijiang_export.reference.model import Block

LAYERS = 2
"""Whose states are kept, if the model has so many."""
ROW_TOKENS = 16
"""At most, in a row: a token's share of the sum is about a quarter then, above any type's tolerance."""
MOST_STARTS = 4096
"""Rows of a table that are looked at."""
LEAST_SHARE = 0.25
"""What decay must leave of each token in at least one head, beside the token of which it leaves the most."""


@dataclass(frozen=True)
class EmbeddingInputs:
    """Which token is read where."""

    input_ids: npt.NDArray[np.int64]
    """[B, T], right-padded with 0: a permutation of the vocabulary."""
    seq_lens: npt.NDArray[np.int64]
    """[B]"""
    positions: npt.NDArray[np.int64]
    """[B]"""


def embedding_inputs(checkpoint: ModelWeights, seed: int = 0) -> EmbeddingInputs:
    """Rows of tokens, each of the vocabulary once, where the first layer's decay lets all of them be seen."""
    spec = checkpoint.spec
    length, starts = _visible_rows(checkpoint)
    order = np.random.default_rng(seed).permutation(spec.vocab_size)
    rows = -(-spec.vocab_size // length)
    ids = np.zeros(rows * length, np.int64)
    ids[: spec.vocab_size] = order
    lens = np.full(rows, length, np.int64)
    lens[-1] = spec.vocab_size - (rows - 1) * length
    begin = np.arange(rows, dtype=np.int64) * length
    # One after another as in a text; tables end, and the next row begins at their beginning again.
    positions = begin if starts is None else starts[begin % len(starts)]
    return EmbeddingInputs(ids.reshape(rows, length), lens, positions)


def _visible_rows(checkpoint: ModelWeights) -> tuple[int, npt.NDArray[np.int64] | None]:
    """Tokens in a row, and positions at which rows may begin; None: anywhere."""
    spec = checkpoint.spec
    limit = spec.max_positions
    log_decay = checkpoint.tensor("layers.0.attention.log_decay").double().numpy()
    gain = None
    if spec.decay == "tables":
        log_decay = log_decay[:MOST_STARTS]
        gain = checkpoint.tensor("layers.0.attention.gain").double().numpy()[:MOST_STARTS]
    length = ROW_TOKENS
    while True:
        last = None if limit is None else limit - length
        if last is None or last >= 0:
            shares = _shares(log_decay, gain, length)  # of one start, or of all that the table has
            good = np.flatnonzero(shares[: None if last is None else last + 1] >= LEAST_SHARE)
            if len(good) and gain is None:
                return length, None if last is None else np.arange(last + 1)
            if len(good) > len(log_decay) // 8:
                return length, good
        if length == 1:
            return 1, np.zeros(1, np.int64)
        length //= 2


def _shares(
    log_decay: npt.NDArray[np.float64], gain: npt.NDArray[np.float64] | None, length: int
) -> npt.NDArray[np.float64]:
    """Of rows of `length` tokens that begin at each position [N] (or [1]): the least token's share.

    Args:
        log_decay: [H], or [N, H].
        gain: None, or [N, H].
    """
    if gain is None:
        left = np.exp(log_decay.max() * np.arange(length))
        return np.array([left.min()])
    at = np.arange(max(len(log_decay) - length + 1, 0))[:, None] + np.arange(length)  # [starts, T]
    after = np.cumsum(log_decay[at][:, ::-1], axis=1)[:, ::-1] - log_decay[at]  # [starts, T, H]
    weight = np.abs(gain[at]) * np.exp(after)
    most = weight.max(axis=1, keepdims=True)
    share = np.divide(weight, most, out=np.zeros_like(weight), where=most > 0)
    least: npt.NDArray[np.float64] = share.max(axis=2).min(axis=1)
    return least


class EmbeddingRecorder(StreamedModel):
    """Computes the case of one checkpoint. Call `run` in inference mode."""

    def run(
        self, inputs: EmbeddingInputs, progress: ProgressFactory = silent
    ) -> dict[str, npt.NDArray[np.generic]]:
        """The case's tensors in the file."""
        spec = self.spec
        count = min(LAYERS, spec.num_layers)
        rows, length = inputs.input_ids.shape
        state_bytes = 8 * int(np.prod(spec.state_shape))
        size = max(1, min(self.segment_tokens() // length, SEGMENT_BYTES // state_bytes))
        values = [np.zeros((rows, spec.num_heads, spec.head_dim), np.float32) for _ in range(count)]
        with progress("Recording the embedding's rows", rows, "items") as bar:
            for start in range(0, rows, size):
                part = slice(start, min(start + size, rows))
                for layer, found in enumerate(self._values(inputs, part, count)):
                    values[layer][part] = found.float().numpy()
                bar.advance(part.stop - start)
        return {
            f"{EMBEDDING}.input_ids": inputs.input_ids,
            f"{EMBEDDING}.seq_lens": inputs.seq_lens,
            f"{EMBEDDING}.positions": inputs.positions,
            **{f"{EMBEDDING}.values.{layer}": found for layer, found in enumerate(values)},
        }

    def _values(self, inputs: EmbeddingInputs, rows: slice, count: int) -> list[Tensor]:
        """Of some rows: [b, H, d] for each layer."""
        ids, lens, positions = (
            torch.from_numpy(array[rows]) for array in (inputs.input_ids, inputs.seq_lens, inputs.positions)
        )
        hidden = torch.stack(
            [self.embed(row, int(at)) for row, at in zip(inputs.input_ids[rows], positions, strict=True)]
        )
        state = torch.zeros(len(ids), *self.spec.state_shape, dtype=self.work)
        op = functools.partial(dijiang_attention, form="parallel")
        found = []
        for index in range(count):
            block = self.layer(index)
            if index + 1 < count:
                hidden, present = block(hidden, state, positions, lens, self.inv_freq, op)
            else:
                present = self._last(block, hidden, state, positions, lens)
            found.append(present.sum(-2))
        return found

    def _last(self, block: Block, hidden: Tensor, state: Tensor, positions: Tensor, lens: Tensor) -> Tensor:
        """The state [b, H, d, d] of a layer whose output nobody needs."""
        inner = hidden if block.post_norm else block.attention_norm(hidden)
        op = functools.partial(dijiang_attention, form="parallel")
        _, present = block.attention(inner, state, positions, lens, self.inv_freq, op)
        result: Tensor = present
        return result


def record_embedding(
    checkpoint: ModelWeights, dtype: torch.dtype, progress: ProgressFactory = silent
) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, str]]:
    """The case's tensors and its metadata."""
    with torch.inference_mode():
        tensors = EmbeddingRecorder(checkpoint, dtype).run(embedding_inputs(checkpoint), progress)
    return tensors, {EMBEDDING: str(min(LAYERS, checkpoint.spec.num_layers))}
