"""States after the beginnings of prompts, so that a beginning that many share is read once.

A state has the same size after ten tokens and after ten thousand, so an entry costs kilobytes to a few
megabytes, whatever it saves. The entry that was not used for longest goes first. What is not here, another
server may have (`shared_prefixes`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dijiang_engines.runners.base import FloatArray


class PrefixCache:
    """States of one sequence by key (`pieces.state_keys`), within a number of bytes.

    Args:
        max_bytes: of all states together; 0 keeps none.

    Attributes:
        bytes: of those that are kept.
        hits, misses: prompts that began with a kept state, and that did not.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._entries: OrderedDict[bytes, list[FloatArray]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def longest(self, keys: Sequence[bytes]) -> int:
        """Which of a prompt's keys, in their order, is the last that is here; -1: none."""
        return next((i for i in reversed(range(len(keys))) if keys[i] in self._entries), -1)

    def get(self, key: bytes) -> list[FloatArray]:
        """The state of a key that is here, one [1, H, d, d] array per layer; it was used now."""
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, layers: list[FloatArray]) -> None:
        """Keep a state; the arrays are the cache's from here on."""
        size = sum(layer.nbytes for layer in layers)
        if size > self.max_bytes or key in self._entries:
            return
        self._entries[key] = layers
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self._entries.popitem(last=False)
            self.bytes -= sum(layer.nbytes for layer in old)
