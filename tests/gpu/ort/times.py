"""Times of every lowering of a bundle on ONNX Runtime, in one run, for on_cuda.py.

Times are a NumPy caller's: of one call, arrays copied to the GPU and logits copied back. `back_to_back`
queues steps without waiting for each, which is as near to the GPU's own time as ONNX Runtime lets one come.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu.checks import POSITIONS

from dijiang_engines.bench.runner import step_timings
from dijiang_engines.bench.timing import Effort, Timing, until_done
from dijiang_engines.generation.generator import PREFILL_TOKENS
from dijiang_engines.runners.onnxruntime.config import LOWERINGS
from dijiang_engines.runners.onnxruntime.cuda import CAPTURABLE, MAX_CAPTURES
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.onnxruntime.state import GRAPH_ID

if TYPE_CHECKING:
    from gpu.ort.on_cuda import Checks

BATCHES = (1, 4, 8)
ROOM = 12
"""Graphs that one check of times may still add to a runner: two for each state of a new size."""
DO_NOT_WAIT = "disable_synchronize_execution_providers"
"""ONNX Runtime's run option; without it a call returns when the GPU is done."""


class OrtTimes:
    """Times of a bundle's lowerings; the results go into the facts under "times".

    Args:
        checks: whose runners are timed.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._effort = Effort(checks.seconds, least=8, most=400)
        self._found: dict[str, Any] = checks.facts.setdefault("times", {})
        self._plain: dict[str, OrtRunner] = {}

    def steps(self) -> str:
        """Steps at several positions and batch sizes: every step graph, as a CUDA graph and without."""
        checks, rows = self._checks, []
        limit = checks.spec.max_positions
        places = [p for p in POSITIONS if limit is None or p + self._effort.most < limit]
        for name, runner in self._variants().items():
            for batch in BATCHES:
                here = places if batch == 1 else [places[0], places[-1]]
                timings = step_timings(runner, batch, here, checks.tokens, self._effort)
                for position, timing in zip(here, timings, strict=True):
                    rows.append(
                        {"variant": name, "batch": batch, "position": position, **microseconds(timing)}
                    )
        self._found["steps"] = rows
        return table(rows, ("batch", "position"), "wall_us")

    def prefill(self) -> str:
        """Prefills of each length, in one call and in pieces with the state carried."""
        checks = self._checks
        rows: list[dict[str, Any]] = []
        for name in checks.lowerings:
            if LOWERINGS[name][0] in {LOWERINGS[str(r["variant"])][0] for r in rows}:
                continue
            for length in checks.lengths:
                for piece in sorted({length, min(length, PREFILL_TOKENS), min(length, 512)}):
                    timing = self._prefill(checks.runners[name], length, piece)
                    rows.append({"variant": name, "length": length, "piece": piece, **microseconds(timing)})
        self._found["prefill"] = rows
        return table(rows, ("length", "piece"), "wall_us")

    def loop(self) -> str:
        """A token in the decode loop of `generate`, beside the step alone."""
        checks, rows = self._checks, []
        for name, runner in self._variants().items():
            for batch in (1, 8):
                wall = checks.loop_seconds(batch, runner, runs=2, tokens=200)
                step = step_timings(runner, batch, [200], checks.tokens, self._effort)[0].median
                rows.append(
                    {"variant": name, "batch": batch, "wall_us": 1e6 * wall, "step_us": 1e6 * step,
                     "overhead_us": 1e6 * (wall - step)}
                )  # fmt: skip
        self._found["loop"] = rows
        return table(rows, ("batch",), "wall_us") + table(rows, ("batch",), "overhead_us")

    def back_to_back(self) -> str:
        """Steps of one state queued one behind the other, and waited for once."""
        checks, rows = self._checks, []
        for name, runner in self._variants().items():
            for batch in BATCHES:
                rows.append({"variant": name, "batch": batch, "queued_us": 1e6 * self._queued(runner, batch)})
        self._found["back_to_back"] = rows
        assert checks.gpu is not None
        return table(rows, ("batch",), "queued_us")

    def _queued(self, runner: OrtRunner, batch: int, calls: int = 200) -> float:
        """Seconds of a step, the best of three times `calls`."""
        checks = self._checks
        assert checks.gpu is not None
        state, ones = runner.new_state(batch), np.ones(batch, np.int64)
        for n in range(4):  # both bindings, captured if they can be
            runner.step(checks.tokens(batch, 1), ones * n, ones, state)
        step = state.slot.step
        assert step is not None
        options = []
        for front in range(2):
            one = runner.sessions.run_options(GRAPH_ID, step.graph_id(front))
            one.add_run_config_entry(DO_NOT_WAIT, "1")
            options.append(one)
        best = float("inf")
        for _ in range(3):
            checks.gpu.synchronize()
            start = time.perf_counter()
            for n in range(calls):
                step.session.run_with_iobinding(step.bindings[n % 2], options[n % 2])
            checks.gpu.synchronize()
            best = min(best, (time.perf_counter() - start) / calls)
        return best

    def _variants(self) -> dict[str, OrtRunner]:
        """Each step graph once, and those that can be CUDA graphs also without."""
        checks = self._checks
        found: dict[str, OrtRunner] = {}
        for name in checks.lowerings:
            if name == "ort-step" and "ort" in checks.lowerings:
                continue  # the same step
            runner, capturable = checks.runners[name], LOWERINGS[name][1] in CAPTURABLE
            if not (checks.on_gpu and capturable):
                found[name] = runner
            else:
                graphs = runner.cuda_graphs
                if graphs.enabled and graphs.captured < MAX_CAPTURES - ROOM:  # else its steps may be plain
                    found[f"{name} graph"] = runner
                if name not in self._plain:
                    self._plain[name] = OrtRunner(
                        checks.bundle, checks.name, lowering=name, cuda_graph=False  # type: ignore[arg-type]
                    )  # fmt: skip
                found[name] = self._plain[name]
        return found

    def _prefill(self, runner: OrtRunner, length: int, piece: int) -> Timing:
        ids, zero = self._checks.tokens(1, length), np.zeros(1, np.int64)
        seconds = []
        for _ in until_done(Effort(self._effort.seconds, least=4, most=100)):
            state = runner.new_state(1)
            start = time.perf_counter()
            for begin in range(0, length, piece):
                part = ids[:, begin : begin + piece]
                runner.prefill(part, zero + begin, zero + part.shape[1], state)
            seconds.append(time.perf_counter() - start)
        return Timing.of(seconds[1:])


def microseconds(timing: Timing) -> dict[str, float]:
    """A timing for the record."""
    found = asdict(timing)
    times = {"wall_us": "median", "low_us": "low", "high_us": "high", "best_us": "best"}
    return {name: 1e6 * found[key] for name, key in times.items()} | {"calls": found["calls"]}


def table(rows: list[dict[str, Any]], keys: tuple[str, ...], value: str) -> str:
    """Lines of one place each, with a column for each variant."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    places = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    lines = [
        "",
        "     " + "".join(f"{k:>10}" for k in keys) + "".join(f"{v:>16}" for v in (*variants, value)),
    ]
    for place in places:
        here = {row["variant"]: row[value] for row in rows if tuple(row[key] for key in keys) == place}
        cells = "".join(f"{here[v]:>16.1f}" if v in here else f"{'-':>16}" for v in variants)
        lines.append("     " + "".join(f"{p:>10}" for p in place) + cells)
    return "\n".join(lines)
