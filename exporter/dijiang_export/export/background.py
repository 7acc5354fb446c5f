"""What an export does beside its main thread, and how long each of its parts takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Threads that stop at their next block when the export fails or is interrupted."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._cancelled = threading.Event()

    def submit(
        self, work: Callable[..., T], *arguments: Any, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Future[T]:
        """Run `work(*arguments, on_bytes=...)`, which reports what it has done and so can be stopped."""

        def step(count: int) -> None:
            if self._cancelled.is_set():
                raise CancelledError
            on_bytes(count)

        return self._pool.submit(work, *arguments, on_bytes=step)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._pool.shutdown()


class Clock:
    """Seconds spent in named parts: `with clock("graphs"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> Span:
        """A part to be timed."""
        return Span(self.seconds, name)


class Span:
    """One part, while it takes its time."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.monotonic() - self.start, 3)
