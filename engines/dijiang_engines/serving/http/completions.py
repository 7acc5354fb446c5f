"""The two endpoints that generate, whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dijiang_engines.generation.session import Session, session_bytes
from dijiang_engines.serving.http.answers import (
    DONE,
    ChatShape,
    Choice,
    CompletionShape,
    Shape,
    Usage,
    event,
)
from dijiang_engines.serving.http.bodies import Wanted, chat_body, completion_body
from dijiang_engines.serving.http.errors import ApiError, as_api_error
from dijiang_engines.serving.http.metrics import Metrics, Timer
from dijiang_engines.serving.http.requests import chat_job, completion_jobs, stored_name
from dijiang_engines.serving.http.service import Listener, Service
from dijiang_engines.serving.job import Job, Update

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Gone(Exception):
    """The client has left."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives, unless the client leaves before.

    Raises:
        Gone: it did; `work` has been cancelled, and has ended.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """One request that generates: its jobs, what has come of them, and how it is told.

    Args:
        service: who works.
        metrics: who counts.
        jobs: what was asked for; their texts are numbered on.
        wanted: how.
        shape: the endpoint's answers.
        key: the API key.
    """

    def __init__(
        self, service: Service, metrics: Metrics, jobs: list[Job], wanted: Wanted, shape: Shape, key: str
    ) -> None:
        self._service, self._metrics, self._jobs, self._wanted = service, metrics, jobs, wanted
        self._shape, self._key = shape, key
        self._first = {job: number * wanted.choices for number, job in enumerate(jobs)}
        self._left = len(jobs) * wanted.choices
        self._usage = Usage(sum(len(job.prompt) for job in jobs))
        self._saved: dict[str, Any] | None = None

    async def response(self, receive: Receive) -> Response:
        """The whole answer, or the stream's response."""
        if self._wanted.stream:
            return _Stream(self)
        return await while_connected(receive, self._whole())

    async def _whole(self) -> Response:
        choices = [Choice() for _ in range(self._left)]
        async for updates in self.updates():
            for index, update in updates:
                choices[index].add(update)
        body = self._shape.head(False)
        body["choices"] = [self._shape.whole(index, choice) for index, choice in enumerate(choices)]
        body["usage"] = self._used()
        if self._saved is not None:
            body["session"] = self._saved
        return JSONResponse(body)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The stream's events. Nothing is sent before the first has come: until then an error is a status."""
        head, opened = self._shape.head(True), False
        before: dict[int, int] = {}
        async for updates in self.updates():
            if not opened:
                opened = True
                for index in range(len(self._jobs) * self._wanted.choices):
                    if (opening := self._shape.opening(index)) is not None:
                        yield event(head | {"choices": [opening]})
            grown: dict[int, Choice] = {}
            for index, update in updates:
                grown.setdefault(index, Choice(before=before.get(index, 0))).add(update)
            for index, choice in grown.items():
                silent = not any(choice.text) and choice.finish is None and self._wanted.logprobs is None
                if not silent or self._service.served.tokenizer is None:
                    yield event(head | {"choices": [self._shape.chunk(index, choice)]})
                before[index] = choice.before
        if self._saved is not None:
            yield event(head | {"choices": [], "session": self._saved})
        if self._wanted.usage_chunk:
            yield event(head | {"choices": [], "usage": self._used()})
        yield DONE

    async def updates(self) -> AsyncIterator[list[tuple[int, Update]]]:
        """What comes, with the number of the text that it is for, until all have ended.

        Raises:
            DijiangError, QueueFull: the request cannot be answered, or not to its end.
        """
        with self._metrics.request() as timer:
            async with self._service.run(self._jobs) as listener:
                while self._left:
                    yield await self._take(listener, timer)

    def _used(self) -> dict[str, Any]:
        """The usage, once all texts have ended."""
        self._usage.cached = sum(job.cached_tokens for job in self._jobs)
        return self._usage.json()

    async def _take(self, listener: Listener, timer: Timer) -> list[tuple[int, Update]]:
        found = []
        for update in await listener.next():
            if update.error is not None:
                raise update.error
            found.append((self._first[update.job] + update.choice, update))
            self._usage.completion += update.token is not None
            if update.finish is not None:
                self._left -= 1
                timer.finished(update.finish)
            if update.session is not None:
                await self._save(update.session)
        timer.tokens(len(found))
        return found

    async def _save(self, session: Session) -> None:
        service, name = self._service, self._wanted.save_session
        assert name is not None
        data = session_bytes(session, service.served.model)
        await asyncio.to_thread(service.sessions.put, stored_name(self._key, name), data)
        self._saved = {"id": name, "tokens": len(session.token_ids[0]), "bytes": len(data)}


class _Stream(Response):
    """Server-sent events as they come. An error before the first is an answer; later it is an event."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunks = self._answer.chunks()
        try:
            await while_connected(receive, self._send(chunks, scope, receive, send))
        except Gone:
            _LOG.debug("a client left its stream")
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def _send(self, chunks: AsyncIterator[bytes], scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(chunks)
        except Exception as error:  # noqa: BLE001 - every failure is an answer
            await error_response(error)(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = first
        while True:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            try:
                body = await anext(chunks)
            except StopAsyncIteration:
                break
            except Exception as error:  # noqa: BLE001 - as above
                failed = log_unknown(error)
                await send({"type": "http.response.body", "body": event(failed.body()), "more_body": True})
                break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: Exception) -> Response:
    """The answer to a request that failed."""
    return log_unknown(error).response()


def log_unknown(error: Exception) -> ApiError:
    """As a client sees it; what is nobody's fault but ours is logged."""
    found = as_api_error(error)
    if found.status == 500:
        _LOG.error("a request failed", exc_info=error)
    return found


def check_model(service: Service, wanted: str | None) -> None:
    """A request may leave the model out, but not ask for another.

    Raises:
        ApiError: it does.
    """
    if wanted not in (None, service.served.name):
        raise ApiError(
            404, f"this server has no model {wanted}; it has {service.served.name}", param="model",
            code="model_not_found",
        )  # fmt: skip


async def completions(
    service: Service, metrics: Metrics, request: Request, body: Mapping[str, Any], key: str
) -> Response:
    """POST /v1/completions."""
    given = completion_body(body, service.scheduler.limits.slots)
    check_model(service, given.wanted.model)
    jobs = await completion_jobs(service, given, key)
    shape = CompletionShape(service.served.name, service.served.tokenizer, given.wanted.logprobs)
    return await Answer(service, metrics, jobs, given.wanted, shape, key).response(request.receive)


async def chat(
    service: Service, metrics: Metrics, request: Request, body: Mapping[str, Any], key: str
) -> Response:
    """POST /v1/chat/completions."""
    given = chat_body(body, service.scheduler.limits.slots)
    check_model(service, given.wanted.model)
    job = await chat_job(service, given, key)
    shape = ChatShape(service.served.name, service.served.tokenizer, given.wanted.logprobs)
    return await Answer(service, metrics, [job], given.wanted, shape, key).response(request.receive)


Endpoint = Callable[[Service, Metrics, Request, Mapping[str, Any], str], Awaitable[Response]]
