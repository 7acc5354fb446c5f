"""A server of a bundle in a thread of the test's process, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dijiang_engines.formats.folder import Model
from dijiang_engines.runners.base import Runner
from dijiang_engines.serving.http import server
from dijiang_engines.serving.http.service import Service
from dijiang_engines.serving.prefix_store import PrefixStore
from dijiang_engines.serving.serve import ServerOptions, make_service
from dijiang_engines.serving.session_store import SessionStore


@dataclass
class Running:
    """A server that listens."""

    service: Service
    port: int
    server: server.Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        """As SIGTERM ends it."""
        self.loop.call_soon_threadsafe(self.server.close_gently)

    def busy(self) -> int:
        """Texts and prompts that the scheduler works on, or that wait."""
        scheduler = self.service.scheduler
        return scheduler.running + len(scheduler.waiting)


@contextmanager
def serving(
    model: Model,
    runner: Runner,
    options: ServerOptions | None = None,
    *,
    sessions: SessionStore | None = None,
    prefixes: PrefixStore | None = None,
    write_seconds: float = 10.0,
    grace_seconds: float = 5.0,
) -> Iterator[Running]:
    """A server until the block ends."""
    service = make_service(model, runner, options or ServerOptions(piece=64), sessions, prefixes)
    listens = threading.Event()
    found: dict[str, Any] = {}

    def listening(_host: str, port: int) -> None:
        found["port"] = port
        listens.set()

    async def run() -> None:
        found["loop"] = asyncio.get_running_loop()
        await server.serve(
            service, host="127.0.0.1", port=0, write_seconds=write_seconds, grace_seconds=grace_seconds,
            listening=listening, started=lambda made: found.update(server=made),
        )  # fmt: skip

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert listens.wait(30)
    running = Running(service, found["port"], found["server"], found["loop"], thread)
    try:
        yield running
    finally:
        if thread.is_alive():
            running.end()
        thread.join(60)
        assert not thread.is_alive()
