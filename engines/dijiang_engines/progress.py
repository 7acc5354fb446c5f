"""How long work reports how far it is, without knowing who draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """One bar. Amounts are in the unit that it was opened with."""

    def advance(self, amount: float = 1) -> None:
        """Add `amount` to what is done."""
        ...


class _Silent:
    def advance(self, amount: float = 1) -> None:
        pass


@contextmanager
def silent(description: str, total: float | None = None, unit: str = "items") -> Iterator[Progress]:
    """A bar that nobody sees: the default."""
    yield _Silent()


ProgressFactory = Callable[..., AbstractContextManager[Progress]]
"""Called as f(description, total, unit) with unit "bytes" or "items"; `commands.common.Output.progress`."""
