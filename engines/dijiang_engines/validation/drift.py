"""Does the error grow with the position? Said in words, from the marks of one long replay."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from dijiang_engines.validation.series import ReplayResult

LEAST_TOKENS = 1000
"""A shorter replay says nothing about drift."""
EARLY = (0.01, 0.1)
LATE = (0.5, 1.0)
"""Parts of the sequence that are compared. The marks of `drift` in them have their middles at about 375 and
7500 tokens, a factor of 20."""
GROWTH = 2.0
"""An error is the largest of some thousand roundings: without any trend, neighbouring marks were up to 2.2
apart, and medians less (docs/validation.md). Errors that add up at random would grow by √20 = 4.5, errors
that add up in one direction by 20."""


@dataclass(frozen=True)
class Drift:
    """Errors late in one replay beside those early in it."""

    case: str
    replay: str
    quantity: str
    """logits or state."""
    tokens: int
    """How long the replay was."""
    early: float
    """Median over the marks from 1% to 10% of the way."""
    late: float
    """Median over the marks of the second half."""

    @property
    def ratio(self) -> float | None:
        """late / early; None if there was no early error."""
        return self.late / self.early if self.early > 0 else None

    @property
    def grows(self) -> bool:
        """True if errors are larger late than early by more than they scatter."""
        return self.late > GROWTH * self.early

    @property
    def sentence(self) -> str:
        """For people."""
        what = "states" if self.quantity == "state" else "logits"
        verdict = "grows" if self.grows else "does not grow"
        ratio = "" if self.ratio is None else f", × {self.ratio:.2g}"
        first, last = (round(part * self.tokens) for part in EARLY)
        return (
            f"{self.case}, {self.replay}: the {what}' error {verdict} "
            f"(median {self.early:.1e} after {first} to {last} tokens, "
            f"{self.late:.1e} in the second half of {self.tokens}{ratio})"
        )


def find_drift(result: ReplayResult) -> list[Drift]:
    """What a replay says about drift: nothing if it was short or had values without a number."""
    if not result.per_position or result.per_position[-1].tokens < LEAST_TOKENS:
        return []
    if any(point.logits_without_number or point.state_without_number for point in result.per_position):
        return []
    length = result.per_position[-1].tokens
    found = []
    for quantity in ("logits", "state"):
        early, late = (
            [
                error
                for point in result.per_position
                if low * length <= point.tokens <= high * length
                and (error := point.logits_error if quantity == "logits" else point.state_error) is not None
            ]
            for low, high in (EARLY, LATE)
        )
        if early and late:
            found.append(Drift(result.case, result.replay, quantity, length, median(early), median(late)))
    return found
