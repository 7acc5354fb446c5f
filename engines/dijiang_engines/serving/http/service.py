"""Between the event loop and the worker's thread: who waits for which job."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.folder import Model
from dijiang_engines.generation.generator import Generator
from dijiang_engines.serving.job import Job, Update
from dijiang_engines.serving.scheduler import Scheduler
from dijiang_engines.serving.session_store import SessionStore
from dijiang_engines.serving.worker import Worker
from dijiang_engines.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dijiang_engines.generation.grammar import Grammars
    from dijiang_engines.serving.chat_template import ChatTemplate


@dataclass(frozen=True)
class Served:
    """The model behind the server, and what clients may ask of it."""

    model: Model
    name: str
    """What clients call it."""
    tokenizer: Tokenizer | None
    chat: ChatTemplate | None
    max_tokens: int
    """Most new tokens of one text; what a chat gets that does not say."""
    max_prompt_tokens: int
    max_body_bytes: int
    body_seconds: float
    """In which a request's body must have arrived."""
    keys: tuple[str, ...] = ()
    """API keys, one of which a request must have; none: anybody may ask."""


class Listener:
    """What has come for some jobs and nobody has taken yet."""

    def __init__(self) -> None:
        self._updates: list[Update] = []
        self._came = asyncio.Event()

    def add(self, update: Update) -> None:
        """Something came."""
        self._updates.append(update)
        self._came.set()

    async def next(self) -> list[Update]:
        """Everything since the last call, at least one."""
        await self._came.wait()
        self._came.clear()
        updates, self._updates = self._updates, []
        return updates


class Service:
    """Runs jobs for coroutines of one event loop.

    Args:
        served: the model and limits.
        scheduler: what works.
        sessions: where conversations are kept.
        secret: at most 64 bytes; by default random, this process's own.

    Attributes:
        secret: in the name of all that is kept of prompts: with another secret, or for another API key, it
            cannot be found.
        ready: the model has been loaded and warmed up.
    """

    def __init__(
        self, served: Served, scheduler: Scheduler, sessions: SessionStore, secret: bytes | None = None
    ) -> None:
        self.served, self.scheduler, self.sessions = served, scheduler, sessions
        self.generator = Generator(scheduler.runner, served.tokenizer)
        """Knows how prompts are read. The thread alone runs the model."""
        self.worker = Worker(scheduler, self._deliver)
        self.secret = secrets.token_bytes(32) if secret is None else secret
        self.ready = False
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._listeners: dict[Job, Listener] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to work, for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        if self.scheduler.shared is not None:
            self.scheduler.shared.start()
        self.worker.start()

    def close(self, seconds: float) -> None:
        """End all jobs and all threads; from a thread that may wait so long for the model, and 3 s more."""
        self.worker.end()
        self.worker.join(seconds)
        if self.scheduler.shared is not None:
            self.scheduler.shared.close()

    def salt(self, key: str) -> bytes:
        """What tells the cached states of one API key from others'."""
        return hashlib.blake2b(key.encode(), key=self.secret, digest_size=32).digest()

    def grammars(self) -> Grammars:
        """Makes the grammars that answers are kept to; takes a second the first time.

        Raises:
            UsageError: llguidance is not installed.
            BundleError: answers cannot be kept to a grammar with this model's tokenizer.
        """
        from dijiang_engines.generation.grammar import Grammars

        served = self.served
        with self._grammars_lock:
            if self._grammars is None:
                if served.tokenizer is None:
                    raise BundleError("answers cannot have a form: the model has no tokenizer")
                self._grammars = Grammars(served.tokenizer, served.model.spec)
            return self._grammars

    @asynccontextmanager
    async def run(self, jobs: Sequence[Job]) -> AsyncIterator[Listener]:
        """Submit jobs, and forget what is left of them when the block ends, however it does.

        Raises:
            QueueFull, DijiangError: as `Worker.submit`; none of the jobs runs then.
        """
        listener = Listener()
        try:
            for job in jobs:
                self._listeners[job] = listener
                self.worker.submit(job)
            yield listener
        finally:
            for job in jobs:
                self._listeners.pop(job, None)
                self.worker.cancel(job)

    @property
    def open_jobs(self) -> int:
        """Jobs that somebody waits for."""
        return len(self._listeners)

    def _deliver(self, updates: list[Update]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(self._dispatch, updates)

    def _dispatch(self, updates: list[Update]) -> None:
        for update in updates:
            listener = self._listeners.get(update.job)
            if listener is not None:
                listener.add(update)
