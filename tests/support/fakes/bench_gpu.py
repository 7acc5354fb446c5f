"""A GPU for the commands that measure kernels: it proves orchestration only, times are made up."""

from __future__ import annotations

from typing import Any

from dijiang_engines.bench.timing import Timing


class FakeGpu:
    """Its copies move 3 TB/s.

    Args:
        allowed: the largest error that is right.
        error: of ours.
        settings: of the record.
    """

    def __init__(self, allowed: float, error: float, **settings: str) -> None:
        self.allowed, self.error, self.settings = allowed, error, settings

    def describe(self) -> dict[str, Any]:
        return {"gpu": {"name": "Fake GPU"}, "library": {"sha256": "ab" * 32, "version": "0.1.0"}}

    def rate(self) -> float:
        return 3e12

    def ours(self, seconds: float, *more: str) -> dict[str, Any]:
        """A result that took so long, in every figure; without times if it is wrong."""
        found: dict[str, Any] = {"error": self.error, "right": self.error <= self.allowed}
        return found | (dict.fromkeys(("timing", *more), self.took(seconds)) if found["right"] else {})

    @staticmethod
    def took(seconds: float) -> Timing:
        return Timing(9, seconds, seconds, seconds, seconds)
