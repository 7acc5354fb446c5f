"""How the stores of this folder talk to Redis or Valkey."""

from __future__ import annotations

from typing import Any

from dijiang_engines.errors import UsageError


def connect(url: str, seconds: float) -> Any:
    """A client; nothing is sent yet.

    Args:
        url: redis://[[user]:password@]host:port/database, or rediss:// for TLS.
        seconds: in which Redis must have answered, or be connected; a call takes twice that at most where
            the answer comes at once.

    Raises:
        UsageError: the URL is not Redis's.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        # One retry, because a connection of the pool may have been closed since it was used last.
        return redis.Redis.from_url(
            url, socket_timeout=seconds, socket_connect_timeout=seconds, retry=Retry(NoBackoff(), 1)
        )
    except ValueError as error:
        raise UsageError(f"this is not a URL of Redis: {error}") from None


def errors() -> type[Exception]:
    """What such a client raises when Redis fails."""
    import redis

    return redis.RedisError
