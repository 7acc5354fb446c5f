"""The PyTorch reference of a DiJiang checkpoint as a reader: the chunked form, with logits of every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dijiang_engines.errors import RunnerError
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners.base import MAX_POSITIONS, IntArray
from dijiang_engines.scoring.readers import LOGITS_BYTES, MOST_ROWS, STATE_BYTES, Logits, piece_of, pieces
from dijiang_export.reference.model import ReferenceModel


@contextmanager
def memory_is_enough() -> Iterator[None]:
    """PyTorch's failures to allocate, of which a CPU's is a RuntimeError like any other, as an error.

    Raises:
        RunnerError: memory was short.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise RunnerError(
                "PyTorch runs out of memory",
                got=" ".join(str(error).split())[:200],
                hint="read fewer windows at once (--batch 1), or shorter ones (--window)",
            ) from error
        raise


class ReferenceReader:
    """A reference model, in whatever type and on whatever device it is."""

    name = "pytorch"
    recurrent = True

    def __init__(self, model: ReferenceModel) -> None:
        spec = model.spec
        self.model = model.eval()
        self.vocab_size = spec.vocab_size
        self.context = spec.max_position_embeddings
        self.most_tokens = MAX_POSITIONS if spec.max_positions is None else spec.max_positions
        self._chunk = chunk_size(spec.head_dim)
        # Half-precision models give their logits as float32, too.
        self._item_bytes = 8 if model.embed_tokens.weight.dtype == torch.float64 else 4

    def rows(self, length: int) -> int:
        """As many as fit the state's memory, and that of logits of a chunk of tokens."""
        of_logits = LOGITS_BYTES // (self._item_bytes * self.vocab_size * min(self._chunk, length))
        return max(1, min(MOST_ROWS, STATE_BYTES // (2 * self.model.spec.state_bytes), of_logits))

    def piece(self, rows: int) -> int:
        """As many as logits fit."""
        return piece_of(rows, self.vocab_size, self._chunk, self._item_bytes)

    def start(self, ids: IntArray, lengths: IntArray) -> ReferenceReading:
        """A reading with a new state."""
        return ReferenceReading(self.model, ids, lengths)


class ReferenceReading:
    """Rows, and their states as tensors."""

    def __init__(self, model: ReferenceModel, ids: IntArray, lengths: IntArray) -> None:
        device = model.embed_tokens.weight.device
        self._model = model
        self._ids, self._lengths = torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)
        self._states = model.new_states(len(ids))
        self._done = 0

    def skip(self, count: int) -> None:
        """Pieces without logits but of their last tokens."""
        with memory_is_enough():
            for start, stop in pieces(count, len(self._ids)):
                self._call(stop - start, all_logits=False)

    def read(self, count: int) -> Logits:
        """One call of the model."""
        with memory_is_enough():
            found: Logits = self._call(count, all_logits=True).cpu().numpy()
        return found

    def keep(self, rows: int) -> None:
        """The first rows' tensors, as copies: what the others took is given back."""
        self._ids, self._lengths = self._ids[:rows], self._lengths[:rows]
        self._states = [state[:rows].clone() for state in self._states]

    @torch.inference_mode()
    def _call(self, count: int, *, all_logits: bool) -> Tensor:
        ids = self._ids[:, self._done : self._done + count]
        positions = self._lengths.clamp(max=self._done)
        lens = (self._lengths - self._done).clamp(0, count)
        logits: Tensor
        logits, self._states = self._model(ids, positions, lens, self._states, all_logits=all_logits)
        self._done += count
        return logits
