"""Keeping a text to a grammar while it is generated."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Guide(Protocol):
    """Says which tokens may come next in one text, so that it keeps to a grammar."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V] bool, at least one True: tokens that may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Take the token that came; True if the text is complete with it."""
        ...
