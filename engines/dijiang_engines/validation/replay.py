"""The ways in which a recorded case is replayed, and what is compared on the way.

    prefill   the whole padded batch in one call
    pieces    cut at the marks, uneven, state carried from call to call
    steps     token by token through the step graph
    alone     each row by itself without padding, and against its place in the padded batch
    padding   with more right padding, of another token, and against the narrower batch
    resume    prefill, state exported and imported again, then steps

Rows that are done get seq_lens 0; their state must stay the same bit for bit. A long case (`WHOLE_TOKENS`)
goes through pieces and steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dijiang_engines.formats.reference_cases import ReferenceCase
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners.base import FloatArray, IntArray, Runner, State
from dijiang_engines.validation.check import Check, Quantity, bad_rows, trace_not_finite
from dijiang_engines.validation.compare import Comparison, compare_bits, compare_logits, compare_state
from dijiang_engines.validation.tolerances import Bounds

__all__ = ["REPLAYS", "Check", "Quantity", "Replayer"]

RESUME_STEPS = 32
"""At most this many tokens of each row go through the step graph in `resume`."""
PIECE_TOKENS = 512
"""At most this many tokens of a row in one call of `pieces`; marks may lie further apart."""
WHOLE_TOKENS = 1024
"""A longer case goes only through `pieces` and `steps`: one call with all its tokens would need memory, and
from an engine a profile, that nobody plans for, and would test what shorter cases test."""


Replay = Callable[["Replayer"], Iterator[Check]]


@dataclass(frozen=True)
class _Result:
    """What one run of the whole batch gave: last logits [V] and layers' states [H, d, d], per row."""

    logits: list[FloatArray]
    states: list[list[FloatArray]]


def extra_padding(head_dim: int) -> int:
    """Columns added by `padding`: a chunk, so that there is one more of them, and a bit of the next."""
    return chunk_size(head_dim) + 3


class Replayer:
    """One case on one runner. Each method in `REPLAYS` yields its checks, earliest layer and mark first."""

    def __init__(
        self, runner: Runner, case: ReferenceCase, bounds: Bounds, *, unit_of: ReferenceCase | None = None
    ) -> None:
        """
        Args:
            runner: what is tested.
            case: what it is tested with.
            bounds: the tolerances.
            unit_of: the case whose recorded logits set the unit of errors; default `case`, of which it is
                a part otherwise.
        """
        self.runner = runner
        self.case = case
        self._unit_of = unit_of
        self._on_call: Callable[[], None] = lambda: None
        layers = range(runner.spec.num_layers)
        self._logits_tolerance = bounds.logits
        self._state_tolerances = [bounds.state(layer) for layer in layers]
        self._padding_tolerances = {layer: bounds.padding(layer) for layer in (None, *layers)}
        self._state_index = {int(mark): s for s, mark in enumerate(case.state_marks)}
        self.length = int(case.input_ids.shape[1])
        self._logits = case.logits()
        self._states = [case.state(layer) for layer in range(runner.spec.num_layers)]
        # Not 0, which the record is padded with: were padding read, it should not go unnoticed.
        self._filler = runner.spec.vocab_size - 1
        self._whole: _Result | None = None
        self._known_bad: set[int] = set()
        """Rows whose first non-finite values this replay has traced already."""

    @cached_property
    def _scale(self) -> float:
        """The logits' unit, asked for once the record is known to be finite."""
        logits = self._logits if self._unit_of is None else self._unit_of.logits()
        return float(logits.astype(np.float64).std())

    def calls(self, replay: str) -> int:
        """How often `replay`, run next, calls the runner: for a progress bar."""
        whole = int(self._whole is None)
        case = self.case
        resumed = int((case.seq_lens - self._resume_at()).max())
        calls: dict[str, int] = {
            "prefill": 1,
            "pieces": sum(1 for _ in self._targets()) + 1,
            "steps": self.length + 1,
            "alone": case.batch + whole,
            "padding": 1 + whole,
            "resume": 1 + resumed,
        }
        return calls[replay]

    def skip_reason(self, replay: str) -> str | None:
        """Why `replay` is left out for this case; None if it is not."""
        if self.length <= WHOLE_TOKENS or replay in ("pieces", "steps"):
            return None
        return f"it would take {self.length} tokens in one call; pieces and steps replay this case"

    def run(self, replay: str, on_call: Callable[[], None] = lambda: None) -> Iterator[Check]:
        """The checks of one replay; `on_call` is called after each of the runner's calls."""
        self._on_call = on_call
        self._known_bad = set()
        return REPLAYS[replay](self)

    def bad_record(self) -> Check | None:
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

    # -- the replays -----------------------------------------------------------------------------------

    def prefill(self) -> Iterator[Check]:
        """The whole padded batch in one call."""
        case, runner = self.case, self.runner
        state = runner.new_state(case.batch)
        logits = yield from self._call("prefill", self._padded_ids(0), case.positions, case.seq_lens, state)
        if logits is None:
            return
        states = runner.export_state(state)
        yield from self._check_rows("prefill", logits, states)

    def pieces(self) -> Iterator[Check]:
        """Uneven pieces with carried state, and then a call without any token."""
        case, runner = self.case, self.runner
        state = runner.new_state(case.batch)
        done = np.zeros(case.batch, np.int64)
        before = runner.export_state(state)
        for mark, target in (*self._targets(), (None, case.seq_lens)):
            counts = target - done
            ids = self._slice_ids(done, counts, 3 if mark is None else int(counts.max()))
            logits = yield from self._call("pieces", ids, case.positions + done, counts, state)
            if logits is None:
                return
            states = runner.export_state(state)
            done = target
            for row in range(case.batch):
                if counts[row] == 0:
                    yield from self._check_kept("pieces", row, int(done[row]), states, before)
                if mark is not None and done[row] == case.marks[row, mark]:
                    # A row that had no token has no logits, but its state is still what was recorded.
                    vector = self._last_valid(logits, row, int(counts[row])) if counts[row] else None
                    yield from self._check_mark("pieces", row, mark, vector, states)
            before = states

    def steps(self) -> Iterator[Check]:
        """Token by token, shorter rows waiting with seq_lens 0."""
        case = self.case
        state = self.runner.new_state(case.batch)
        yield from self._step_on("steps", np.zeros(case.batch, np.int64), state)

    def alone(self) -> Iterator[Check]:
        """Each row by itself, against the record and against its place in the padded batch."""
        case, runner = self.case, self.runner
        whole = yield from self._whole_batch("alone")
        if whole is None:
            return
        for row in range(case.batch):
            length = int(case.seq_lens[row])
            state = runner.new_state(1)
            logits = yield from self._call(
                "alone",
                case.input_ids[row : row + 1, :length],
                case.positions[row : row + 1],
                case.seq_lens[row : row + 1],
                state,
                rows=[row],
            )
            if logits is None:
                return
            states = runner.export_state(state)
            yield from self._check_rows("alone", logits, states, rows=[row])
            vector = self._last_valid(logits, 0, length)
            yield from self._check_same("alone", row, vector, [s[0] for s in states], whole)

    def padding(self) -> Iterator[Check]:
        """The batch with more padding, against the record and against the narrower batch."""
        case, runner = self.case, self.runner
        whole = yield from self._whole_batch("padding")
        if whole is None:
            return
        state = runner.new_state(case.batch)
        ids = self._padded_ids(extra_padding(runner.spec.head_dim))
        logits = yield from self._call("padding", ids, case.positions, case.seq_lens, state)
        if logits is None:
            return
        states = runner.export_state(state)
        yield from self._check_rows("padding", logits, states)
        for row in range(case.batch):
            vector = self._last_valid(logits, row, int(case.seq_lens[row]))
            yield from self._check_same("padding", row, vector, [s[row] for s in states], whole)

    def resume(self) -> Iterator[Check]:
        """Prefill a part, take the state out and put it back, and go on in steps."""
        case, runner = self.case, self.runner
        cut = self._resume_at()
        state = runner.new_state(case.batch)
        ids = self._slice_ids(np.zeros_like(cut), cut, max(int(cut.max()), 1))
        logits = yield from self._call("resume", ids, case.positions, cut, state)
        if logits is None:
            return
        state = runner.import_state(runner.export_state(state))
        yield from self._step_on("resume", cut, state)

    # -- parts of them ---------------------------------------------------------------------------------

    def _targets(self) -> Iterator[tuple[int, IntArray]]:
        """Of each call of `pieces`: the mark it leads to, and each row's tokens [B] after it."""
        done: IntArray = np.zeros(self.case.batch, np.int64)
        for mark in range(self.case.marks.shape[1]):
            goal = self.case.marks[:, mark]
            while True:
                done = np.minimum(goal, done + PIECE_TOKENS)
                yield mark, done
                if (done == goal).all():
                    break

    def _resume_at(self) -> IntArray:
        lens = self.case.seq_lens
        return np.maximum(lens // 2, lens - RESUME_STEPS)

    def _step_on(self, replay: str, done: IntArray, state: State) -> Iterator[Check]:
        """Steps from `done` [B] tokens to each row's end; one more than any row needs."""
        case, runner = self.case, self.runner
        finished: dict[int, list[FloatArray]] = {}
        extra = 1 if replay == "steps" else 0
        for _ in range(int((case.seq_lens - done).max()) + extra):
            counts = (done < case.seq_lens).astype(np.int64)
            ids = self._slice_ids(done, counts, 1)
            logits = yield from self._call(replay, ids, case.positions + done, counts, state, step=True)
            if logits is None:
                return
            done = done + counts
            moved = [int(row) for row in np.flatnonzero(counts)]
            hits = [(row, mark) for row in moved for mark in self._marks_at(row, int(done[row]))]
            ended = [row for row in moved if done[row] == case.seq_lens[row]]
            wanted = bool(ended) or any(mark in self._state_index for _, mark in hits)
            states = runner.export_state(state) if wanted else None
            for row, mark in hits:
                yield from self._check_mark(replay, row, mark, logits[row, 0], states)
            for row in ended:
                assert states is not None
                finished[row] = [s[row].copy() for s in states]
        states = runner.export_state(state)
        for row, kept in finished.items():
            yield from self._check_kept(replay, row, int(done[row]), states, kept, rows_only=True)

    def _whole_batch(self, replay: str) -> Generator[Check, None, _Result | None]:
        """Run (once) the padded batch that `alone` and `padding` compare with; returns a `_Result`."""
        if self._whole is None:
            case, runner = self.case, self.runner
            state = runner.new_state(case.batch)
            ids = self._padded_ids(0)
            logits = yield from self._call(replay, ids, case.positions, case.seq_lens, state)
            if logits is None:
                return None
            states = runner.export_state(state)
            lens = case.seq_lens
            self._whole = _Result(
                [self._last_valid(logits, row, int(lens[row])).copy() for row in range(case.batch)],
                [[layer[row] for layer in states] for row in range(case.batch)],
            )
        return self._whole

    def _call(
        self,
        replay: str,
        ids: IntArray,
        positions: IntArray,
        counts: IntArray,
        state: State,
        *,
        step: bool = False,
        rows: list[int] | None = None,
    ) -> Generator[Check, None, FloatArray | None]:
        """Call the runner; a check of the logits' shape and finiteness. Returns them, None if misshapen.

        `rows`: the case's row that is run by itself; default all.
        """
        run = self.runner.step if step else self.runner.prefill
        logits = run(np.ascontiguousarray(ids), positions.copy(), counts.copy(), state)
        self._on_call()
        every = self.runner.all_logits and not step
        expected = (ids.shape[0], ids.shape[1] if every else 1, self.runner.spec.vocab_size)
        first = rows[0] if rows else 0
        done = positions - self.case.positions[rows if rows else slice(None)]
        if logits.shape != expected:
            reason = f"shape is {list(logits.shape)}, expected {list(expected)}"
            tokens = int(done[0] + counts[0])
            yield Check(self.case.name, replay, "logits", first, tokens, None, Comparison(False, reason))
            return None
        bad = [int(row) for row in np.flatnonzero(bad_rows(logits))]
        if not bad:
            tokens = int((done + counts).max())
            yield Check(self.case.name, replay, "finite", first, tokens, None, Comparison(True, ""))
            return logits
        # A NaN stays in the state, and so in all logits that follow: trace a row's first one only.
        new = [row for row in bad if first + row not in self._known_bad]
        self._known_bad |= {first + row for row in bad}
        index = new[0] if new else bad[0]
        states = self.runner.export_state(state) if new else None
        found = trace_not_finite(logits, states, index, int(done[index]), int(counts[index]))
        result = Comparison(False, found.reason)
        yield Check(self.case.name, replay, "finite", first + index, found.tokens, found.layer, result)
        return logits

    def _check_rows(
        self, replay: str, logits: FloatArray, states: list[FloatArray], rows: list[int] | None = None
    ) -> Iterator[Check]:
        """A whole run's last mark, and with all logits every mark. `rows`: the case's rows that were run."""
        for index, row in enumerate(range(self.case.batch) if rows is None else rows):
            marks = self.case.marks[row]
            if self.runner.all_logits:
                for mark in range(len(marks) - 1):
                    yield self._check_logits(replay, row, mark, logits[index, marks[mark] - 1])
            vector = self._last_valid(logits, index, int(marks[-1]))
            yield from self._check_mark(replay, row, len(marks) - 1, vector, states, index)

    def _check_mark(
        self,
        replay: str,
        row: int,
        mark: int,
        vector: FloatArray | None,
        states: list[FloatArray] | None,
        index: int | None = None,
    ) -> Iterator[Check]:
        """States (if recorded there), then logits, of one row at one mark; `index`: the row in `states`."""
        at = self._state_index.get(mark)
        if at is not None and states is not None:
            for layer, recorded in enumerate(self._states):
                got = states[layer][row if index is None else index]
                result = compare_state(got, recorded[row, at], self._state_tolerances[layer])
                tokens = int(self.case.marks[row, mark])
                yield Check(self.case.name, replay, "state", row, tokens, layer, result)
        if vector is not None:
            yield self._check_logits(replay, row, mark, vector)

    def _check_logits(self, replay: str, row: int, mark: int, vector: FloatArray) -> Check:
        result = compare_logits(vector, self._logits[row, mark], self._logits_tolerance, scale=self._scale)
        tokens = int(self.case.marks[row, mark])
        return Check(self.case.name, replay, "logits", row, tokens, None, result)

    def _check_same(
        self, replay: str, row: int, vector: FloatArray, states: list[FloatArray], whole: _Result
    ) -> Iterator[Check]:
        tokens = int(self.case.seq_lens[row])
        for layer, got in enumerate(states):
            result = compare_state(got, whole.states[row][layer], self._padding_tolerances[layer])
            yield Check(self.case.name, replay, "padding", row, tokens, layer, result)
        result = compare_logits(vector, whole.logits[row], self._padding_tolerances[None], scale=self._scale)
        yield Check(self.case.name, replay, "padding", row, tokens, None, result)

    def _check_kept(
        self,
        replay: str,
        row: int,
        tokens: int,
        states: list[FloatArray],
        before: list[FloatArray],
        *,
        rows_only: bool = False,
    ) -> Iterator[Check]:
        for layer, values in enumerate(states):
            old = before[layer] if rows_only else before[layer][row]
            result = compare_bits(values[row], old)
            yield Check(self.case.name, replay, "kept", row, tokens, layer, result)

    # -- tokens ----------------------------------------------------------------------------------------

    def _marks_at(self, row: int, tokens: int) -> list[int]:
        """Marks of a short row may coincide."""
        return [int(mark) for mark in np.flatnonzero(self.case.marks[row] == tokens)]

    def _last_valid(self, logits: FloatArray, row: int, count: int) -> FloatArray:
        place = max(count - 1, 0) if self.runner.all_logits else 0
        vector: FloatArray = logits[row, place]
        return vector

    def _padded_ids(self, extra: int) -> IntArray:
        """The case's tokens with `extra` more columns; with any, all padding is the filler token."""
        if not extra:
            return self.case.input_ids
        zeros = np.zeros(self.case.batch, np.int64)
        return self._slice_ids(zeros, self.case.seq_lens, self.length + extra)

    def _slice_ids(self, start: IntArray, counts: IntArray, width: int) -> IntArray:
        """Each row's tokens start..start+count, right padded with the filler to `width` columns."""
        ids: npt.NDArray[np.int64] = np.full((self.case.batch, max(width, 1)), self._filler, np.int64)
        for row, (first, count) in enumerate(zip(start, counts, strict=True)):
            ids[row, :count] = self.case.input_ids[row, first : first + count]
        return ids


REPLAYS: dict[str, Replay] = {
    "prefill": Replayer.prefill,
    "pieces": Replayer.pieces,
    "steps": Replayer.steps,
    "alone": Replayer.alone,
    "padding": Replayer.padding,
    "resume": Replayer.resume,
}
"""Name -> the replay, in the order in which they run."""
