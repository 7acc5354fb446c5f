"""Streams cut into windows, each of which is read from an empty state.

Of a stream of n tokens the first n - 1 are read and the last n - 1 predicted. Windows of W tokens that begin
every S tokens (the stride) read

    0 .. W,  S .. S + W,  2S .. 2S + W,  ...

up to the end, the last one perhaps fewer. Each prediction is counted in the first window that makes it, so
that each is counted once, and all but those of the first window have W - S tokens of context or more. S = W
leaves no overlap: a window's first prediction then follows one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dijiang_engines.errors import UsageError


@dataclass(frozen=True)
class Window:
    """Tokens that are read in one go."""

    stream: int
    start: int
    """In the stream, of the first token that is read."""
    length: int
    """Tokens that are read."""
    skip: int
    """First predictions that an earlier window has counted."""


def cut_into_windows(
    predicted: Sequence[int], window: int | None = None, stride: int | None = None
) -> list[Window]:
    """All windows, stream after stream.

    Args:
        predicted: of each stream, how many tokens are predicted.
        window: tokens that a window reads; None: each stream is one window.
        stride: tokens from one window's beginning to the next one's; None: `window`.

    Raises:
        UsageError: a size below 1, a stride beyond the window, or one without a window.
    """
    if window is None and stride is not None:
        raise UsageError("a stride needs windows", got=f"stride {stride}")
    if window is not None and window < 1:
        raise UsageError("a window needs at least one token", got=window)
    if window is not None and stride is not None and not 1 <= stride <= window:
        raise UsageError("the stride does not fit the window", got=stride, expected=f"1 to {window}")
    found = []
    for stream, count in enumerate(predicted):
        length = count if window is None else window
        step = stride or length
        start = end = 0
        while end < count:
            stop = min(start + length, count)
            found.append(Window(stream, start, stop - start, end - start))
            start, end = start + step, stop
    return found


def in_groups(windows: Sequence[Window], rows: int) -> list[list[Window]]:
    """Windows that are read together, at most `rows` of them: all skip as many, the longest come first."""
    groups = []
    for skip in sorted({window.skip for window in windows}):
        alike = sorted((w for w in windows if w.skip == skip), key=lambda w: -w.length)
        groups += [alike[first : first + rows] for first in range(0, len(alike), rows)]
    return groups
