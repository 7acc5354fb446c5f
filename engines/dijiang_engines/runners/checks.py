"""What every runner checks before it calls its runtime, all of it: all refuse the same, in the same words.

What is wrong with a call is a `RunnerError`; a sequence that grows too long is its subclass `PositionError`.
A runner hands over its own state class; what is in a state is its own business.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import PositionError, RunnerError
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners.base import MAX_POSITIONS, IntArray, LimitsBatch, LimitsPositions, Runner
from dijiang_engines.runners.decoding import DecodeRequest
from dijiang_engines.spec import ModelSpec

_LIMITS: weakref.WeakKeyDictionary[Runner, int] = weakref.WeakKeyDictionary()
"""What `last_position` found: asking a protocol takes longer than all other checks of a step."""
_FEW = 64
"""Values up to which Python finds the least and the greatest sooner than NumPy, which takes microseconds."""


def check_call(
    runner: Runner,
    input_ids: Any,
    positions: Any,
    seq_lens: Any,
    batch: int,
    *,
    step: bool = False,
) -> tuple[IntArray, IntArray, IntArray]:
    """The arguments of a prefill or step as int64 arrays, once they are known to be right.

    Args:
        runner: who is called.
        input_ids: [B, L] whole numbers.
        positions: [B].
        seq_lens: [B].
        batch: rows of the state, B.
        step: the call is a step: L must be 1.

    Raises:
        RunnerError: values that are no whole numbers, shapes that do not fit each other or the state, a
            length outside 0..L, or a token id that the model does not have.
        PositionError: a row would run past the last position of the model, or past the last that the
            runner computes right.
    """
    ids = _whole("input_ids", input_ids)
    starts = _whole("positions", positions)
    lens = _whole("seq_lens", seq_lens)
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
    if step and ids.shape[1] != 1:
        raise RunnerError(
            "a step takes one token a row", got=f"input_ids {list(ids.shape)}", expected=f"[{batch}, 1]"
        )
    length = ids.shape[1]
    least, most = _extremes(lens)
    if least < 0 or most > length:
        raise RunnerError("seq_lens out of range", got=lens.tolist(), expected=f"0 to {length}")
    if _extremes(starts)[0] < 0:
        raise RunnerError("positions must not be negative", got=starts.tolist())
    _check_vocabulary(ids, runner.spec.vocab_size)
    _check_ends(runner, starts, lens)
    _check_padding(starts, length, chunk_size(runner.spec.head_dim))
    return ids, starts, lens


def check_decoding(runner: Runner, request: DecodeRequest, batch: int) -> None:
    """Before a decode loop of the runner's own: the rows' last tokens, and room for all that may follow.

    Raises:
        RunnerError, PositionError: as `check_call`.
    """
    tokens = _whole("tokens", request.tokens)
    remaining = _whole("remaining", request.remaining)
    _, starts, lens = check_call(
        runner, tokens.reshape(-1, 1), request.positions, np.sign(remaining), batch, step=True
    )
    _check_ends(runner, starts, np.maximum(remaining, lens))


def check_batch(runner: Runner, batch: int) -> None:
    """How many sequences a new state shall hold.

    Raises:
        RunnerError: none, not a number, or more than the runner was made for, if it `LimitsBatch`.
    """
    if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)) or batch < 1:
        raise RunnerError("a state needs at least one sequence", got=batch)
    if isinstance(runner, LimitsBatch) and batch > runner.max_batch:
        raise RunnerError(
            "the engine was not built for so many sequences at once",
            got=batch, expected=f"at most {runner.max_batch}",
            hint=f"fewer at once (--batch {runner.max_batch}), or build with --max-batch {batch}",
        )  # fmt: skip


def check_owner(runner: Runner, state: Any, kind: type[Any]) -> None:
    """A state is `kind`, the runner's class of states, and this runner made it.

    Raises:
        RunnerError: it is not.
    """
    if not isinstance(state, kind) or state.owner is not runner:
        raise RunnerError(
            "a state belongs to the runner that made it",
            got=None if isinstance(state, kind) else type(state).__name__,
            hint="carry it over with export_state and import_state",
        )


def check_rows(rows: Sequence[int], batch: int) -> list[int]:
    """Rows of a state, each 0..B-1.

    Raises:
        RunnerError: a row that the state does not have.
    """
    found = _whole("rows", list(rows)).tolist() if len(rows) else []
    for row in found:
        if not 0 <= row < batch:
            raise RunnerError("there is no such row", got=row, expected=f"0 to {batch - 1}")
    return found


def check_row_layers(
    spec: ModelSpec, rows: Sequence[int], batch: int, layers: Sequence[Any]
) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
    """What `Runner.put_rows` is given: rows, each once, and one float32 array [n, H, d, d] a layer.

    Raises:
        RunnerError: as there.
    """
    arrays, found = check_layers(spec, layers), check_places(rows, batch)
    if arrays[0].shape[0] != len(found):
        raise RunnerError(
            "the rows' states are not as many as the rows", got=arrays[0].shape[0], expected=len(found)
        )
    return found, arrays


def check_copy(
    runner: Runner, kind: type[Any], source: Any, rows: Sequence[int], target: Any, places: Sequence[int]
) -> list[tuple[int, int]]:
    """What `Runner.copy_rows` is given, as pairs of a row and its place.

    Raises:
        RunnerError: as there.
    """
    check_owner(runner, source, kind)
    check_owner(runner, target, kind)
    if source is target:
        raise RunnerError("rows are copied from one state to another, and these are the same")
    found, ends = check_rows(rows, source.batch), check_places(places, target.batch)
    if len(found) != len(ends):
        raise RunnerError("the rows are not as many as their places", got=len(found), expected=len(ends))
    return list(zip(found, ends, strict=True))


def check_places(rows: Sequence[int], batch: int) -> list[int]:
    """Rows of a state that will be written, each 0..B-1 and once.

    Raises:
        RunnerError: one that the state does not have, or one that is named twice.
    """
    found = check_rows(rows, batch)
    if len(set(found)) != len(found):
        raise RunnerError("a row is named twice", got=found)
    return found


def check_layers(spec: ModelSpec, layers: Sequence[Any]) -> list[npt.NDArray[np.float32]]:
    """A state to import as contiguous float32 arrays [B, H, d, d], one a layer.

    Raises:
        RunnerError: another number of layers, or another shape than the model's.
    """
    arrays = [np.asarray(layer) for layer in layers]
    batches = {array.shape[:1] for array in arrays}
    if (
        len(arrays) != spec.num_layers
        or {array.shape[1:] for array in arrays} != {spec.state_shape}
        or len(batches) != 1
        or (0,) in batches
        or any(array.dtype.kind != "f" for array in arrays)
    ):
        shapes = sorted({f"{array.dtype} {list(array.shape)}" for array in arrays})
        raise RunnerError(
            "the state to import does not fit the model: it has another shape than the model's",
            got=f"{len(arrays)} layers of {', '.join(shapes[:2]) or 'nothing'}",
            expected=f"{spec.num_layers} layers of float32 {['B', *spec.state_shape]}",
        )
    return [np.ascontiguousarray(array, np.float32) for array in arrays]


def last_position(runner: Runner) -> int:
    """Most tokens that a sequence may hold: by the model, and by what the runner computes right."""
    try:
        return _LIMITS[runner]
    except KeyError:
        most = _LIMITS[runner] = _limit(runner)
        return most
    except TypeError:  # a runner that cannot be a key
        return _limit(runner)


def _limit(runner: Runner) -> int:
    limits = [MAX_POSITIONS]
    if runner.spec.max_positions is not None:
        limits.append(runner.spec.max_positions)
    if isinstance(runner, LimitsPositions):
        limits.append(runner.max_positions)
    return min(limits)


def position_error(
    spec: ModelSpec, row: int, tokens: int, hint: str | None = None, most: int | None = None
) -> PositionError:
    """The error for a row that would hold `tokens` tokens, too many for the model or for the runner.

    Args:
        spec: the model.
        row: which row.
        tokens: how many it would hold.
        hint: what to do; default: what helps with this limit.
        most: the runner's limit, `last_position`; what counts where the model has no limit of its own.
    """
    if spec.max_positions is None or (most is not None and most < spec.max_positions):
        return PositionError(
            f"row {row} would run past the last position that this runner computes right",
            got=f"{tokens} tokens",
            expected=f"at most {MAX_POSITIONS if most is None else most}",
            hint=hint or "begin a new sequence: positions count from its start",
        )
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


def _check_vocabulary(ids: IntArray, vocab: int) -> None:
    least, most = _extremes(ids)
    if least < 0 or most >= vocab:
        row, column = np.argwhere((ids < 0) | (ids >= vocab))[0]
        raise RunnerError(
            f"row {row} holds a token id that the model does not have",
            got=int(ids[row, column]),
            expected=f"0 to {vocab - 1}",
            hint="the tokenizer belongs to another model",
        )


def _check_ends(runner: Runner, starts: IntArray, lens: IntArray) -> None:
    most = last_position(runner)
    ends = [start + count for start, count in zip(starts.tolist(), lens.tolist(), strict=True)]
    if (end := max(ends)) > most:  # as Python's numbers: the sum might not fit an int64
        raise position_error(runner.spec, ends.index(end), end, most=most)


def _check_padding(starts: IntArray, length: int, chunk: int) -> None:
    """Padding has positions too, which a graph casts to int32: past its end they would be negative.

    A prefill graph pads a call of more tokens than a chunk to whole chunks.
    """
    width = length if length <= chunk else -(-length // chunk) * chunk
    last = _extremes(starts)[1]
    if last + width > 2**31:
        row = starts.tolist().index(last)
        raise PositionError(
            f"row {row}, with its padding, would run past the last position that a graph can count",
            got=f"{length} tokens from position {last} on", expected=f"at most {MAX_POSITIONS}",
            hint="make the call's input_ids no wider than its longest row",
        )  # fmt: skip


def _extremes(array: IntArray) -> tuple[int, int]:
    """The least and the greatest value of an array that has some."""
    if array.size > _FEW:
        return int(array.min()), int(array.max())
    values = array.ravel().tolist()
    return min(values), max(values)


def _whole(name: str, values: Any) -> IntArray:
    """`values` as int64; nothing is rounded, cut or wrapped."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:  # rows of unequal length
        raise RunnerError(f"{name} is not an array", got=" ".join(str(error).split())[:200]) from error
    fits = array.dtype.kind == "i" or (
        array.dtype.kind == "u" and (array.size == 0 or int(array.max()) < 2**63)
    )
    if not fits:
        raise RunnerError(f"{name} must be whole numbers", got=str(array.dtype), expected="int64")
    return array.astype(np.int64, copy=False)
