"""The case `embedding`: every row of the embedding goes through the runner once in each graph.

Short rows of tokens, each token once, from an empty state. What is compared is the sum over the features of
the first layers' states after each row: since a feature map sums to one, that is the decayed sum of the
values, Σ exp(Σ log_decay) · gain · v, to which each of the row's tokens contributes a share that can be
seen. So a wrong embedding row is found, and the record needs neither all layers nor logits nor whole
states.

    prefill   rows of tokens, many at a time
    steps     the same, token by token
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dijiang_engines.formats.reference_cases import EMBEDDING, EmbeddingCase
from dijiang_engines.runners.base import FloatArray, LimitsBatch, Runner, State
from dijiang_engines.validation.check import Check, bad_rows, trace_not_finite
from dijiang_engines.validation.compare import Comparison, compare_state
from dijiang_engines.validation.tolerances import Bounds

STATE_BYTES = 64 << 20
"""Most bytes of states, all layers together, of the rows that run at a time."""
LOGITS_BYTES = 64 << 20
"""Most bytes of logits of one call, where a bundle gives those of every token."""
MOST_ROWS = 64
"""At a time: matrices are long enough then."""
REPLAYS = ("prefill", "steps")


class EmbeddingReplayer:
    """As `RowsReplayer`, for this case.

    Args:
        runner: what is tested.
        case: what it is tested with.
        bounds: the tolerances.
    """

    def __init__(self, runner: Runner, case: EmbeddingCase, bounds: Bounds) -> None:
        self.runner, self.case, self.bounds = runner, case, bounds
        spec = runner.spec
        tokens = case.input_ids.shape[1] if runner.all_logits else 1
        most = min(
            MOST_ROWS,
            runner.max_batch if isinstance(runner, LimitsBatch) else MOST_ROWS,
            STATE_BYTES // spec.state_bytes,
            LOGITS_BYTES // (4 * spec.vocab_size * tokens),
        )
        size = max(1, most)
        rows = len(case.seq_lens)
        self._groups = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        self._values = [case.values(layer) for layer in range(case.layers)]

    def bad_record(self) -> Check | None:
        """A failed check if the record holds NaN or infinity."""
        for layer, values in enumerate(self._values):
            bad = bad_rows(values)
            if bad.any():
                row = int(bad.argmax())
                shown = Comparison(False, "the recorded values are not finite")
                return Check(
                    EMBEDDING, "record", "reference", row, int(self.case.seq_lens[row]), layer, shown
                )
        return None

    def skip_reason(self, replay: str) -> str | None:
        """Why `replay` is left out; None if it is not."""
        return None if replay in REPLAYS else "it shows whether embeddings are right; prefill and steps do"

    def calls(self, replay: str) -> int:
        """How often `replay` calls the runner."""
        if replay == "prefill":
            return len(self._groups)
        return sum(int(self.case.seq_lens[rows].max()) for rows in self._groups)

    def run(self, replay: str, on_call: Callable[[], None] = lambda: None) -> Iterator[Check]:
        """The checks of one replay, row after row."""
        for rows in self._groups:
            state = self.runner.new_state(rows.stop - rows.start)
            read = self._prefill if replay == "prefill" else self._step
            yield from read(rows, state, on_call)
            states = self.runner.export_state(state)
            for index, row in enumerate(range(rows.start, rows.stop)):
                for layer, recorded in enumerate(self._values):
                    got = states[layer][index].sum(-2, dtype=np.float32)
                    yield self._check(replay, row, layer, got, recorded[row])

    def _prefill(self, rows: slice, state: State, on_call: Callable[[], None]) -> Iterator[Check]:
        case = self.case
        ids, lens = case.input_ids[rows], case.seq_lens[rows]
        logits = self.runner.prefill(ids.copy(), case.positions[rows].copy(), lens.copy(), state)
        on_call()
        yield self._finite("prefill", rows, logits, state, np.zeros_like(lens), lens)

    def _step(self, rows: slice, state: State, on_call: Callable[[], None]) -> Iterator[Check]:
        case = self.case
        lens = case.seq_lens[rows]
        for done in range(int(lens.max())):
            counts = (lens > done).astype(np.int64)
            at = np.minimum(lens, done)
            ids = np.ascontiguousarray(case.input_ids[rows, done : done + 1])
            logits = self.runner.step(ids, case.positions[rows] + at, counts.copy(), state)
            on_call()
            yield self._finite("steps", rows, logits, state, at, counts)

    def _finite(
        self,
        replay: str,
        rows: slice,
        logits: FloatArray,
        state: State,
        done: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
    ) -> Check:
        bad = bad_rows(logits)
        index = int(bad.argmax())
        row, tokens = rows.start + index, int(done[index] + counts[index])
        if not bad.any():
            return Check(EMBEDDING, replay, "finite", row, tokens, None, Comparison(True, ""))
        states = self.runner.export_state(state)
        found = trace_not_finite(logits, states, index, int(done[index]), int(counts[index]))
        shown = Comparison(False, found.reason)
        return Check(EMBEDDING, replay, "finite", row, found.tokens, found.layer, shown)

    def _check(
        self, replay: str, row: int, layer: int, got: FloatArray, recorded: npt.NDArray[np.float32]
    ) -> Check:
        """[H, d] against [H, d]: each head in units of its own largest value, as states are."""
        result = compare_state(got[:, None], recorded[:, None], self.bounds.state(layer))
        tokens = int(self.case.seq_lens[row])
        if not result.passed:
            ids = ", ".join(str(int(i)) for i in self.case.input_ids[row, :tokens])
            result = replace(result, reason=f"{result.reason}; the row's tokens: {ids}")
        return Check(EMBEDDING, replay, "state", row, tokens, layer, result)
