"""The Runner protocol: what a runtime must do so that generate, validate and bench can use it.

A runner owns two graphs (prefill, any L; step, L = 1) and hands out states. A state belongs to the
runner that made it and stays where the runtime wants it (host memory, GPU memory); `export_state` and
`import_state` are the only ways across. All arrays at this interface are NumPy.

What a runtime may offer beyond that are the protocols that follow `Runner` here, and `decoding.Decodes`.
Each is asked for with `isinstance`, and whoever asks does without it where it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dijiang_engines.spec import ModelSpec

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

MAX_POSITIONS = 2**31 - 128
"""Most tokens of a sequence, whatever runs it. The graphs count positions in int32, and a prefill pads a
row's last chunk, of up to 128 tokens, whose positions must still be counted. Up to there the graphs' angles
are right: they are reduced in float64 (docs/op-contract.md, "Positions")."""

State = Any
"""A runner's own recurrent state for a batch; opaque to callers."""


@runtime_checkable
class Runner(Protocol):
    """One loaded model on one runtime."""

    name: str
    """For tables and --runner: "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"."""
    spec: ModelSpec
    all_logits: bool
    """True if `prefill` returns logits of every token rather than of each row's last valid one."""

    def new_state(self, batch: int) -> State:
        """A zeroed state for `batch` sequences."""
        ...

    def prefill(
        self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: State
    ) -> FloatArray:
        """Consume up to L tokens a row and update `state` in place.

        Args:
            input_ids: [B, L] int64; right padding holds any id below vocab_size.
            positions: [B] int64, tokens already in each row's state.
            seq_lens: [B] int64, valid tokens of each row in this call, 0..L.
            state: made by this runner for B rows.

        Returns:
            Logits float32 [B, 1, V] of each row's last valid token, or [B, L, V] if `all_logits`.
            Rows without a valid token: finite, unspecified.

        Raises:
            RunnerError: arguments that are wrong (checks.check_call says which).
            PositionError: positions + seq_lens exceeds spec.max_positions, or what the runner computes
                right: MAX_POSITIONS, or its own limit if it `LimitsPositions`.
        """
        ...

    def step(self, input_ids: IntArray, positions: IntArray, seq_lens: IntArray, state: State) -> FloatArray:
        """`prefill` for L = 1, through the graph made for it. Returns [B, 1, V]."""
        ...

    def export_state(self, state: State) -> list[FloatArray]:
        """Copies of the state, one [B, H, d, d] float32 array per layer."""
        ...

    def import_state(self, layers: list[FloatArray]) -> State:
        """A state that holds copies of `layers` (the inverse of `export_state`)."""
        ...

    def reset_rows(self, state: State, rows: Sequence[int]) -> None:
        """Zero these rows of `state` in place, so that new sequences can start in them; others are untouched.

        Args:
            state: made by this runner for B rows.
            rows: each 0..B-1, in any order; none does nothing.

        Raises:
            RunnerError: a row that the state does not have; nothing was changed.
        """
        ...

    def get_rows(self, state: State, rows: Sequence[int]) -> list[FloatArray]:
        """Copies of these rows, on the host: one [n, H, d, d] float32 array per layer.

        Args:
            state: made by this runner for B rows.
            rows: n of them, each 0..B-1, in any order.

        Raises:
            RunnerError: a row that the state does not have.
        """
        ...

    def put_rows(self, state: State, rows: Sequence[int], layers: list[FloatArray]) -> None:
        """Copy `layers`, as `get_rows` returns them, into these rows of `state`; others are untouched.

        Raises:
            RunnerError: a row that the state does not have, or that is named twice; other shapes than the
                model's. Nothing was changed.
        """
        ...

    def copy_rows(self, source: State, rows: Sequence[int], target: State, places: Sequence[int]) -> None:
        """Copy rows of one state into rows of another, where they are; other rows are untouched.

        Args:
            source: made by this runner.
            rows: n of its rows; one may be named several times.
            target: made by this runner, and another state than `source`.
            places: n of its rows, each once: `rows[i]` is copied into `places[i]`.

        Raises:
            RunnerError: rows that a state does not have, lists of unequal length, a place that is named
                twice, or the same state twice. Nothing was changed.
        """
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """Loads what a call needs before the call."""

    def warm_up(self, prefill: bool = True, step: bool = True) -> None:
        """Load now what prefills, or steps, would load on first use."""
        ...


@runtime_checkable
class LimitsBatch(Protocol):
    """Was made for so many sequences at once."""

    max_batch: int
    """Most rows of a state."""


@runtime_checkable
class LimitsPositions(Protocol):
    """Computes fewer positions right than the model has."""

    max_positions: int
    """Most tokens of a sequence."""


@runtime_checkable
class TimesSteps(Protocol):
    """Can ask the device how long a step takes it."""

    def step_gpu_seconds(self, batch: int, position: int, calls: int) -> list[float]:
        """Seconds of `calls` single steps of `batch` rows from `position` on, by the device's own events."""
        ...


@runtime_checkable
class CountsMemory(Protocol):
    """Knows what it takes of the device's memory."""

    def memory(self) -> dict[str, int]:
        """Bytes by kind: weights, activations, state, ..."""
        ...


@runtime_checkable
class HasNotes(Protocol):
    """Has something to tell whoever runs the model here."""

    def notes(self) -> list[str]:
        """A line each; none if all is as it should be."""
        ...


@runtime_checkable
class RemembersValidation(Protocol):
    """Keeps that the recorded cases passed on this device."""

    def remember_validation(self) -> None:
        """They all did."""
        ...


@runtime_checkable
class HasSettings(Protocol):
    """Says how it was set up, for records of what was measured."""

    def settings(self) -> dict[str, str | int | bool]:
        """Option -> the value in force, defaults resolved."""
        ...
