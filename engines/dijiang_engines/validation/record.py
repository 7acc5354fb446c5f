"""What was recorded of a case, and a run's logits and states compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dijiang_engines.formats.reference_cases import ReferenceCase
from dijiang_engines.runners.base import FloatArray
from dijiang_engines.validation.check import Check
from dijiang_engines.validation.compare import Comparison, compare_bits, compare_logits, compare_state
from dijiang_engines.validation.tolerances import Bounds


@dataclass(frozen=True)
class RunResult:
    """What one run of the whole batch gave: last logits [V] and layers' states [H, d, d], per row."""

    logits: list[FloatArray]
    states: list[list[FloatArray]]


class CaseRecord:
    """One case's record. Everything here makes or yields checks; `replay` is the name they bear.

    Args:
        case: which.
        bounds: the tolerances.
        layers: of the model.
        all_logits: does the runner give the logits of every token?
        unit_of: the case whose recorded logits set the unit of errors; default `case`, of which it is
            a part otherwise.
    """

    def __init__(
        self,
        case: ReferenceCase,
        bounds: Bounds,
        *,
        layers: int,
        all_logits: bool,
        unit_of: ReferenceCase | None = None,
    ) -> None:
        self.case, self.all_logits = case, all_logits
        self._unit_of = unit_of
        self._logits_tolerance = bounds.logits
        self._state_tolerances = [bounds.state(layer) for layer in range(layers)]
        self._padding_tolerances = {layer: bounds.padding(layer) for layer in (None, *range(layers))}
        self.state_index = {int(mark): s for s, mark in enumerate(case.state_marks)}
        """Mark -> where its states are in the record; not every mark has them."""
        self._logits = case.logits()
        self._states = [case.state(layer) for layer in range(layers)]

    @cached_property
    def _scale(self) -> float:
        """The logits' unit, asked for once the record is known to be finite."""
        logits = self._logits if self._unit_of is None else self._unit_of.logits()
        return float(logits.astype(np.float64).std())

    def not_finite(self) -> Check | None:
        """A failed check if the record holds NaN or infinity: then nothing can be compared with it."""
        arrays = [(None, self._logits), *enumerate(self._states)]
        for layer, array in arrays:
            bad = ~np.isfinite(array)
            if bad.any():
                index = np.unravel_index(int(bad.argmax()), array.shape)
                mark = int(index[1]) if layer is None else int(self.case.state_marks[index[1]])
                row = int(index[0])
                shown = Comparison(
                    False,
                    f"the recorded values are not finite: {array[index]}",
                    worst=tuple(int(i) for i in index),
                )
                return Check(
                    self.case.name, "record", "reference", row, int(self.case.marks[row, mark]), layer, shown
                )
        return None

    def whole_run(
        self, replay: str, logits: FloatArray, states: list[FloatArray], rows: list[int] | None = None
    ) -> Iterator[Check]:
        """A whole run's last mark, and with all logits every mark. `rows`: the case's rows that were run."""
        for index, row in enumerate(range(self.case.batch) if rows is None else rows):
            marks = self.case.marks[row]
            if self.all_logits:
                for mark in range(len(marks) - 1):
                    yield self.logits_at_mark(replay, row, mark, logits[index, marks[mark] - 1])
            vector = self.last_valid(logits, index, int(marks[-1]))
            yield from self.at_mark(replay, row, len(marks) - 1, vector, states, index)

    def at_mark(
        self,
        replay: str,
        row: int,
        mark: int,
        vector: FloatArray | None,
        states: list[FloatArray] | None,
        index: int | None = None,
    ) -> Iterator[Check]:
        """States (if recorded there), then logits, of one row at one mark; `index`: the row in `states`."""
        at = self.state_index.get(mark)
        if at is not None and states is not None:
            for layer, recorded in enumerate(self._states):
                got = states[layer][row if index is None else index]
                result = compare_state(got, recorded[row, at], self._state_tolerances[layer])
                tokens = int(self.case.marks[row, mark])
                yield Check(self.case.name, replay, "state", row, tokens, layer, result)
        if vector is not None:
            yield self.logits_at_mark(replay, row, mark, vector)

    def logits_at_mark(self, replay: str, row: int, mark: int, vector: FloatArray) -> Check:
        """The logits [V] of one row at one mark."""
        result = compare_logits(vector, self._logits[row, mark], self._logits_tolerance, scale=self._scale)
        tokens = int(self.case.marks[row, mark])
        return Check(self.case.name, replay, "logits", row, tokens, None, result)

    def other_padding(
        self, replay: str, row: int, vector: FloatArray, states: list[FloatArray], whole: RunResult
    ) -> Iterator[Check]:
        """A row's end, logits [V] and states [H, d, d], against the same row of a run padded otherwise."""
        tokens = int(self.case.seq_lens[row])
        for layer, got in enumerate(states):
            result = compare_state(got, whole.states[row][layer], self._padding_tolerances[layer])
            yield Check(self.case.name, replay, "padding", row, tokens, layer, result)
        result = compare_logits(vector, whole.logits[row], self._padding_tolerances[None], scale=self._scale)
        yield Check(self.case.name, replay, "padding", row, tokens, None, result)

    def kept(
        self,
        replay: str,
        row: int,
        tokens: int,
        states: list[FloatArray],
        before: list[FloatArray],
        *,
        rows_only: bool = False,
    ) -> Iterator[Check]:
        """A row's states, bit for bit what they were. `rows_only`: `before` is of this row alone."""
        for layer, values in enumerate(states):
            old = before[layer] if rows_only else before[layer][row]
            result = compare_bits(values[row], old)
            yield Check(self.case.name, replay, "kept", row, tokens, layer, result)

    def marks_at(self, row: int, tokens: int) -> list[int]:
        """Marks of a short row may coincide."""
        return [int(mark) for mark in np.flatnonzero(self.case.marks[row] == tokens)]

    def last_valid(self, logits: FloatArray, row: int, count: int) -> FloatArray:
        """The logits [V] after a row's last of `count` tokens in a call."""
        place = max(count - 1, 0) if self.all_logits else 0
        vector: FloatArray = logits[row, place]
        return vector
