"""Keeping a text to a grammar while it is generated."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Guide(Protocol):
    """Says which tokens may come next in one text, so that it keeps to a grammar."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V] bool, at least one True: tokens that may come next.

        Raises:
            RunnerError: nothing may, or it cannot be computed within limits; this text cannot go on.
        """
        ...

    def accept(self, token: int) -> bool:
        """Take the token that came; True if the text is complete with it: it ended, or nothing can follow.
        Never raises: if what follows cannot be said, `allowed` does."""
        ...


def keep_allowed(scores: npt.NDArray[Any], allowed: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Scores [V] with -inf where a token may not come. What is not finite stays, so that it is noticed."""
    return np.where(allowed | ~(scores < np.inf), scores, -np.inf)
