"""What was measured of a runner, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dijiang_engines.bench.bandwidth import Bandwidth
from dijiang_engines.bench.timing import Timing


@dataclass(frozen=True)
class Prefill:
    """`length` tokens of each of `batch` rows in one call."""

    batch: int
    length: int
    timing: Timing

    @property
    def tokens_per_second(self) -> float:
        """All rows' tokens over the median time."""
        return self.batch * self.length / self.timing.median


@dataclass(frozen=True)
class Step:
    """One token of each of `batch` rows."""

    batch: int
    position: int
    timing: Timing
    gpu: Timing | None = None
    """The GPU's own time for it, if the runner tells."""

    @property
    def tokens_per_second(self) -> float:
        """All rows' tokens over the median time."""
        return self.batch / self.timing.median


@dataclass(frozen=True)
class LoopTime:
    """The loop of `generate`: one token of each of `batch` rows, chosen and handed out."""

    batch: int
    position: int
    """Where the generations begin."""
    steps: int
    """Of each generation; a timing's calls are generations."""
    timing: Timing
    gpu: float | None = None
    """Median GPU seconds of a step there, if the runner tells."""

    @property
    def tokens_per_second(self) -> float:
        """All rows' tokens over the median time."""
        return self.batch / self.timing.median

    @property
    def overhead(self) -> float | None:
        """Seconds by which a token takes longer than its step on the GPU; None if that is not known."""
        return None if self.gpu is None else self.timing.median - self.gpu


@dataclass(frozen=True)
class BenchReport:
    """What `bench_runner` measured."""

    runner: str
    dtype: str
    weight_bytes: int
    step_bytes: int
    """Bytes of weights that a step reads."""
    state_bytes: int
    load_seconds: float
    """Of the first prefill and the first step, which load the sessions."""
    prefill: tuple[Prefill, ...]
    steps: tuple[Step, ...]
    bandwidth: Bandwidth | None
    notes: tuple[str, ...] = field(default_factory=tuple)
    loops: tuple[LoopTime, ...] = ()
    memory: dict[str, int] | None = None
    """Device bytes by kind, if the runner tells."""

    def step(self, *, batch: int = 1, near: bool = True) -> Step | None:
        """The steps of one batch size, near the beginning or far from it."""
        of_batch = sorted((s for s in self.steps if s.batch == batch), key=lambda s: s.position)
        return (of_batch[0] if near else of_batch[-1]) if of_batch else None

    @property
    def flatness(self) -> float | None:
        """Median step time far from the beginning over that near it, batch 1."""
        near, far = self.step(), self.step(near=False)
        if near is None or far is None or near is far:
            return None
        return far.timing.median / near.timing.median

    @property
    def bandwidth_share(self) -> float | None:
        """Weight bytes of a step over its median time, as a part of the measured reading speed."""
        step = self.step()
        if step is None or self.bandwidth is None:
            return None
        return self.step_bytes / step.timing.median / self.bandwidth.read

    @property
    def prefill_gain(self) -> float | None:
        """How many times faster the longest prefill of one row is than as many steps (at their median)."""
        step = self.step()
        longest = max((p for p in self.prefill if p.batch == 1), key=lambda p: p.length, default=None)
        if step is None or longest is None:
            return None
        return step.timing.median * longest.length / longest.timing.median

    def with_bandwidth(self, bandwidth: Bandwidth | None) -> BenchReport:
        """The same figures beside another measurement of the machine."""
        return replace(self, bandwidth=bandwidth)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, derived figures included."""
        rows = {
            "prefill": [asdict(p) | {"tokens_per_second": p.tokens_per_second} for p in self.prefill],
            "steps": [asdict(s) | {"tokens_per_second": s.tokens_per_second} for s in self.steps],
            "loops": [
                asdict(x) | {"tokens_per_second": x.tokens_per_second, "overhead": x.overhead}
                for x in self.loops
            ],
        }
        derived = {
            "far_over_near": self.flatness,
            "bandwidth_share": self.bandwidth_share,
            "prefill_over_steps": self.prefill_gain,
        }
        return asdict(self) | rows | {"derived": derived}
