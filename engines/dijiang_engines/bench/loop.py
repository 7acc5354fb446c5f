"""What `generate` takes per token, as its caller sees it: `Generator` over a runner, greedy, never stopping.

A step of a runner is one call. The loop around it also chooses the token, hands it on and turns it into
text; a runner with a decode loop of its own on the device does part of that there. Both are measured by
the same clock: from one step's last token to the last step's, over the number of steps between.
"""

from __future__ import annotations

import time

import numpy as np

from dijiang_engines.generation.generator import GenerateOptions, Generator
from dijiang_engines.generation.session import Session
from dijiang_engines.runners.base import Runner
from dijiang_engines.tokenizer.tokenizer import Tokenizer

LOOP_STEPS = 64
"""Steps of one generation. Its first comes on top and is not timed: it also loads and reads the text."""


def loop_steps(limit: int | None) -> int:
    """Steps of one generation by a model that knows `limit` positions (None: no end); 0 if it has no room."""
    return LOOP_STEPS if limit is None else max(min(LOOP_STEPS, limit - 1), 0)


def loop_start(position: int, limit: int | None) -> int:
    """The position, `position` or before it, from which `loop_steps(limit)` steps fit."""
    return position if limit is None else max(min(position, limit - 1 - loop_steps(limit)), 0)


class Loop:
    """Generations of `batch` rows that all start at one position.

    The state that they start from is zero: what is in it changes no time.

    Args:
        runner: any runner.
        batch: rows.
        position: how many tokens the state holds; less if the model then has no room for the steps.
        tokenizer: the model's; the loop then also makes text, as the command does.

    Attributes:
        position: where the generations start.
        steps: of each.
    """

    def __init__(self, runner: Runner, batch: int, position: int, tokenizer: Tokenizer | None) -> None:
        spec = runner.spec
        self.position = loop_start(position, spec.max_positions)
        self.steps = loop_steps(spec.max_positions)
        self._generator = Generator(runner, tokenizer)
        rng = np.random.default_rng(0)
        vocab = spec.vocab_size
        known = np.arange(vocab) if tokenizer is None else np.flatnonzero(tokenizer.token_mask(vocab))
        self._session = Session(
            [np.zeros((batch, *spec.state_shape), np.float32) for _ in range(spec.num_layers)],
            np.full(batch, self.position, np.int64),
            [rng.choice(known, self.position + 1).tolist() for _ in range(batch)],
        )
        self._options = GenerateOptions(max_tokens=self.steps + 1, ignore_eos=True)

    def seconds_per_step(self) -> float:
        """Run one generation; seconds of one token of every row."""
        batch = self._session.batch
        generation = self._generator.start([], self._options, session=self._session)
        begun, count = 0.0, 0
        for _ in generation:
            count += 1
            if count == batch:
                begun = time.perf_counter()
        ended = time.perf_counter()
        return (ended - begun) * batch / (count - batch)
