"""HTTP/1.1 as a benchmark needs it: one request on one connection, bounds on everything.

The standard library alone, and little work for each token: what the client computes is taken from the server
where both share a machine.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from dijiang_engines.errors import UsageError

MOST_HEAD = 64 << 10
"""Bytes of an answer's status and headers, and of any line."""
MOST_BODY = 1 << 20
"""Bytes of an answer that is no stream, and of one event."""
_PIECE = 64 << 10


class Failure(Exception):
    """One request failed.

    Args:
        reason: for people; failures of one reason are counted together.
        status: of HTTP, where there was an answer.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Address:
    """Where a server's API is."""

    host: str
    port: int
    tls: bool
    base: str
    """The path before /v1."""

    @property
    def netloc(self) -> str:
        """Host and port as they stand in a URL and in a request's Host."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_url(url: str) -> Address:
    """Take a server's URL apart; the /v1 at its end may be left out.

    Raises:
        UsageError: it is not one of HTTP or HTTPS, or has parts that a base address cannot have.
    """
    expected = "such as http://127.0.0.1:8000/v1"
    try:
        found = urlsplit(url)
        port = found.port
    except ValueError:
        raise UsageError("this is not a server's URL", got=url, expected=expected) from None
    plain = re.fullmatch(r"[!-~]+", url) is not None  # no blanks or line ends in a request's head
    if found.scheme not in ("http", "https") or not found.hostname or not plain or port == 0:
        raise UsageError("this is not a server's URL", got=url, expected=expected)
    if found.username is not None or found.query or found.fragment:
        raise UsageError(
            "a server's URL has a host, a port and a path only", expected=expected,
            hint="a key goes into --api-key or DIJIANG_API_KEY",
        )  # fmt: skip
    tls = found.scheme == "https"
    base = found.path.rstrip("/").removesuffix("/v1")
    return Address(found.hostname, port or (443 if tls else 80), tls, base)


class Answer:
    """An answer whose head has come.

    Attributes:
        status: of HTTP.
        kind: the Content-Type's first part.
    """

    def __init__(self, reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> None:
        self._reader, self.status, self._headers = reader, status, headers
        self.kind = headers.get("content-type", "").partition(";")[0].strip().lower()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes.

        Raises:
            Failure: it breaks off, or is not framed as HTTP has it.
        """
        if "chunked" in self._headers.get("transfer-encoding", "").lower():
            while size := await self._chunk_size():
                async for part in self._exactly(size):
                    yield part
                if await self._reader.readexactly(2) != b"\r\n":
                    raise Failure("the answer is not HTTP: a chunk does not end where it should")
        elif (length := self._headers.get("content-length")) is not None:
            if not re.fullmatch(r"\d{1,18}", length):
                raise Failure("the answer is not HTTP: its length is no number")
            async for part in self._exactly(int(length)):
                yield part
        else:
            while part := await self._reader.read(_PIECE):
                yield part

    async def body(self) -> bytes:
        """All of it.

        Raises:
            Failure: as `parts`, or it is longer than `MOST_BODY`.
        """
        found = b""
        async for part in self.parts():
            found += part
            if len(found) > MOST_BODY:
                raise Failure("the answer is too long", self.status)
        return found

    async def _chunk_size(self) -> int:
        line = await self._reader.readuntil(b"\n")
        size = line.partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,12}", size):
            raise Failure("the answer is not HTTP: a chunk's size is no number")
        return int(size, 16)

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            part = await self._reader.read(min(size, _PIECE))
            if not part:
                raise Failure("the connection was closed before the end")
            size -= len(part)
            yield part


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    found = re.match(r"HTTP/1\.[01] (\d{3})(?: |$)", lines[0])
    if found is None:
        raise Failure("the answer is not HTTP/1.1")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(found[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


@asynccontextmanager
async def ask(
    address: Address, method: str, path: str, body: bytes | None = None, key: str | None = None
) -> AsyncIterator[Answer]:
    """One request; the connection is closed when the block ends.

    Args:
        address: the server's.
        method, path: of the request; the path comes after the address's own.
        body: JSON.
        key: sent as a bearer token.

    Raises:
        Failure: there is no connection, or no answer, or (inside the block) the answer breaks off.
    """
    head = f"{method} {address.base}{path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer = None
    try:
        tls = ssl.create_default_context() if address.tls else None
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls, limit=MOST_HEAD)
        writer.write(head.encode("latin-1") + b"\r\n" + (body or b""))
        status, headers = await _head(reader)
        while 100 <= status < 200:
            status, headers = await _head(reader)
        yield Answer(reader, status, headers)
    except asyncio.IncompleteReadError:
        raise Failure("the connection was closed before the end") from None
    except asyncio.LimitOverrunError:
        raise Failure("the answer is not HTTP: a line is too long") from None
    except OSError as error:
        what = "the connection broke" if writer else "cannot connect"
        raise Failure(f"{what}: {error.strerror or type(error).__name__}") from None
    finally:
        if writer is not None:
            writer.transport.abort()  # without waiting for a server that does not answer


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events (WHATWG HTML, 9.2: lines by LF or CR LF, an event by a blank line).

    Raises:
        Failure: an event is longer than `MOST_BODY`.
    """
    rest, data = b"", []
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
        if len(rest) + sum(map(len, data)) > MOST_BODY:
            raise Failure("the stream has an event that is too long")
