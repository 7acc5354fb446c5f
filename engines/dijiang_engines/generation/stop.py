"""Stop strings in a stream of text, wherever the pieces of the stream are cut.

The stop string that is complete first counts, and of those that end at the same place the longest, as if the
text came one character at a time.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    Attributes:
        found: True once a stop string has been seen; nothing comes through after that.
        held: what has been held back.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain not to be, or to follow, a stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self.held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found, self.held = True, ""
            return text[: min(found)[1]]
        hold = max(self._beginning(text, stop) for stop in self._stops)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back: the text has ended, so it is no beginning of anything."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """The length of the longest end of `text` with which `stop` begins."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
