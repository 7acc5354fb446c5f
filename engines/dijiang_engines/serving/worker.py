"""The one thread that owns a runner: it reads, steps, samples and makes text, and tells what came of it.

Others reach it by `submit` and `cancel`, from any thread. What happened in a round is handed over at
once, so that an event loop is woken once a round and not once a token. When the runner fails, everything that
is in the works and everything that comes later fails at once, with the same reason: nothing waits for a
thread that is gone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_engines.serving.job import Job, Update
from dijiang_engines.serving.scheduler import Scheduler

Deliver = Callable[[list[Update]], None]


class QueueFull(Exception):
    """As many jobs wait as may."""


class Closing(DijiangError):
    """The server is shutting down."""


class Worker:
    """Runs a scheduler in a thread.

    Args:
        scheduler: nobody else's from here on.
        deliver: called in the thread with the updates of a round; must not block.

    Attributes:
        failure: why it is dead, None while it lives.
    """

    def __init__(self, scheduler: Scheduler, deliver: Deliver) -> None:
        self._scheduler, self._deliver = scheduler, deliver
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._taken = 0
        """Texts in slots, jobs that wait for them, and calls that the thread has not seen yet."""
        self._closing = False
        self.failure: DijiangError | None = None
        self._thread = threading.Thread(target=self._run, name="dijiang-worker", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """It works, or waits for work."""
        return self._thread.is_alive() and self.failure is None

    @property
    def closing(self) -> bool:
        """It takes no more jobs."""
        return self._closing

    # -- from any thread ---------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Have a job done; its updates are delivered.

        Raises:
            QueueFull: too many wait.
            DijiangError: the worker is dead, or the server is closing.
        """
        with self._lock:
            self._check()
            if self._taken >= self._scheduler.limits.slots + self._scheduler.limits.queue:
                raise QueueFull
            self._taken += 1
            self._inbox.put(lambda: self._scheduler.submit(job))

    def cancel(self, job: Job) -> None:
        """Stop working on a job, soon; nothing is delivered for it after that. Harmless when it has ended."""
        if not job.done:
            self._inbox.put(lambda: self._scheduler.cancel(job))

    def refuse(self) -> None:
        """Take no more jobs; those that are in the works go on."""
        with self._lock:
            self._closing = True

    def end(self, reason: DijiangError | None = None) -> None:
        """End all jobs with an error, and the thread."""
        self.refuse()
        self._inbox.put(lambda: self._stop(reason or Closing("the server is shutting down")))

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(seconds)

    # -- in the thread -----------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._closing:
            raise Closing("the server is shutting down", hint="ask again: another server may answer")

    def _run(self) -> None:
        try:
            while self.failure is None:
                self._take(block=self._scheduler.idle)
                if self.failure is None and not self._scheduler.idle:
                    updates = self._scheduler.round()
                    self._count()
                    if updates:
                        self._deliver(updates)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody may go on waiting
            self._stop(error)

    def _take(self, *, block: bool) -> None:
        if block:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                break
            command()
        self._count()

    def _count(self) -> None:
        with self._lock:
            waiting = len(self._scheduler.waiting) + self._inbox.qsize()
            self._taken = self._scheduler.running + waiting

    def _stop(self, error: BaseException | None) -> None:
        if not isinstance(error, DijiangError):
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            error = RunnerError("the model cannot be run any more", got=text, hint="restart the server")
        with self._lock:
            self.failure = error
        jobs: list[Any] = self._scheduler.jobs()
        for job in jobs:
            self._scheduler.cancel(job)
        while True:  # what was submitted meanwhile
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                break
            command()
        jobs += self._scheduler.jobs()
        self._deliver([Update(job, error=error) for job in jobs])
