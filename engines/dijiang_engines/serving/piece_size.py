"""How many tokens of a prompt to read at a time: what a runner is asked, once, as the server starts.

Short pieces delay the texts of others little and are found again by more prompts; but a call has costs of its
own, such as weights of eight bits that are widened before they are multiplied, or a GPU that 64 rows do not
fill.
"""

from __future__ import annotations

import time

import numpy as np

from dijiang_engines.runners.base import Runner

SIZES = (64, 128, 256, 512)
"""Tokens, ascending; the first is taken if no other is worth its delay."""
GAIN = 1.25
"""How much faster per token a piece twice as long must be read."""
LONGEST_SECONDS = 1.0
"""What a piece may delay the texts of others by."""
CALLS = 2
"""Of each size, of which the fastest counts."""


def measured_piece(runner: Runner) -> int:
    """The length that `runner` reads well: doubled from 64 as long as that pays.

    Args:
        runner: nothing else uses it meanwhile.

    Returns:
        One of `SIZES`.

    Raises:
        RunnerError: the runner failed.
    """
    best, limit = SIZES[0], runner.spec.max_positions
    seconds = _seconds(runner, min(best, limit or best))
    for size in SIZES[1:]:
        if limit is not None and size > limit:
            break
        longer = _seconds(runner, size)
        if longer > LONGEST_SECONDS or longer * GAIN > seconds * size / best:
            break
        best, seconds = size, longer
    return best


def _seconds(runner: Runner, size: int) -> float:
    ids = np.random.default_rng(0).integers(0, runner.spec.vocab_size, (1, size))
    start, lens = np.zeros(1, np.int64), np.full(1, size, np.int64)
    state = runner.new_state(1)
    times = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        runner.prefill(ids, start, lens, state)
        times.append(time.perf_counter() - begin)
    return min(times)
