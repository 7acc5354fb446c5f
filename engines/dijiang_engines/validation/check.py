"""What a replay yields: one `Check` for each compared array, and how non-finite values are traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dijiang_engines.runners.base import FloatArray
from dijiang_engines.validation.compare import Comparison

Quantity = Literal["reference", "state", "logits", "finite", "kept", "padding"]

_WORDS: dict[Quantity, str] = {
    "state": "the state",
    "logits": "the logits",
    "finite": "NaN or infinity in the logits",
    "kept": "the kept state",
    "padding": "the result with other padding",
    "reference": "the record",
}


@dataclass(frozen=True)
class Check:
    """One compared array."""

    case: str
    replay: str
    quantity: Quantity
    """state and logits: against the record. finite: logits of padded places and empty rows too.
    kept: a finished row's state against itself. padding: against the same row padded otherwise.
    reference: the record itself."""
    row: int
    tokens: int
    """How many of the row's tokens had been consumed."""
    layer: int | None
    """For states."""
    comparison: Comparison

    @property
    def place(self) -> str:
        """Where this was, in words."""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        if layer and self.quantity == "finite":
            layer = f" and in the state{layer}"
        return (
            f"{_WORDS[self.quantity]}{layer}, row {self.row} after {self.tokens} tokens "
            f"({self.case}, {self.replay})"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "case": self.case,
            "replay": self.replay,
            "quantity": self.quantity,
            "row": self.row,
            "tokens": self.tokens,
            "layer": self.layer,
            **self.comparison.to_json(),
        }


def bad_rows(array: FloatArray) -> npt.NDArray[np.bool_]:
    """[B, ...] -> [B]: which rows hold NaN or infinity."""
    return np.asarray([not np.isfinite(row).all() for row in array], np.bool_)


@dataclass(frozen=True)
class NotFinite:
    """Where non-finite logits of one row came from, as far as can be seen from outside."""

    tokens: int
    """Of the row, up to and with the first bad one if that can be told, else up to the end of the call."""
    layer: int | None
    """The first whose state of the row is not finite either."""
    reason: str
    """What was seen, in words."""


def trace_not_finite(
    logits: FloatArray, states: list[FloatArray] | None, row: int, done: int, count: int
) -> NotFinite:
    """Trace non-finite logits of one row to a token and a layer.

    A layer's state is made from what the layers before it computed, so the first bad one says where it began.

    Args:
        logits: [B, 1, V] of each row's last token, or [B, L, V] of all; something in `row` is not finite.
        states: one [B, H, d, d] a layer, after the call; None if another call was traced before.
        row: which row.
        done: tokens of the row that had been consumed before the call.
        count: tokens of the row in the call.
    """
    finite = np.isfinite(logits)
    reason = f"{int((~finite).sum())} of {finite.size} logits are not finite"
    tokens = done + count
    first = int((~finite[row].all(-1)).argmax())
    if logits.shape[1] > 1 and first < count:
        tokens = done + first + 1
    elif count == 0:
        return NotFinite(tokens, None, f"{reason}; the row had no token in this call")
    elif logits.shape[1] > 1:
        return NotFinite(tokens, None, f"{reason}; this row's are in padded places only")
    elif count > 1:
        reason += f"; the call took the row's tokens {done} to {tokens - 1}"
    if states is None:
        return NotFinite(tokens, None, reason)
    layer = next((i for i, values in enumerate(states) if not np.isfinite(values[row]).all()), None)
    if layer is None:
        reason += "; the states of all layers are finite, so it began behind the last one"
    else:
        reason += f", nor is the state of layer {layer}"
        if layer:
            reason += f", while that of layer {layer - 1} is: it began between the two"
    return NotFinite(tokens, layer, reason)
