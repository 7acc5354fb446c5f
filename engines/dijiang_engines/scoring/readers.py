"""What reads tokens and predicts the next ones: any runner, and models that are not run by one.

A runner whose graphs return logits of every token (`to-onnx --logits all`) prefills in pieces. One that
returns the last token's only goes token by token through its step graph, with many windows as rows, so that
the weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners.base import IntArray, LimitsBatch, Runner
from dijiang_engines.runners.checks import last_position

LOGITS_BYTES = 128 << 20
"""Most bytes of logits, in float32, that one call may return."""
STATE_BYTES = 1 << 30
"""Most bytes of state that rows are chosen by: two copies each, as ONNX Runtime's runners hold."""
MOST_ROWS = 64
"""Read at once, if nothing else limits them."""
PREFILL_TOKENS = 2048
"""Most tokens of all rows in one call without logits of each: bounds the memory for activations."""

Logits = npt.NDArray[np.floating[Any]]


class Reading(Protocol):
    """Rows that are being read, each from an empty state."""

    def skip(self, count: int) -> None:
        """Read the next `count` tokens of each row, as far as it has so many."""
        ...

    def read(self, count: int) -> Logits:
        """Read the next tokens likewise. Returns logits [rows, count, V] of what follows each of them; beyond
        a row's end they are anything.
        """
        ...

    def keep(self, rows: int) -> None:
        """Go on with the first `rows` rows only."""
        ...


class Reader(Protocol):
    """A loaded model."""

    name: str
    """What runs it, for tables: "onnxruntime-cpu", "tensorrt", "pytorch", ..."""
    vocab_size: int
    context: int
    """Tokens that it was trained on, by its configuration."""
    most_tokens: int
    """That a row may have."""
    recurrent: bool
    """Its memory does not grow with the text, so that a text of any length can be one row."""

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens are best read at once."""
        ...

    def piece(self, rows: int) -> int:
        """How many tokens of so many rows one `Reading.read` should take."""
        ...

    def start(self, ids: IntArray, lengths: IntArray) -> Reading:
        """Begin with rows of tokens.

        Args:
            ids: [rows, L] int64, right-padded with any token.
            lengths: [rows] int64, not increasing.
        """
        ...


def piece_of(rows: int, vocab_size: int, chunk: int, item_bytes: int = 4) -> int:
    """Tokens a row whose logits fit into LOGITS_BYTES: whole chunks if there are any."""
    piece = LOGITS_BYTES // (item_bytes * vocab_size * rows)
    return max(1, piece // chunk * chunk if piece > chunk else piece)


def pieces(count: int, rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of calls without logits that read `count` tokens of so many rows."""
    step = max(1, PREFILL_TOKENS // rows)
    for start in range(0, count, step):
        yield start, min(start + step, count)


class RunnerReader:
    """Any runner, of a bundle or an engine."""

    recurrent = True

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.name = runner.name
        self.vocab_size = runner.spec.vocab_size
        self.context = runner.spec.max_position_embeddings
        self.most_tokens = last_position(runner)
        self._chunk = chunk_size(runner.spec.head_dim)

    def rows(self, length: int) -> int:
        """As many as fit the runner, the state's memory, and that of logits of a chunk of tokens."""
        spec, runner = self.runner.spec, self.runner
        most = min(MOST_ROWS, STATE_BYTES // (2 * spec.state_bytes))
        if runner.all_logits:
            most = min(most, LOGITS_BYTES // (4 * self.vocab_size * min(self._chunk, length)))
        if isinstance(runner, LimitsBatch):
            most = min(most, runner.max_batch)
        return max(1, most)

    def piece(self, rows: int) -> int:
        """As many as logits fit; one where each token is a call of its own."""
        return piece_of(rows, self.vocab_size, self._chunk) if self.runner.all_logits else 1

    def start(self, ids: IntArray, lengths: IntArray) -> RunnerReading:
        """A reading with a new state."""
        return RunnerReading(self.runner, ids, lengths)


class RunnerReading:
    """Rows in a runner's state."""

    def __init__(self, runner: Runner, ids: IntArray, lengths: IntArray) -> None:
        self._runner, self._ids, self._lengths = runner, ids, lengths
        self._state = runner.new_state(len(ids))
        self._done = 0

    def skip(self, count: int) -> None:
        """Prefills, whose logits are thrown away."""
        rows = len(self._ids)
        most = piece_of(rows, self._runner.spec.vocab_size, 1) if self._runner.all_logits else count
        for start, stop in pieces(count, rows):
            for first in range(start, stop, most):
                self._call(min(most, stop - first))

    def read(self, count: int) -> Logits:
        """A prefill, or as many steps."""
        if self._runner.all_logits:
            return self._call(count)
        steps = [self._call(1, step=True) for _ in range(count)]
        return steps[0] if count == 1 else np.concatenate(steps, axis=1)

    def keep(self, rows: int) -> None:
        """The first rows' state, taken out and put into a smaller one."""
        if rows == len(self._ids):
            return
        self._ids, self._lengths = self._ids[:rows], self._lengths[:rows]
        layers = [layer[:rows] for layer in self._runner.export_state(self._state)]
        self._state = None  # its memory is needed for the new one
        self._state = self._runner.import_state(layers)

    def _call(self, count: int, step: bool = False) -> Logits:
        ids = self._ids[:, self._done : self._done + count]
        positions = np.minimum(self._lengths, self._done)
        lens = np.clip(self._lengths - self._done, 0, count)
        run = self._runner.step if step else self._runner.prefill
        logits = run(np.ascontiguousarray(ids), positions, lens, self._state)
        self._done += count
        return logits
