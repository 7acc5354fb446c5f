"""A case replayed in as many rows at a time as the runner takes: an engine may be built for one row only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from dijiang_engines.formats.reference_cases import ReferenceCase
from dijiang_engines.runners.base import LimitsBatch, Runner
from dijiang_engines.validation.check import Check
from dijiang_engines.validation.replay import Replayer
from dijiang_engines.validation.tolerances import Bounds


class RowsReplayer:
    """`Replayer`, with the rows of the case in groups of at most `runner.max_batch`, if it `LimitsBatch`.

    Args:
        runner: what is tested.
        case: what it is tested with.
        bounds: the tolerances.
    """

    def __init__(self, runner: Runner, case: ReferenceCase, bounds: Bounds) -> None:
        most = runner.max_batch if isinstance(runner, LimitsBatch) else case.batch
        self.whole = Replayer(runner, case, bounds)
        self.groups = [(0, self.whole)]
        if most < case.batch:
            self.groups = [
                (
                    start,
                    Replayer(runner, case.rows(start, min(start + most, case.batch)), bounds, unit_of=case),
                )
                for start in range(0, case.batch, most)
            ]

    def bad_record(self) -> Check | None:
        """As of the whole case."""
        return self.whole.bad_record()

    def skip_reason(self, replay: str) -> str | None:
        """As of the whole case."""
        return self.whole.skip_reason(replay)

    def calls(self, replay: str) -> int:
        """How often `replay`, run next, calls the runner."""
        return sum(replayer.calls(replay) for _, replayer in self.groups)

    def run(self, replay: str, on_call: Callable[[], None] = lambda: None) -> Iterator[Check]:
        """The checks of one replay, group after group, with the case's own row numbers."""
        for start, replayer in self.groups:
            for check in replayer.run(replay, on_call):
                yield replace(check, row=check.row + start) if start else check
