"""What every runner checks before it calls its runtime."""

from __future__ import annotations

import numpy as np

from dijiang_engines.errors import PositionError, RunnerError
from dijiang_engines.runners.base import IntArray, Runner
from dijiang_engines.spec import ModelSpec


def check_call(
    runner: Runner, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, batch: int
) -> tuple[IntArray, IntArray, IntArray]:
    """The arguments of a prefill or step as int64 arrays, once they are known to be right.

    Raises:
        RunnerError: shapes that do not fit each other or the state, a length outside 0..L, or a token id
            that the model does not have.
        PositionError: a row would run past the last position.
    """
    ids, starts, lens = (np.asarray(array, dtype=np.int64) for array in (input_ids, positions, seq_lens))
    if (
        ids.ndim != 2
        or ids.shape[0] != batch
        or ids.shape[1] < 1
        or starts.shape != (batch,)
        or lens.shape != (batch,)
    ):
        raise RunnerError(
            "the call's arrays do not fit the state",
            got=f"input_ids {list(ids.shape)}, positions {list(starts.shape)}, seq_lens {list(lens.shape)}",
            expected=f"[{batch}, L], [{batch}], [{batch}]",
        )
    if lens.min() < 0 or lens.max() > ids.shape[1]:
        raise RunnerError("seq_lens out of range", got=lens.tolist(), expected=f"0 to {ids.shape[1]}")
    if starts.min() < 0:
        raise RunnerError("positions must not be negative", got=starts.tolist())
    spec = runner.spec
    if ids.min() < 0 or ids.max() >= spec.vocab_size:
        row, column = np.argwhere((ids < 0) | (ids >= spec.vocab_size))[0]
        raise RunnerError(
            f"row {row} holds a token id that the model does not have",
            got=int(ids[row, column]),
            expected=f"0 to {spec.vocab_size - 1}",
            hint="the tokenizer belongs to another model",
        )
    limit = spec.max_positions
    if limit is not None:
        ends = starts + lens
        if ends.max() > limit:
            row = int(ends.argmax())
            raise position_error(spec, row, int(ends[row]))
    return ids, starts, lens


def position_error(spec: ModelSpec, row: int, tokens: int, hint: str | None = None) -> PositionError:
    """The error for a row that would hold `tokens` tokens, more than `spec.max_positions`."""
    by_decay = spec.decay == "tables" and not spec.decay_extended and spec.decay_rows == spec.max_positions
    what = "trained decay tables" if by_decay else "learned position embeddings"
    if hint is None:
        hint = "export again with `--extend-decay`" if by_decay else "use a shorter text"
    return PositionError(
        f"row {row} would run past the last position that the model knows",
        got=f"{tokens} tokens",
        expected=f"at most {spec.max_positions}, the length of its {what}",
        hint=hint,
    )
