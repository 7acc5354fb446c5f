"""Measure a runner: prefill, steps near and far, batches, the loop of `generate`, and what memory allows.

Times of prefills and steps are seconds of one call of the runner, as NumPy callers see it: sampling and
tokenization are not in them. The loop's are of one token of every row, all included. Every figure is the
median of single calls (of single generations) after a warm-up, with the 10th and 90th percentiles.

Where a runner `TimesSteps` or `CountsMemory` (runners/base.py), the GPU's own times and its memory come too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from dijiang_engines.bench.bandwidth import Bandwidth
from dijiang_engines.bench.loop import Loop, loop_start, loop_steps
from dijiang_engines.bench.report import BenchReport, LoopTime, Prefill, Step
from dijiang_engines.bench.timing import Effort, Timing, until_done
from dijiang_engines.errors import DijiangError, UsageError
from dijiang_engines.inspection import step_bytes
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.runners.base import CountsMemory, IntArray, Runner, State, TimesSteps
from dijiang_engines.sizes import weight_bytes
from dijiang_engines.tokenizer.tokenizer import Tokenizer
from dijiang_engines.weight_formats import Matrix

PREFILL_LENGTHS = (128, 512, 2048)
BATCHES = (1, 2, 4, 8)
NEAR, FAR = 100, 100_000
"""Positions whose step times are compared: only a number differs, so the times must not."""
WARM_UP_STEPS = 5
BLOCK = 8
"""Near and far steps alternate in blocks of this many, so that a slow moment hits both."""
USUAL_EFFORT = Effort()
LEAST_LOOPS = 3
"""Generations for a figure of the loop, at least."""
LONGEST_TEXT = 10_000_000
"""Tokens that the loop may start behind: it goes on from a text, of which the host holds every token."""


def bench_runner(
    runner: Runner,
    dtype: str,
    *,
    quantised: Mapping[str, Sequence[Matrix]] | None = None,
    lengths: Sequence[int] = PREFILL_LENGTHS,
    batches: Sequence[int] = BATCHES,
    positions: Sequence[int] = (NEAR, FAR),
    effort: Effort = USUAL_EFFORT,
    bandwidth: Bandwidth | None = None,
    tokenizer: Tokenizer | None = None,
    progress: ProgressFactory = silent,
    seed: int = 0,
) -> BenchReport:
    """Measure a runner.

    Args:
        runner: what is measured.
        dtype: the bundle's, and
        quantised: which of its matrices are: for the number of bytes that a step reads.
        lengths: of prefills. Those of one row are all measured, those of more rows (`batches`) where all
            rows together have no more tokens than the longest of one row. What the model cannot hold is
            left out.
        batches: rows of steps and of the loop. Every size is measured at the first position, size 1 at all.
        positions: of steps; cut to what the model knows.
        effort: how long to measure each figure.
        bandwidth: of this machine, for comparison.
        tokenizer: the model's; the loop then also makes text.
        progress: one unit for each figure.
        seed: of the random tokens.

    What the runner refuses, such as more rows than an engine was built for, is left out with a note.

    Raises:
        RunnerError: the runner cannot run the model at all.
    """
    spec = runner.spec
    limit = spec.max_positions
    notes = []
    fitting = [n for n in lengths if limit is None or n <= limit]
    if len(fitting) < len(lengths):
        left = ", ".join(str(n) for n in lengths if n not in fitting)
        notes.append(f"prefill of {left} tokens left out: the model holds {limit}")
    places = list(positions)
    if limit is not None:
        places = sorted({min(p, max(limit - WARM_UP_STEPS - BLOCK, 0)) for p in positions})
        if places != list(positions):
            notes.append(f"steps at positions {places}: the model holds {limit} tokens")
    rng = np.random.default_rng(seed)

    def tokens(batch: int, length: int) -> IntArray:
        return rng.integers(0, spec.vocab_size, (batch, length))

    prompts = [(1, n) for n in fitting]
    prompts += [(b, n) for b in batches for n in fitting if b > 1 and b * n <= max(fitting)]
    spots = {batch: places if batch == 1 else places[:1] for batch in batches}
    figures = len(prompts) + 2 * sum(len(here) for here in spots.values())
    prefills: list[Prefill] = []
    steps: list[Step] = []
    loops: list[LoopTime] = []
    with progress(f"Measuring {runner.name}", figures, "items") as bar:
        load = _load(runner, tokens)
        for batch, length in prompts:
            with _left_out(notes, f"prefill of {_rows(batch)}{length} tokens"):
                timing = Timing.of(_prefill_seconds(runner, tokens(batch, length), effort))
                prefills.append(Prefill(batch, length, timing))
            bar.advance()
        for batch, here in spots.items():
            with _left_out(notes, f"steps of {_rows(batch)}one token"):
                steps += _steps(runner, batch, here, tokens, effort)
            bar.advance(len(here))
        for batch, here in spots.items():
            for position in here:
                with _left_out(notes, f"the loop of {_rows(batch)}one token at {position}"):
                    loops += _loop(runner, batch, position, tokenizer, effort, loops, steps)
                bar.advance()
    return BenchReport(
        runner=runner.name,
        dtype=dtype,
        weight_bytes=weight_bytes(spec, dtype, quantised),
        step_bytes=step_bytes(spec, dtype, quantised),
        state_bytes=spec.state_bytes,
        load_seconds=load,
        prefill=tuple(prefills),
        steps=tuple(steps),
        bandwidth=bandwidth,
        notes=tuple(notes),
        loops=tuple(loops),
        memory=runner.memory() if isinstance(runner, CountsMemory) else None,
    )


def _rows(batch: int) -> str:
    return "" if batch == 1 else f"{batch} rows of "


@contextmanager
def _left_out(notes: list[str], what: str) -> Iterator[None]:
    """Turn the runner's refusal into a note; what it refuses is no reason to lose the rest."""
    try:
        yield
    except DijiangError as error:
        got = "" if error.got is None else f" ({error.got})"
        notes.append(f"{what}, left out: {error.what}{got}")


def _load(runner: Runner, tokens: Callable[[int, int], IntArray]) -> float:
    start = time.perf_counter()
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    state = runner.new_state(1)
    runner.prefill(tokens(1, 1), zero, one, state)
    runner.step(tokens(1, 1), one, one, state)
    return time.perf_counter() - start


def _prefill_seconds(runner: Runner, ids: IntArray, effort: Effort) -> list[float]:
    batch, length = ids.shape
    positions, lens = np.zeros(batch, np.int64), np.full(batch, length, np.int64)
    state: State = runner.new_state(batch)
    runner.prefill(ids, positions, lens, state)
    seconds = []
    for _ in until_done(effort):
        state = runner.new_state(batch)
        start = time.perf_counter()
        runner.prefill(ids, positions, lens, state)
        seconds.append(time.perf_counter() - start)
    return seconds


def _loop(
    runner: Runner,
    batch: int,
    position: int,
    tokenizer: Tokenizer | None,
    effort: Effort,
    before: Sequence[LoopTime],
    steps: Sequence[Step],
) -> list[LoopTime]:
    """One figure; none where there is no room, or `before` has the only place where there is."""
    limit = runner.spec.max_positions
    start = loop_start(position, limit)
    if not loop_steps(limit) or any((x.batch, x.position) == (batch, start) for x in before):
        return []
    if start > LONGEST_TEXT:
        raise UsageError("no text so long is made up for it", got=start, expected=f"at most {LONGEST_TEXT}")
    loop = Loop(runner, batch, start, tokenizer)
    loop.seconds_per_step()
    few = Effort(effort.seconds, min(LEAST_LOOPS, effort.least), effort.most)
    timing = Timing.of([loop.seconds_per_step() for _ in until_done(few)])
    gpu = next((s.gpu for s in steps if (s.batch, s.position) == (batch, position)), None)
    return [LoopTime(batch, start, loop.steps, timing, None if gpu is None else gpu.median)]


def _steps(
    runner: Runner,
    batch: int,
    places: Sequence[int],
    tokens: Callable[[int, int], IntArray],
    effort: Effort,
) -> list[Step]:
    """One figure for each position, with the GPU's own times if the runner offers them."""
    timings = step_timings(runner, batch, places, tokens, effort)
    steps = []
    for position, timing in zip(places, timings, strict=True):
        gpu = None
        if isinstance(runner, TimesSteps):
            calls = max(effort.least, min(effort.most, timing.calls))
            if (limit := runner.spec.max_positions) is not None:  # the runner goes on by one each time
                calls = min(calls, max(limit - position - WARM_UP_STEPS, 1))
            gpu = Timing.of(runner.step_gpu_seconds(batch, position, calls))
        steps.append(Step(batch, position, timing, gpu))
    return steps


def step_timings(
    runner: Runner,
    batch: int,
    places: Sequence[int],
    tokens: Callable[[int, int], IntArray],
    effort: Effort,
) -> list[Timing]:
    """One timing for each position; their steps alternate in blocks.

    Args:
        runner: what is measured.
        batch: rows.
        places: positions.
        tokens: makes random token ids of that many rows and columns.
        effort: how long to measure each.
    """
    state: State = runner.new_state(batch)
    ones = np.ones(batch, np.int64)
    limit = runner.spec.max_positions
    seconds: list[list[float]] = [[] for _ in places]
    ids = tokens(64, batch)[..., None]
    offset = 0

    def step(place: int) -> float:
        nonlocal offset
        offset += 1
        position = place + offset if limit is None else place + offset % BLOCK
        start = time.perf_counter()
        runner.step(ids[offset % 64], np.full(batch, position, np.int64), ones, state)
        return time.perf_counter() - start

    for _ in range(WARM_UP_STEPS):
        step(places[0])
    enough = Effort(effort.seconds, -(-effort.least // BLOCK), -(-effort.most // BLOCK))
    for _ in until_done(enough):
        for place, kept in zip(places, seconds, strict=True):
            kept.extend(step(place) for _ in range(BLOCK))
    return [Timing.of(kept) for kept in seconds]
