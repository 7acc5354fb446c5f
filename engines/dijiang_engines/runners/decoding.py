"""Decoding on the device: what a runner may offer beside the Runner protocol.

A runner that `Decodes` chooses tokens where the logits are and feeds them to the next step itself, so that a
token costs the host no more than reading one number per row. The decode loop uses it when it is there;
without it, logits come to the host and are sampled there. Both choose the same tokens but where rounding
decides (plugins/include/dijiang/sampling.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dijiang_engines.runners.base import IntArray, State
from dijiang_engines.sampling import SamplingOptions


@dataclass(frozen=True)
class DecodeRequest:
    """Where B rows stand, and how they shall go on."""

    tokens: IntArray
    """[B], each row's last token, which the state has not read yet."""
    positions: IntArray
    """[B], tokens in the state."""
    remaining: IntArray
    """[B], how many more tokens each row may get; 0: the row has ended and keeps its state."""
    sampling: SamplingOptions
    seed: int
    streams: IntArray
    """[B], each row's stream of random numbers."""
    draws: IntArray
    """[B], index of the next random number of each."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a row."""
    banned: IntArray | None = None
    """Ids that are never chosen."""
    seen: npt.NDArray[np.bool_] | None = None
    """[B, V], tokens that the repetition penalty applies to; not changed."""
    ahead: bool = True
    """The next step may begin before the last one's tokens were looked at. False if the host ends rows for
    reasons of its own (stop strings)."""


class Decoder(Protocol):
    """A running decode loop over one state."""

    def next(self) -> IntArray:
        """Read each unfinished row's last token and choose the next: [B], meaningless for finished rows.

        Raises:
            RunnerError: the logits of an unfinished row are not finite.
        """
        ...

    def stop_row(self, row: int) -> None:
        """End a row now: its state is not changed any more. Only with `ahead` False."""
        ...

    def close(self) -> None:
        """Wait until nothing of it runs any more."""
        ...


@runtime_checkable
class Decodes(Protocol):
    """Has a decode loop of its own."""

    def start_decoding(self, state: State, request: DecodeRequest) -> Decoder | None:
        """Choose tokens on the device from here on; `state` is the loop's until it is closed. None if the
        runner finds that it cannot here: logits come to the host then.

        Raises:
            RunnerError, PositionError: the request does not fit the state, the model or the runner.
        """
        ...
