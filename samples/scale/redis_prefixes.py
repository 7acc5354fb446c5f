"""States after the beginnings of prompts in Redis or Valkey: what one server has read, others find.

    pip install redis

A state is one value of constant size, as a conversation is. Who asks has a thread of its own for it, and
the prompt is read when the answer does not come (`serving/shared_prefixes`).
"""

from __future__ import annotations

from collections.abc import Sequence

from redis_connection import connect

from dijiang_engines.errors import UsageError

FIRST_OF = """
for place, name in ipairs(KEYS) do
    local value = redis.call('GETEX', name, 'EX', ARGV[1])
    if value then return {place, value} end
end
return false
"""
"""The first key that there is, with its value, whose time begins anew: one round trip for any prompt."""


class RedisPrefixStore:
    """A `PrefixStore` over a Redis server. What fails is raised as the client does.

    Args:
        url: see `redis_connection.connect`.
        ttl_seconds: a state that was neither written nor found for so long is gone.
        prefix: of all keys.
        read_seconds, write_seconds: in which Redis must have answered.

    Raises:
        UsageError: the URL is not Redis's, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_seconds: int = 600,
        prefix: str = "dijiang:prefix:",
        read_seconds: float = 0.1,
        write_seconds: float = 1.0,
    ) -> None:
        if ttl_seconds < 1 or min(read_seconds, write_seconds) <= 0:
            raise UsageError("times of a store must be above zero")
        self._ttl, self._prefix = ttl_seconds, prefix
        self._reader, self._writer = connect(url, read_seconds), connect(url, write_seconds)

    def find(self, names: Sequence[str]) -> tuple[int, bytes] | None:
        """See `PrefixStore`."""
        keys = [self._prefix + name for name in names]
        found = self._reader.eval(FIRST_OF, len(keys), *keys, self._ttl)
        return None if found is None else (int(found[0]) - 1, bytes(found[1]))

    def put(self, name: str, value: bytes) -> None:
        """See `PrefixStore`."""
        self._writer.set(self._prefix + name, value, ex=self._ttl)

    def close(self) -> None:
        """See `PrefixStore`."""
        self._reader.close()
        self._writer.close()
