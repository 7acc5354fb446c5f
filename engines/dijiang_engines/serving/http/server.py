"""Listening: uvicorn with a deadline for clients that do not read, and an end that clients understand."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dijiang_engines.errors import UsageError
from dijiang_engines.serving.http.app import App
from dijiang_engines.serving.http.service import Service

_LOG = logging.getLogger(__name__)
HEADER_SECONDS = 20.0
"""In which a connection must have sent its first request's headers."""
IDLE_SECONDS = 30
"""That a connection is kept open between requests."""


def protocol_with_deadlines(
    write_seconds: float, header_seconds: float = HEADER_SECONDS
) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, which waits for ever for a client that does not read, with an end to that.

    Args:
        write_seconds: in which a client must have read what fills the buffers.
        header_seconds: in which a new connection must have asked something.
    """

    class Deadlines(H11Protocol):
        _write_deadline: asyncio.TimerHandle | None = None
        _header_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._header_deadline = self.loop.call_later(header_seconds, self._no_request)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_deadline is None:
                self._write_deadline = self.loop.call_later(write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            if self._write_deadline is not None:
                self._write_deadline.cancel()
                self._write_deadline = None
            super().resume_writing()

        def _no_request(self) -> None:
            if getattr(self, "cycle", None) is None:
                self.transport.abort()

        def _cancel(self) -> None:
            for handle in (self._write_deadline, self._header_deadline):
                if handle is not None:
                    handle.cancel()

    return Deadlines


class Server(uvicorn.Server):
    """Runs until SIGTERM or SIGINT: then nothing new begins, short answers end, and long ones say why not.

    Args:
        config: uvicorn's.
        service: behind the application.
        grace_seconds: for what is being answered when the signal comes.
        listening: called with the address once there is one.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        grace_seconds: float,
        listening: Callable[[str, int], None],
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._listening = service, grace_seconds, listening

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal once more at its end; a server that was asked to end has not failed."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        added = []
        for number in numbers:
            with suppress(
                NotImplementedError, ValueError, RuntimeError
            ):  # not the main thread: a test's server
                loop.add_signal_handler(number, self.close_gently)
                added.append(number)
        try:
            yield
        finally:
            for number in added:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for server in self.servers:
            for opened in server.sockets:
                host, port = opened.getsockname()[:2]
                self._listening(host, port)
                return

    def close_gently(self) -> None:
        """Take nothing new; let what runs end within the grace; then end. A second call ends at once."""
        if self.should_exit:
            self._service.worker.end()
            self.force_exit = True
            return
        _LOG.info("closing: %d requests are being answered", self._service.open_jobs)
        self._service.worker.refuse()
        self.should_exit = True
        asyncio.get_running_loop().call_later(self._grace, self._service.worker.end)

    async def shutdown(self, sockets: Any = None) -> None:
        """Wait for the connections, then for the threads."""
        await super().shutdown(sockets)
        await asyncio.to_thread(self._service.close, 10.0)


async def serve(
    service: Service,
    *,
    host: str,
    port: int,
    write_seconds: float,
    grace_seconds: float,
    listening: Callable[[str, int], None],
    started: Callable[[Server], None] = lambda server: None,
) -> None:
    """Answer requests until a signal comes.

    Args:
        service: who works; its worker is started here.
        host, port: where; port 0 takes any that is free.
        write_seconds: in which a client must read what was sent to it.
        grace_seconds: for answers in the works at the end.
        listening: called with the address.
        started: called with the server before it listens.

    Raises:
        UsageError: the address cannot be listened at.
    """
    service.start()
    config = uvicorn.Config(
        App(service).asgi, host=host, port=port, http=protocol_with_deadlines(write_seconds), ws="none",
        lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        # After the grace every job has ended with an error; this is for clients that do not read it.
        timeout_graceful_shutdown=int(grace_seconds + write_seconds) + 1,
    )  # fmt: skip
    server = Server(config, service, grace_seconds, listening)
    started(server)
    service.ready = True
    try:
        await server.serve()
    except SystemExit:  # uvicorn has logged why, and gives up this way
        raise UsageError(
            f"cannot listen at {host}:{port}", hint="another program may have it: choose another --port"
        ) from None
