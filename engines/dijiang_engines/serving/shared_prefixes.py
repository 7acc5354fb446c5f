"""The second level behind `prefix_cache`: states that other servers have read, without waiting for anybody.

The thread that makes tokens never talks to the store. A search is handed to a thread of its own and asked
for later; a prompt whose answer has not come in time is read as if there were none. What was read is handed
to another thread through a queue of bounded size, and dropped when that is full. A store that fails or is
late is left alone for some seconds.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dijiang_engines.runners.base import FloatArray
from dijiang_engines.serving.prefix_store import PrefixStore, from_value, stored_name, to_value
from dijiang_engines.spec import ModelSpec

_LOG = logging.getLogger(__name__)
SEARCHES = 64
"""That wait at a time; with more, prompts are read without."""


@dataclass(eq=False)
class Lookup:
    """A search for the longest beginning of one prompt."""

    keys: Sequence[bytes]
    """The longest first."""
    deadline: float
    """On the monotonic clock, after which nobody waits."""
    found: tuple[bytes, list[FloatArray]] | None = None
    """A key and its state, one [1, H, d, d] array per layer; final once the search is settled."""
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def settled(self) -> bool:
        """There is nothing to wait for: it has been answered, or is too late."""
        return self._done.is_set() or self.late

    @property
    def late(self) -> bool:
        """Its deadline is over."""
        return time.monotonic() >= self.deadline

    def wait(self, seconds: float) -> None:
        """Until it is settled, or so long."""
        self._done.wait(max(0.0, min(seconds, self.deadline - time.monotonic())))

    def answer(self, found: tuple[bytes, list[FloatArray]] | None) -> None:
        """Settle it."""
        self.found = found
        self._done.set()


@dataclass
class SharedCounts:
    """What has come of it since the start, for metrics."""

    hits: int = 0
    """Prompts whose beginning was found in the store."""
    misses: int = 0
    """Searches that found nothing."""
    damaged: int = 0
    """Values that were not what was put; misses too."""
    failures: int = 0
    """Calls of the store that failed or took too long."""
    written: int = 0
    dropped: int = 0
    """States that were not written: too many waited, or the store was left alone."""


class SharedPrefixes:
    """A `PrefixStore` behind two threads.

    Args:
        store: this object's from here on.
        spec: of the model whose states they are.
        seconds: that a prompt waits for an answer at most.
        rest_seconds: that a store is left alone after a failure; reading and writing each by themselves.
        queue_bytes: of states that wait to be written.

    Attributes:
        counts: what has come of it.
    """

    def __init__(
        self,
        store: PrefixStore,
        spec: ModelSpec,
        *,
        seconds: float = 0.1,
        rest_seconds: float = 5.0,
        queue_bytes: int = 64 << 20,
    ) -> None:
        self._store, self._spec = store, spec
        self._seconds, self._rest, self._most = seconds, rest_seconds, queue_bytes
        self.counts = SharedCounts()
        self._searches: queue.Queue[Lookup | None] = queue.Queue(SEARCHES)
        self._states: queue.SimpleQueue[tuple[bytes, list[FloatArray], int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0
        self._closing = False
        self._reads_from = self._writes_from = 0.0
        """On the monotonic clock: until then the store is left alone."""
        self._asked: float | None = None
        """Since when the store has been asked for what it has not answered yet."""
        self._threads = [
            threading.Thread(target=self._read, name="dijiang-prefix-reader", daemon=True),
            threading.Thread(target=self._write, name="dijiang-prefix-writer", daemon=True),
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def close(self, seconds: float = 3.0) -> None:
        """End the threads and close the store; what was not written yet is lost. Harmless when called again.

        Args:
            seconds: to wait for the store's answers at most; a thread that hangs in it does not keep the
                process alive.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        until = time.monotonic() + seconds
        self._states.put(None)
        while True:  # searches that wait are nobody's any more
            try:
                self._searches.put_nowait(None)
                break
            except queue.Full:
                self._drop_search()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        try:
            self._store.close()
        except Exception as error:  # noqa: BLE001 - a store's end is nobody's error
            _LOG.info("closing the store of prefixes: %s", error)

    # -- for the thread that makes tokens; none of these waits -------------------------------------------

    def look(self, keys: Sequence[bytes]) -> Lookup | None:
        """Search for the last of `keys` that there is; None: the store is not asked at the moment."""
        now, asked = time.monotonic(), self._asked
        if self._closing or now < self._reads_from or (asked is not None and now - asked > self._seconds):
            return None
        lookup = Lookup(keys[::-1], now + self._seconds)
        try:
            self._searches.put_nowait(lookup)
        except queue.Full:
            return None
        return lookup

    def put(self, key: bytes, layers: list[FloatArray]) -> None:
        """Have a state written, some time; nobody may change the arrays any more."""
        size = sum(layer.nbytes for layer in layers)
        with self._lock:
            resting = self._closing or time.monotonic() < self._writes_from
            if resting or self._queued + size > self._most:
                self.counts.dropped += 1
                return
            self._queued += size
        self._states.put((key, layers, size))

    # -- in the threads ----------------------------------------------------------------------------------

    def _read(self) -> None:
        while (lookup := self._searches.get()) is not None:
            if lookup.late or time.monotonic() < self._reads_from or self._closing:
                lookup.answer(None)
                continue
            begun = self._asked = time.monotonic()
            try:
                lookup.answer(self._find(lookup.keys))
                failure: Exception | None = None
            except Exception as error:  # noqa: BLE001 - whatever it is, the prompt is read
                failure = error
            seconds = time.monotonic() - begun
            if failure is not None or seconds > self._seconds:
                with self._lock:
                    self.counts.failures += 1
                self._reads_from = time.monotonic() + self._rest
                _LOG.warning(
                    "shared prefixes are not read for %g s: %s", self._rest,
                    failure or f"an answer took {seconds:.3f} s, more than {self._seconds:g}",
                )  # fmt: skip
            self._asked = None
            if failure is not None:
                lookup.answer(None)

    def _find(self, keys: Sequence[bytes]) -> tuple[bytes, list[FloatArray]] | None:
        answer = self._store.find([stored_name(key) for key in keys])
        if answer is None:
            self.counts.misses += 1
            return None
        key = keys[answer[0]]
        layers = from_value(key, answer[1], self._spec)
        if layers is None:
            self.counts.damaged += 1
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        return key, layers

    def _write(self) -> None:
        while (item := self._states.get()) is not None:
            key, layers, size = item
            resting = self._closing or time.monotonic() < self._writes_from
            kept = not resting and self._keep(key, layers)
            with self._lock:
                self._queued -= size
                self.counts.written += kept
                self.counts.dropped += not kept

    def _keep(self, key: bytes, layers: list[FloatArray]) -> bool:
        try:
            self._store.put(stored_name(key), to_value(key, layers))
        except Exception as error:  # noqa: BLE001 - whatever it is, the server lives
            with self._lock:
                self.counts.failures += 1
            self._writes_from = time.monotonic() + self._rest
            _LOG.warning("shared prefixes are not written for %g s: %s", self._rest, error)
            return False
        return True

    def _drop_search(self) -> None:
        try:
            lookup = self._searches.get_nowait()
        except queue.Empty:
            return
        if lookup is not None:
            lookup.answer(None)
