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

import numpy as np
import numpy.typing as npt

from dijiang_engines.formats.reference_cases import ReferenceCase
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners.base import FloatArray, IntArray, Runner, State
from dijiang_engines.validation.check import Check, bad_rows, trace_not_finite
from dijiang_engines.validation.compare import Comparison
from dijiang_engines.validation.record import CaseRecord, RunResult
from dijiang_engines.validation.tolerances import Bounds

RESUME_STEPS = 32
"""At most this many tokens of each row go through the step graph in `resume`."""
PIECE_TOKENS = 512
"""At most this many tokens of a row in one call of `pieces`; marks may lie further apart."""
WHOLE_TOKENS = 1024
"""A longer case goes only through `pieces` and `steps`: one call with all its tokens would need memory, and
from an engine a profile, that nobody builds with, and would test what shorter cases test."""


Replay = Callable[["Replayer"], Iterator[Check]]


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
        self.record = CaseRecord(
            case, bounds, layers=runner.spec.num_layers, all_logits=runner.all_logits, unit_of=unit_of
        )
        self._on_call: Callable[[], None] = lambda: None
        self.length = int(case.input_ids.shape[1])
        # Not 0, which the record is padded with: were padding read, it should not go unnoticed.
        self._filler = runner.spec.vocab_size - 1
        self._whole: RunResult | None = None
        self._known_bad: set[int] = set()
        """Rows whose first non-finite values this replay has traced already."""

    def bad_record(self) -> Check | None:
        """A failed check if the record holds NaN or infinity: then nothing can be compared with it."""
        return self.record.not_finite()

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

    # -- the replays -----------------------------------------------------------------------------------

    def prefill(self) -> Iterator[Check]:
        """The whole padded batch in one call."""
        case, runner = self.case, self.runner
        state = runner.new_state(case.batch)
        logits = yield from self._call("prefill", self._padded_ids(0), case.positions, case.seq_lens, state)
        if logits is None:
            return
        states = runner.export_state(state)
        yield from self.record.whole_run("prefill", logits, states)

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
                    yield from self.record.kept("pieces", row, int(done[row]), states, before)
                if mark is not None and done[row] == case.marks[row, mark]:
                    # A row that had no token has no logits, but its state is still what was recorded.
                    vector = self.record.last_valid(logits, row, int(counts[row])) if counts[row] else None
                    yield from self.record.at_mark("pieces", row, mark, vector, states)
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
            yield from self.record.whole_run("alone", logits, states, rows=[row])
            vector = self.record.last_valid(logits, 0, length)
            yield from self.record.other_padding("alone", row, vector, [s[0] for s in states], whole)

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
        yield from self.record.whole_run("padding", logits, states)
        for row in range(case.batch):
            vector = self.record.last_valid(logits, row, int(case.seq_lens[row]))
            yield from self.record.other_padding("padding", row, vector, [s[row] for s in states], whole)

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
            hits = [(row, mark) for row in moved for mark in self.record.marks_at(row, int(done[row]))]
            ended = [row for row in moved if done[row] == case.seq_lens[row]]
            wanted = bool(ended) or any(mark in self.record.state_index for _, mark in hits)
            states = runner.export_state(state) if wanted else None
            for row, mark in hits:
                yield from self.record.at_mark(replay, row, mark, logits[row, 0], states)
            for row in ended:
                assert states is not None
                finished[row] = [s[row].copy() for s in states]
        states = runner.export_state(state)
        for row, kept in finished.items():
            yield from self.record.kept(replay, row, int(done[row]), states, kept, rows_only=True)

    def _whole_batch(self, replay: str) -> Generator[Check, None, RunResult | None]:
        """Run (once) the padded batch that `alone` and `padding` compare with; returns a `RunResult`."""
        if self._whole is None:
            case, runner = self.case, self.runner
            state = runner.new_state(case.batch)
            ids = self._padded_ids(0)
            logits = yield from self._call(replay, ids, case.positions, case.seq_lens, state)
            if logits is None:
                return None
            states = runner.export_state(state)
            lens = case.seq_lens
            self._whole = RunResult(
                [self.record.last_valid(logits, row, int(lens[row])).copy() for row in range(case.batch)],
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

    # -- tokens ----------------------------------------------------------------------------------------

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
