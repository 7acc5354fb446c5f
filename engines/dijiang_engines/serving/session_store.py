"""Conversations that are kept between requests: a few kilobytes to megabytes each, whatever their length.

A store keeps bytes under names. The server's own is in memory; samples/scale has one in Redis, so that any of
several servers resumes any conversation. What is kept is a session file (`generation/session`), which tells
its model: it can be downloaded, and resumed by `dijiang-export generate --session` too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol

from dijiang_engines.errors import DijiangError


class StoreError(DijiangError):
    """A store that cannot be reached, or has no room: not the client's fault, and not for ever."""


class SessionStore(Protocol):
    """Keeps session files by name. Called from several threads. Names are the server's own, not users'.

    Each may raise `StoreError`; requests that need no session are answered all the same.
    """

    def get(self, name: str) -> bytes | None:
        """The file, or None if there is none of that name, or none any more."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Keep a file; an older one of that name goes."""
        ...

    def delete(self, name: str) -> bool:
        """Forget a file; False if there was none."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, sorted."""
        ...


class MemoryStore:
    """Within a number of bytes: the session that was not used for longest goes first.

    Args:
        max_bytes: of all files together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """See `SessionStore`."""
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
            return self._files.get(name)

    def put(self, name: str, data: bytes) -> None:
        """See `SessionStore`."""
        with self._lock:
            self._drop(name)
            self._files[name] = data
            self.bytes += len(data)
            while self.bytes > self.max_bytes and len(self._files) > 1:
                self._drop(next(iter(self._files)))

    def delete(self, name: str) -> bool:
        """See `SessionStore`."""
        with self._lock:
            return self._drop(name)

    def names(self, prefix: str) -> list[str]:
        """See `SessionStore`."""
        with self._lock:
            return sorted(name for name in self._files if name.startswith(prefix))

    def _drop(self, name: str) -> bool:
        data = self._files.pop(name, None)
        self.bytes -= len(data or b"")
        return data is not None
