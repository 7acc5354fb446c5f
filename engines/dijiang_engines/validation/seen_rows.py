"""Which rows of a model's embeddings the replayed cases read: a row that none reads is not validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dijiang_engines.spec import ModelSpec


@dataclass(frozen=True)
class Share:
    """Rows of a table."""

    seen: int
    total: int

    @property
    def sentence(self) -> str:
        """As in "116 of 2,048 (5.7%)"."""
        percent = 100.0 if self.seen == self.total else min(100 * self.seen / self.total, 99.9)
        return f"{self.seen:,} of {self.total:,} ({percent:.3g}%)"


class _Tokens(Protocol):
    @property
    def input_ids(self) -> npt.NDArray[np.int64]: ...
    @property
    def seq_lens(self) -> npt.NDArray[np.int64]: ...
    @property
    def positions(self) -> npt.NDArray[np.int64]: ...


class SeenRows:
    """Takes replayed cases one by one."""

    def __init__(self, spec: ModelSpec) -> None:
        self._tokens = np.zeros(spec.vocab_size, np.bool_)
        self._positions = np.zeros(spec.position_embeddings, np.bool_)

    def add(self, case: _Tokens) -> None:
        """A case was replayed, all of its tokens."""
        offsets = np.arange(case.input_ids.shape[1])
        valid = offsets < case.seq_lens[:, None]
        self._tokens[case.input_ids[valid]] = True
        if len(self._positions):
            positions = (case.positions[:, None] + offsets)[valid]
            self._positions[positions[positions < len(self._positions)]] = True

    @property
    def embedding(self) -> Share:
        """Rows of the tokens' embedding."""
        return Share(int(self._tokens.sum()), len(self._tokens))

    @property
    def positions(self) -> Share | None:
        """Rows of the positions' embedding, without the first ones that no position has; None without one."""
        return Share(int(self._positions.sum()), len(self._positions)) if len(self._positions) else None
