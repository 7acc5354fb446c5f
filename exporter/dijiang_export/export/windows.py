"""Windows of tokens, each read from an empty state, through a model whose matrices stay on disk.

A layer at a time over all windows, so that every weight is read once; or, for text that the model writes
itself, a token at a time, for which it is read once a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dijiang_engines.op_contract import Attributes
from dijiang_engines.progress import Progress
from dijiang_export.export.dequantised import ModelWeights
from dijiang_export.export.streamed_model import StreamedModel
from dijiang_export.reference.attention import Decay, dijiang_attention
from dijiang_export.reference.model import AttentionOp, Block, ReferenceModel

IntArray = npt.NDArray[np.int64]
LOGITS_BYTES = 16 << 20
"""Of the logits of one block of tokens, in float32."""
STATE_BYTES = 128 << 20
"""Of all states of the rows that a model writes at a time."""


class WindowModel(StreamedModel):
    """Computes in float32. Call everything in inference mode."""

    def __init__(self, checkpoint: ModelWeights, dtype: torch.dtype) -> None:
        super().__init__(checkpoint, dtype, torch.float32)

    def embedded(self, windows: IntArray) -> Tensor:
        """[W, T] -> [W, T, h]."""
        return torch.stack([self.embed(row, 0) for row in windows])

    def groups(self, windows: int, length: int) -> list[slice]:
        """Which windows go through a layer at a time."""
        size = max(1, self.segment_tokens() // length)
        return [slice(start, min(start + size, windows)) for start in range(0, windows, size)]

    def run_windows(self, block: Block, hidden: Tensor) -> None:
        """One layer over hidden [W, T, h], in place."""
        for part in self.groups(*hidden.shape[:2]):
            hidden[part] = self.run_layer(
                block, hidden[part], self.op(part.stop - part.start, hidden.shape[1])
            )

    def op(self, rows: int, length: int) -> AttentionOp:
        """The attention of whole windows."""
        state = torch.zeros(rows, *self.spec.state_shape)
        lens, positions = torch.full((rows,), length), torch.zeros(rows, dtype=torch.int64)
        return functools.partial(_attention, state=state, positions=positions, lens=lens, keep=lambda _: None)

    def final(self, windows: IntArray, progress: Progress) -> Tensor:
        """What the last layer makes of windows [W, T]: [W, T, h]."""
        hidden = self.embedded(windows)
        for index in range(self.spec.num_layers):
            self.run_windows(self.layer(index), hidden)
            progress.advance()
        return hidden

    def head_model(self) -> ReferenceModel:
        """What is behind the last layer, for `head`."""
        model = ReferenceModel(self.spec, device="meta")
        model.layers = nn.ModuleList()
        for name in ("embed_tokens", "embed_positions", "project_in"):
            setattr(model, name, None)
        self.load(model, "")
        return model

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """hidden [K, h] -> blocks of [k, V], and which of the K they are."""
        model = self.head_model()
        size = max(1, LOGITS_BYTES // (4 * self.spec.vocab_size))
        for start in range(0, len(hidden), size):
            part = slice(start, min(start + size, len(hidden)))
            yield part, self.head(model, hidden[part])

    def write(self, first: IntArray, tokens: int, seed: int, progress: Progress) -> tuple[IntArray, Tensor]:
        """Let the model write on from one token a row, sampling from its own distribution.

        Args:
            first: [R], the rows' first tokens.
            tokens: how many it writes a row.
            seed: of the choices.
            progress: of the tokens.

        Returns:
            The rows [R, 1 + tokens], and what the last layer made of all but the last token, [R, tokens, h].
        """
        spec, generator = self.spec, torch.Generator().manual_seed(seed)
        states = [torch.zeros(len(first), *spec.state_shape) for _ in range(spec.num_layers)]
        lens, head = torch.ones(len(first), dtype=torch.int64), self.head_model()
        rows, kept = [first], []
        for position in range(tokens):
            hidden = torch.stack([self.embed(rows[-1][r : r + 1], position) for r in range(len(first))])
            for index in range(spec.num_layers):
                op = functools.partial(
                    _attention, state=states[index], positions=torch.full_like(lens, position), lens=lens,
                    keep=functools.partial(states.__setitem__, index),
                )  # fmt: skip
                hidden = self.run_layer(self.layer(index), hidden, op)
            kept.append(hidden)
            chances = torch.softmax(self.head(head, hidden[:, 0]), -1)
            rows.append(torch.multinomial(chances, 1, generator=generator)[:, 0].numpy())
            progress.advance()
        return np.stack(rows, 1), torch.cat(kept, 1)


def _attention(
    *tensors: Tensor,
    state: Tensor,
    positions: Tensor,
    lens: Tensor,
    keep: Callable[[Tensor], None],
    decay: Decay,
    attributes: Attributes,
) -> tuple[Tensor, Tensor]:
    """The op with its own state, positions and lengths in the place of those that a layer is called with."""
    qkv, gate, _, _, _, *constants = tensors
    output, present = dijiang_attention(
        qkv, gate, state, positions, lens, *constants, decay=decay, attributes=attributes, form="chunked"
    )
    keep(present)
    return output, present
