"""Validate a runner against recorded cases, without PyTorch: replay, compare, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dijiang_engines.errors import BundleError, UsageError, ValidationMismatch
from dijiang_engines.formats.reference_cases import EMBEDDING, EmbeddingCase, Reference, ReferenceCase
from dijiang_engines.formats.rounding_cost import RoundingCost
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.runners.base import Runner
from dijiang_engines.validation.check import Check
from dijiang_engines.validation.drift import Drift, find_drift
from dijiang_engines.validation.replay import REPLAYS
from dijiang_engines.validation.replay_embedding import EmbeddingReplayer
from dijiang_engines.validation.replay_rows import RowsReplayer
from dijiang_engines.validation.seen_rows import SeenRows, Share
from dijiang_engines.validation.series import ReplayResult, Summary
from dijiang_engines.validation.tolerances import Bounds, Quantity, scale_of
from dijiang_engines.weight_formats import Activations

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MAX_FAILURES", "ReplayResult", "Report", "Skipped", "validate"]

QUANTITIES: tuple[Quantity, ...] = ("logits", "state", "padding")
STEPPED = ("steps", "resume")
"""Replays that end in steps."""
MAX_FAILURES = 100
"""Failed checks that a report keeps in full; it counts all of them."""


@dataclass(frozen=True)
class Skipped:
    """A replay that was not tried, and why."""

    case: str
    replay: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `validate` found."""

    runner: str
    dtype: str
    """The bundle's, which chose the tolerances."""
    results: tuple[ReplayResult, ...]
    failures: tuple[Check, ...]
    """Failed checks in the order in which they were found, at most `MAX_FAILURES`."""
    skipped: tuple[Skipped, ...] = ()
    """Replays that make no sense for a case."""
    rounding_cost: RoundingCost | None = None
    """What rounding costs the model, from which its tolerances follow; None for older records."""
    embedding_rows: Share | None = None
    """Rows of the tokens' embedding that the replayed cases read."""
    position_rows: Share | None = None
    """Rows of the positions' embedding that they read; None if the model has none."""
    step_bounds: Bounds | None = None
    """What replays with steps were judged by, if by others than the rest."""
    prefill_activations: Activations = "float"
    """Of products of quantised matrices in a prefill."""

    @property
    def bounds(self) -> Bounds:
        """What everything was judged by, but for what `step_bounds` says."""
        return Bounds(self.dtype, self.rounding_cost, self.prefill_activations)

    def bounds_of(self, replay: str) -> Bounds:
        """What one replay was judged by."""
        return self.step_bounds if self.step_bounds is not None and replay in STEPPED else self.bounds

    @property
    def widest(self) -> Bounds:
        """The bounds that allow most."""
        return self.step_bounds or self.bounds

    @property
    def drift(self) -> tuple[Drift, ...]:
        """Whether errors grow with the position, for every replay that went far enough to tell."""
        return tuple(found for result in self.results for found in find_drift(result))

    @property
    def left_out(self) -> list[str]:
        """A sentence for each case of which replays were skipped."""
        ways: dict[tuple[str, str], list[str]] = {}
        for one in self.skipped:
            ways.setdefault((one.case, one.reason), []).append(one.replay)
        return [f"{case}: no {', '.join(names)}: {reason}." for (case, reason), names in ways.items()]

    @property
    def coverage(self) -> list[str]:
        """A sentence on the rows of the embeddings that were seen, and how to see all."""
        if self.embedding_rows is None:
            return []
        text = f"Embedding rows seen: {self.embedding_rows.sentence}"
        if self.position_rows is not None:
            text += f"; of positions: {self.position_rows.sentence}"
        if self.embedding_rows.seen < self.embedding_rows.total:
            text += "; a bundle that was exported with `--cases full` shows all"
        return [text + "."]

    @property
    def passed(self) -> bool:
        """True if every replay compared something and nothing failed."""
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def first_failure(self) -> Check | None:
        """The first failed check: the earliest token, and there the first layer."""
        return self.failures[0] if self.failures else None

    def raise_on_mismatch(self) -> None:
        """Raise if anything failed.

        Raises:
            ValidationMismatch: names the first failing layer, row and token, and how many checks failed.
        """
        if self.passed:
            return
        first = self.first_failure
        failed = sum(result.failed for result in self.results)
        total = sum(result.checks for result in self.results)
        if first is None:
            raise ValidationMismatch("nothing was compared", got=" ".join(self.left_out) or None)
        raise ValidationMismatch(
            f"{failed} of {total} checks on {self.runner} failed; first: {first.place}",
            got=first.comparison.reason,
            hint=_hint(first),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        first = self.first_failure
        return {
            "passed": self.passed,
            "runner": self.runner,
            "dtype": self.dtype,
            "tolerances": {q: asdict(self.bounds.widest(q)) for q in QUANTITIES},
            "tolerances_from": None if self.rounding_cost is None else _tolerances_from(self.bounds),
            **self._of_steps(),
            "embedding_rows": None if self.embedding_rows is None else asdict(self.embedding_rows),
            "position_rows": None if self.position_rows is None else asdict(self.position_rows),
            "results": [asdict(result) | {"passed": result.passed} for result in self.results],
            "first_failure": None if first is None else first.to_json(),
            "failures": [check.to_json() for check in self.failures],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "drift": [asdict(found) | {"sentence": found.sentence} for found in self.drift],
        }

    def _of_steps(self) -> dict[str, Any]:
        bounds = self.step_bounds
        if bounds is None:
            return {}
        return {
            "step_tolerances": {q: asdict(bounds.widest(q)) for q in QUANTITIES},
            "step_tolerances_from": None if bounds.cost is None else _tolerances_from(bounds),
        }

    def table(self) -> Table:
        """For people: one line for each case and replay."""
        from rich.table import Table
        from rich.text import Text

        bound, state_bound = (self.bounds.widest(q).max_error for q in ("logits", "state"))
        caption = [
            f"Errors are relative: logits in standard deviations of the case's (at most {bound:.2g}), "
            f"states in units of the head's largest value (at most {state_bound:.2g}).",
            self.bounds.sentence,
            *([] if self.step_bounds is None else [f"{', '.join(STEPPED)}: {self.step_bounds.sentence}"]),
            *self.coverage,
            *(found.sentence for found in self.drift),
            *self.left_out,
        ]
        table = Table(title=f"{self.runner}, {self.dtype}", caption="\n".join(caption))
        for name in ("case", "replay"):
            table.add_column(name)
        for name in ("checks", "logits", "states", "padding", "1 - cosine", "top-1", "KL", "seconds"):
            table.add_column(name, justify="right")
        table.add_column("result")
        for r in self.results:
            table.add_row(
                r.case,
                r.replay,
                str(r.checks),
                _number(r.logits_error),
                _number(r.state_error),
                _number(r.padding_error),
                _number(None if r.cosine is None else max(1 - r.cosine, 0.0)),
                "-" if r.top1 is None else f"{100 * r.top1:.1f}%",
                _number(r.kl),
                f"{r.seconds:.2f}",
                Text("pass", style="green") if r.passed else Text.assemble(("FAIL", "red"), f" ({r.failed})"),
            )
        return table


def validate(
    runner: Runner,
    reference: Reference,
    *,
    dtype: str = "float32",
    activations: Mapping[str, Activations] | None = None,
    cases: Sequence[str] | None = None,
    replays: Sequence[str] | None = None,
    progress: ProgressFactory = silent,
) -> Report:
    """Replay recorded cases through `runner` and compare logits and states.

    Args:
        runner: any runner; only the protocol is used.
        reference: `Bundle.reference()`.
        dtype: the bundle's, which chooses the tolerances together with
        activations: of products of quantised matrices, for "prefill" and "step"; None for float weights.
        cases: names of recorded cases; default all.
        replays: names from `replay.REPLAYS`; default all that make sense for a case.
        progress: for the runner's calls.

    Raises:
        UsageError: an unknown case or replay.
        BundleError: the record contradicts itself, or was made for another type.
        RunnerError: the runner cannot run the model at all.
    """
    chosen = _replays(replays)
    names = _cases(reference, cases)
    prefill = (activations or {}).get("prefill", "float")
    of_step = (activations or {}).get("step", "float")
    bounds = _bounds(reference, dtype, prefill)
    step_bounds = None if of_step == prefill else _bounds(reference, dtype, of_step)
    results: list[ReplayResult] = []
    failures: list[Check] = []
    skipped: list[Skipped] = []

    def collect(summary: Summary, checks: Iterable[Check]) -> None:
        start = time.perf_counter()
        for check in checks:
            summary.add(check)
            if not check.comparison.passed and len(failures) < MAX_FAILURES:
                failures.append(check)
        results.append(summary.result(time.perf_counter() - start))

    seen = SeenRows(runner.spec)
    for name in names:
        case, replayer = _replayer(runner, reference, name, bounds)
        stepper = replayer if step_bounds is None else _replayer(runner, reference, name, step_bounds)[1]
        bad = replayer.bad_record()
        if bad is not None:
            collect(Summary(name, "record"), [bad])
            continue
        for way in chosen:
            reason = replayer.skip_reason(way)
            if reason is not None:
                skipped.append(Skipped(name, way, reason))
                continue
            with progress(f"Validating {name}, {way}", replayer.calls(way), "items") as bar:
                judge = stepper if way in STEPPED else replayer
                collect(Summary(name, way), judge.run(way, bar.advance))
            seen.add(case)
    return Report(
        runner.name,
        dtype,
        tuple(results),
        tuple(failures),
        tuple(skipped),
        bounds.cost,
        seen.embedding,
        seen.positions,
        step_bounds,
        prefill,
    )


def _bounds(reference: Reference, dtype: str, activations: Activations) -> Bounds:
    cost = reference.rounding_cost if activations == "float" else reference.rounding_cost_int8
    if cost is not None and cost.dtype != dtype:
        raise BundleError(
            f"the rounding cost in {reference.path} was measured for another type than the bundle's",
            got=cost.dtype,
            expected=dtype,
            hint="export the checkpoint again",
        )
    return Bounds(dtype, cost, activations)


def _replayer(
    runner: Runner, reference: Reference, name: str, bounds: Bounds
) -> tuple[ReferenceCase | EmbeddingCase, RowsReplayer | EmbeddingReplayer]:
    if name == EMBEDDING and reference.embedding is not None:
        return reference.embedding, EmbeddingReplayer(runner, reference.embedding, bounds)
    return reference.cases[name], RowsReplayer(runner, reference.cases[name], bounds)


def _tolerances_from(bounds: Bounds) -> dict[str, Any]:
    assert bounds.cost is not None
    layers = range(len(bounds.cost.layers))
    return {
        "rounding_cost": bounds.cost.to_json(),
        "scale": asdict(scale_of(bounds.row)),
        "at_ceiling": bounds.at_ceiling,
        "state_max_error": [bounds.state(layer).max_error for layer in layers],
    }


def _cases(reference: Reference, names: Sequence[str] | None) -> tuple[str, ...]:
    known = (*reference.cases, *([EMBEDDING] if reference.embedding else []))
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise UsageError(
                f"the bundle has no recorded case {name!r}", expected=f"one of {', '.join(known)}"
            )
    return tuple(name for name in known if name in names)


def _replays(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(REPLAYS)
    for name in names:
        if name not in REPLAYS:
            raise UsageError(f"there is no replay {name!r}", expected=f"one of {', '.join(REPLAYS)}")
    return tuple(name for name in REPLAYS if name in names)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _hint(first: Check) -> str:
    if first.quantity == "reference":
        return "the bundle's recorded cases are corrupt: export the checkpoint again"
    if first.quantity == "kept":
        return "the runtime changes the state of rows that have no tokens left"
    if first.quantity == "padding":
        return "a row's result depends on how much padding stands beside it"
    return "the bundle's weights or graphs, or the runtime, are not what the record was made with"
