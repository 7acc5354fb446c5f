"""The texts that are being generated: rows of one state, in a batch that is no larger than it must be.

A step's time grows with the rows of its state, also with those that have nothing to read. So the state has
as many rows as the smallest power of two that holds the texts, and they move to a larger or a smaller one as
texts come and go. A text's row is copied whole; at constant size that costs less than a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from dijiang_engines.runners.base import FloatArray, Runner, State

PATIENCE = 16
"""Steps of too few texts before they move to a smaller state: they mostly come in bursts."""


class Text(Protocol):
    """What a batch asks of a text."""

    @property
    def ids(self) -> list[int]:
        """All its tokens."""
        ...

    consumed: int
    """How many of them are in its state: all but the last."""


T = TypeVar("T", bound=Text)


class Batch(Generic[T]):
    """Texts in the rows of one state.

    Args:
        runner: whose state.
        slots: most texts at a time.

    Attributes:
        rows: the text in each row of the state, None in an idle one.
    """

    def __init__(self, runner: Runner, slots: int) -> None:
        self.runner, self.slots = runner, slots
        self.rows: list[T | None] = [None]
        self.state: State = runner.new_state(1)
        self._too_few = 0

    @property
    def texts(self) -> list[T]:
        """Those that are being generated."""
        return [text for text in self.rows if text is not None]

    @property
    def free(self) -> int:
        """How many more texts there is room for."""
        return self.slots - len(self.texts)

    def join(self, text: T, source: State) -> None:
        """Take in a text whose state is the one row of `source`.

        The caller has seen to it that there is room.
        """
        if None not in self.rows:
            self._resize(len(self.rows) + 1)
        row = self.rows.index(None)
        self.runner.copy_rows(source, [0], self.state, [row])
        self.rows[row] = text

    def leave(self, leaves: Callable[[T], bool]) -> None:
        """Let texts go; their rows are idle until another text's state is copied into them."""
        self.rows = [None if text is not None and leaves(text) else text for text in self.rows]

    def row_state(self, text: T) -> list[FloatArray]:
        """A copy of a text's state, one [1, H, d, d] array per layer."""
        return self.runner.get_rows(self.state, [self.rows.index(text)])

    def step(self) -> list[tuple[T, FloatArray]]:
        """Read each text's last token: every text with its logits [V]."""
        self._shrink()
        ids = np.array([[0 if text is None else text.ids[-1]] for text in self.rows])
        positions = np.array([0 if text is None else text.consumed for text in self.rows])
        lens = np.array([int(text is not None) for text in self.rows])
        logits = self.runner.step(ids, positions, lens, self.state)
        found = []
        for row, text in enumerate(self.rows):
            if text is not None:
                text.consumed += 1
                found.append((text, logits[row, 0]))
        return found

    def _shrink(self) -> None:
        count = len(self.texts)
        self._too_few = self._too_few + 1 if 2 * count <= len(self.rows) else 0
        if count and self._too_few > PATIENCE:
            self._resize(count)

    def _resize(self, count: int) -> None:
        """Move to a state for `count` texts."""
        size = min(1 << (count - 1).bit_length(), self.slots)
        state, texts = self.runner.new_state(size), self.texts
        old = [row for row, text in enumerate(self.rows) if text is not None]
        self.runner.copy_rows(self.state, old, state, range(len(old)))
        self.state, self._too_few = state, 0
        self.rows = [*texts, *[None] * (size - len(texts))]
