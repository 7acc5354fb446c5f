"""One stream of tokens, and when each came; and what a server says of itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any, TypeVar

from dijiang_export.bench.serve.http import Address, Answer, Failure, ask, events

T = TypeVar("T")
_SHOWN = 200
"""Characters of what a server says of an error."""


@dataclass(frozen=True)
class Target:
    """Whom to ask, and how."""

    address: Address
    model: str
    key: str | None
    seconds: float
    """Most that one request may take, from its connection to its last byte."""


@dataclass
class Stream:
    """What came of one request for a stream. Times are in seconds."""

    begun: float
    """When the connection was asked for; on the clock of `perf_counter`."""
    first: float | None = None
    """From there to the first chunk with text or a token."""
    gaps: list[float] = field(default_factory=list)
    """Between that and the next such chunk, and so on."""
    chunks: int = 0
    usage: Mapping[str, Any] = field(default_factory=dict)
    ended: float = 0.0
    """When the last byte had come, or the failure."""
    failure: str | None = None
    status: int | None = None
    """Of HTTP, with a failure that has one."""

    def count(self, name: str) -> int | None:
        """A number of the server's usage; None if it did not tell."""
        value = self.usage.get(name)
        return value if type(value) is int and 0 <= value < 1 << 40 else None

    @property
    def tokens(self) -> int:
        """That were generated: as the server says, or else its chunks."""
        told = self.count("completion_tokens")
        return self.chunks if told is None else told


async def within(seconds: float, work: Awaitable[T]) -> T:
    """What `work` gives.

    Raises:
        Failure: it takes longer.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise Failure(f"no end within {seconds:g} s") from None


async def get_json(target: Target, method: str, path: str, body: Any = None) -> Any:
    """A whole answer.

    Raises:
        Failure: it is an error, no JSON, or does not come.
    """

    async def work() -> Any:
        data = None if body is None else json.dumps(body).encode()
        async with ask(target.address, method, path, data, target.key) as answer:
            if answer.status != HTTPStatus.OK:
                raise await _error(answer)
            return _parsed(await answer.body())

    return await within(target.seconds, work())


async def stream_once(target: Target, body: Mapping[str, Any], most: int) -> Stream:
    """Ask for one stream and read it to its end; what fails is told in the result.

    Args:
        target: whom.
        body: of the request.
        most: chunks; a server that sends more does not keep to what it was asked.
    """
    found = Stream(perf_counter())
    try:
        await within(target.seconds, _read(found, target, body, most))
    except Failure as failure:
        found.failure, found.status = str(failure), failure.status
    found.ended = perf_counter()
    return found


async def _read(found: Stream, target: Target, body: Mapping[str, Any], most: int) -> None:
    data = json.dumps({"model": target.model, **body}).encode()
    async with ask(target.address, "POST", "/v1/completions", data, target.key) as answer:
        if answer.status != HTTPStatus.OK:
            raise await _error(answer)
        if answer.kind != "text/event-stream":
            raise Failure(f"the answer is {answer.kind or 'of no type'}, and no stream of events")
        last, finished = 0.0, False
        async for event in events(answer.parts()):
            if event == b"[DONE]":
                break
            text, ends = _choice(found, _parsed(event))
            finished = finished or ends
            if text:
                now = perf_counter()
                if found.chunks:
                    found.gaps.append(now - last)
                else:
                    found.first = now - found.begun
                last = now
                found.chunks += 1
                if found.chunks > most:
                    raise Failure("the server sends more than was asked for")
        if not finished:
            raise Failure("the stream ended before its text did")


def _choice(found: Stream, chunk: Any) -> tuple[bool, bool]:
    """Whether a chunk has a token, and whether it ends the text."""
    if not isinstance(chunk, dict):
        raise Failure("the stream has an event that is no object")
    if chunk.get("error") is not None:
        raise Failure(f"an error in the stream: {_message(chunk)}")
    if isinstance(chunk.get("usage"), dict):
        found.usage = chunk["usage"]
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices:
        return False, False
    choice = choices[0]
    if not isinstance(choice, dict):
        raise Failure("the stream has a choice that is no object")
    ends = choice.get("finish_reason") is not None
    # A last chunk without text only says why the text ends; any other is a token, even one without text.
    return bool(choice.get("text") or choice.get("token_ids")) or not ends, ends


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise Failure("the server sends what is not JSON") from None


async def _error(answer: Answer) -> Failure:
    try:
        phrase = HTTPStatus(answer.status).phrase
    except ValueError:
        phrase = ""
    try:
        said = _message(json.loads(await answer.body()))
    except (Failure, ValueError, RecursionError):
        said = ""
    words = " ".join(f"{answer.status} {phrase}".split())
    return Failure(f"{words}: {said}" if said else words, answer.status)


def _message(body: Any) -> str:
    """An error's text in any of the shapes that servers use."""
    found = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or ""
    return " ".join(str(found).split())[:_SHOWN]
