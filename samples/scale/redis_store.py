"""Conversations in Redis or Valkey, so that any of several servers resumes any of them.

    pip install redis

A conversation is one value of constant size (0.16 MB for the sample, 2.4 MB at Pythia-160M's shape) under a
key of its own. A client's retry may save one twice, which changes nothing: a save replaces it whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from redis_connection import connect, errors

from dijiang_engines.errors import SessionError, UsageError
from dijiang_engines.serving.session_store import StoreError

T = TypeVar("T")
MOST_NAMES = 10_000
"""That are listed: a listing walks over all keys of the database."""


class RedisStore:
    """A `SessionStore` over a Redis server.

    Args:
        url: see `redis_connection.connect`.
        ttl_seconds: a conversation that was neither saved nor read for so long is gone.
        max_bytes: of one conversation.
        seconds: in which Redis must have answered; a request waits twice that at most, then fails.
        prefix: of all keys; servers of different models need different ones.

    Raises:
        UsageError: the URL is not Redis's, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: int = 24 * 3600,
        max_bytes: int = 64 << 20,
        seconds: float = 2.0,
        prefix: str = "dijiang:session:",
    ) -> None:
        if min(ttl_seconds, max_bytes) < 1 or seconds <= 0:
            raise UsageError("times and sizes of a store must be above zero")
        self._ttl, self._most, self._prefix = ttl_seconds, max_bytes, prefix
        self._errors, self._client = errors(), connect(url, seconds)

    def get(self, name: str) -> bytes | None:
        """The file, whose time begins anew; None if there is none, or not any more.

        Raises:
            StoreError: Redis does not answer.
        """
        found = self._try(lambda: self._client.getex(self._key(name), ex=self._ttl))
        return None if found is None else bytes(found)

    def put(self, name: str, data: bytes) -> None:
        """Keep a file.

        Raises:
            SessionError: it is too large.
            StoreError: Redis does not answer, or has no room.
        """
        if len(data) > self._most:
            raise SessionError(
                "the conversation is larger than may be kept", got=f"{len(data)} bytes",
                expected=f"at most {self._most}",
            )  # fmt: skip
        self._try(lambda: self._client.set(self._key(name), data, ex=self._ttl))

    def delete(self, name: str) -> bool:
        """Forget a file; False if there was none.

        Raises:
            StoreError: Redis does not answer.
        """
        return bool(self._try(lambda: self._client.delete(self._key(name))))

    def names(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, sorted; `MOST_NAMES` of them at most.

        Raises:
            StoreError: Redis does not answer.
        """
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", self._key(prefix)) + "*"

        def walk() -> list[str]:
            found: set[str] = set()  # a walk may meet a key twice
            for key in self._client.scan_iter(match=pattern, count=1000):
                found.add(key.decode()[len(self._prefix) :])
                if len(found) >= MOST_NAMES:
                    break
            return sorted(found)

        return self._try(walk)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _try(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except self._errors as error:
            raise StoreError(
                "conversations cannot be read or kept at the moment", got=type(error).__name__,
                hint="ask again later; requests without a session are answered meanwhile",
            ) from error  # fmt: skip
