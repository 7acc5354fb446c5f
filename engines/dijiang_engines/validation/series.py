"""Checks summed up as they come: one result for each case and replay, with errors by layer and by position.

A replay of ten thousand steps yields more than ten thousand checks; none of them is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dijiang_engines.validation.check import Check


@dataclass(frozen=True)
class LayerPoint:
    """One layer of one replay, over all rows and positions."""

    layer: int
    state_error: float | None
    """The largest, in units of the head's largest recorded absolute value; None if none is a number."""
    failed: int
    """Checks of this layer's state that failed."""
    without_number: int = 0
    """Those among them that have no error to show: NaN, infinity or a wrong shape."""


@dataclass(frozen=True)
class PositionPoint:
    """All rows of one replay after so many tokens."""

    tokens: int
    logits_error: float | None
    """The largest, in standard deviations of the case's recorded logits."""
    state_error: float | None
    """The largest over layers."""
    top1: float | None
    """Share of the compared logits vectors whose largest entry is the record's."""
    kl: float | None
    """The largest, in nats."""
    failed: int
    """Checks that failed here."""
    logits_without_number: int = 0
    """Those among them that have no error to show: NaN, infinity or a wrong shape; of logits,"""
    state_without_number: int = 0
    """and of states."""


@dataclass(frozen=True)
class ReplayResult:
    """One case replayed in one way: its checks summed up.

    Errors are the largest, cosines the least, over all checks; None where nothing was compared.
    """

    case: str
    replay: str
    checks: int
    failed: int
    logits_error: float | None
    """In standard deviations of the case's recorded logits."""
    state_error: float | None
    """In units of the head's largest recorded absolute value."""
    padding_error: float | None
    """Against the same tokens with other padding."""
    max_abs_error: float | None
    """Of logits, in their own unit."""
    cosine: float | None
    """Of logits and states."""
    top1: float | None
    """Share of compared logits whose largest entry is the record's."""
    kl: float | None
    """In nats."""
    seconds: float
    per_layer: tuple[LayerPoint, ...] = ()
    """By layer, those whose state was compared."""
    per_position: tuple[PositionPoint, ...] = ()
    """By tokens consumed, wherever something was compared with the record or failed."""

    @property
    def passed(self) -> bool:
        """True if something was compared and nothing failed."""
        return self.checks > 0 and self.failed == 0


@dataclass
class _Bin:
    """What has been seen of one layer or one position."""

    logits: float | None = None
    state: float | None = None
    kl: float | None = None
    top1: list[float] = field(default_factory=list)
    failed: int = 0
    bad_logits: int = 0
    bad_state: int = 0


class Summary:
    """Takes checks one by one.

    Args:
        case: which recorded case.
        replay: how it is replayed.
    """

    def __init__(self, case: str, replay: str) -> None:
        self.case, self.replay = case, replay
        self._checks = self._failed = 0
        self._whole = _Bin()
        self._padding: float | None = None
        self._max_abs: float | None = None
        self._cosine: float | None = None
        self._layers: dict[int, _Bin] = {}
        self._positions: dict[int, _Bin] = {}

    def add(self, check: Check) -> None:
        """Count one more check."""
        comparison = check.comparison
        failed = not comparison.passed
        self._checks += 1
        self._failed += failed
        against_record = check.quantity in ("logits", "state")
        if check.quantity == "padding":
            self._padding = _most(self._padding, comparison.relative_error)
        bins = [self._whole] if against_record else []
        if against_record or failed:
            bins.append(self._positions.setdefault(check.tokens, _Bin()))
        if check.layer is not None and (check.quantity == "state" or failed):
            bins.append(self._layers.setdefault(check.layer, _Bin()))
        bad = failed and comparison.relative_error is None
        bad_state = bad and (
            check.quantity == "state" or (check.quantity == "finite" and check.layer is not None)
        )
        for one in bins:
            one.failed += failed
            one.bad_logits += bad and check.quantity in ("logits", "finite")
            one.bad_state += bad_state
            if check.quantity == "state":
                one.state = _most(one.state, comparison.relative_error)
            elif check.quantity == "logits":
                one.logits = _most(one.logits, comparison.relative_error)
                one.kl = _most(one.kl, comparison.kl)
                one.top1 += [] if comparison.top1 is None else [comparison.top1]
        if check.quantity == "logits":
            self._max_abs = _most(self._max_abs, comparison.max_abs_error)
        if against_record and comparison.cosine is not None:
            least = comparison.cosine if self._cosine is None else self._cosine
            self._cosine = min(comparison.cosine, least)

    def result(self, seconds: float) -> ReplayResult:
        """What the checks so far amount to; `seconds`: how long they took."""
        whole = self._whole
        return ReplayResult(
            case=self.case,
            replay=self.replay,
            checks=self._checks,
            failed=self._failed,
            logits_error=whole.logits,
            state_error=whole.state,
            padding_error=self._padding,
            max_abs_error=self._max_abs,
            cosine=self._cosine,
            top1=_mean(whole.top1),
            kl=whole.kl,
            seconds=seconds,
            per_layer=tuple(
                LayerPoint(layer, one.state, one.failed, one.bad_state)
                for layer, one in sorted(self._layers.items())
            ),
            per_position=tuple(
                PositionPoint(
                    tokens, one.logits, one.state, _mean(one.top1), one.kl, one.failed, one.bad_logits,
                    one.bad_state,
                )
                for tokens, one in sorted(self._positions.items())
            ),
        )  # fmt: skip


def _most(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else max(a, b)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
