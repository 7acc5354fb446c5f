"""What every peer hands over to be timed, whatever it runs on: needs no PyTorch.

A peer that does without PyTorch must not have it in its process either, since its memory is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dijiang_engines.bench.bandwidth import measure_bandwidth
from dijiang_engines.errors import DijiangError
from dijiang_engines.validation.tolerances import tolerance

BLOCK = 16
"""Tokens that a decoder makes in one timed call."""
ROUNDINGS = 4


class LeftOut(DijiangError):
    """A figure that a peer does not have, and why."""


@dataclass
class Prepared:
    """One figure, ready to be timed."""

    run: Callable[[], Any]
    """One call; a decoder's is a block."""
    reset: Callable[[], None]
    """To be called before each run."""
    error: float
    """Of its logits against the eager whole, in their standard deviations."""
    notes: list[str] = field(default_factory=list)
    read_seconds: float | None = None
    """What reading the context took, once; of decoders that were asked for it."""
    context_bytes: int | None = None
    """Of the cache or the state that holds the context."""


class Peer(Protocol):
    """A way to run a model."""

    forms: tuple[str, ...]
    """Of prefills; "" if there is one."""

    def prefill(self, form: str, batch: int, length: int) -> Prepared:
        """Get ready to read `length` tokens of each of `batch` rows."""
        ...

    def decode(self, batch: int, context: int) -> Prepared:
        """Get ready to decode BLOCK tokens of each row after `context`."""
        ...


class Place(Protocol):
    """What a peer runs on."""

    packages: tuple[str, ...]
    """Whose versions belong to the record."""

    def gpu(self) -> dict[str, Any] | None:
        """Name and sizes of a GPU, for the record."""
        ...

    def bandwidth(self, threads: int) -> dict[str, Any]:
        """The memory's rate: `dijiang_engines.bench.bandwidth.Bandwidth`."""
        ...

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Everything is run inside."""
        ...

    def synchronize(self) -> None:
        """Wait for what was asked for."""
        ...

    def reset_peak(self) -> None:
        """Count device memory anew."""
        ...

    def peak(self) -> int | None:
        """Most bytes of device memory since; None where there is none."""
        ...

    def clear(self) -> None:
        """Give back what the last figure took."""
        ...


class Host:
    """The CPU as NumPy and ONNX Runtime use it: a call that returned is done."""

    packages: tuple[str, ...] = ("onnxruntime", "onnxruntime-genai", "numpy")

    def gpu(self) -> dict[str, Any] | None:
        """There is none."""
        return None

    def bandwidth(self, threads: int) -> dict[str, Any]:
        """Measured with NumPy."""
        return asdict(measure_bandwidth(threads))

    def without_gradients(self) -> AbstractContextManager[Any]:
        """There are none."""
        return nullcontext()

    def synchronize(self) -> None:
        """Nothing is pending."""

    def reset_peak(self) -> None:
        """There is no device."""

    def peak(self) -> int | None:
        """There is no device."""
        return None

    def clear(self) -> None:
        """Nothing is kept."""


def deviations(logits: npt.ArrayLike, exact: npt.ArrayLike) -> float:
    """Largest difference in standard deviations of `exact`; infinite if anything is not finite."""
    found, want = np.asarray(logits, np.float64).ravel(), np.asarray(exact, np.float64).ravel()
    if not (np.isfinite(found).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(found - want).max() / want.std(ddof=1))


def wrong(error: float, dtype: str) -> bool:
    """Whether logits that are `error` standard deviations off are another model's.

    The bound is that of a bundle times ROUNDINGS: here both sides are rounded, through dozens of random
    layers. A cache that is one token off, or stale, is off by several standard deviations.
    """
    return not (math.isfinite(error) and error <= ROUNDINGS * tolerance(dtype, "logits").max_error)
