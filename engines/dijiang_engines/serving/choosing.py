"""The next token of each of several texts that were asked for with different options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError
from dijiang_engines.generation.guide import Guide, keep_allowed
from dijiang_engines.runners.base import FloatArray
from dijiang_engines.sampling import SamplingOptions, Uniforms, sample
from dijiang_engines.serving.job import TokenOut


@dataclass
class Chooser:
    """How one text's tokens are chosen.

    Args:
        sampling: temperature and filters.
        uniforms: its random numbers.
        seen: [V] bool, tokens that the text has; None without a repetition penalty. Kept up to date here.
        guide: keeps it to a grammar.
        logprobs: as `JobOptions.logprobs`.
    """

    sampling: SamplingOptions
    uniforms: Uniforms
    seen: npt.NDArray[np.bool_] | None = None
    guide: Guide | None = None
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """The likeliest token is taken, and nothing else matters."""
        return self.sampling.greedy and self.seen is None and self.guide is None

    def choose(self, logits: FloatArray, banned: npt.NDArray[np.bool_] | None, index: int) -> int:
        """The next token of the text.

        Args:
            logits: [V], finite.
            banned: [V] bool, tokens that are never chosen.
            index: the token's place in the text, which is the number of its random number.

        Raises:
            RunnerError: there is nothing to choose.
        """
        scores: npt.NDArray[Any] = logits
        if self.guide is not None:
            scores = keep_allowed(scores, self.guide.allowed())
        if banned is not None:
            scores = np.where(banned, -np.inf, scores)
        uniforms = None
        if not self.sampling.greedy:
            uniforms = np.array([self.uniforms.at(index)])
        seen = None if self.seen is None else self.seen[None]
        token = int(sample(scores[None], self.sampling, uniforms, seen=seen)[0])
        if self.seen is not None:
            self.seen[token] = True
        return token


def choose(
    choosers: Sequence[tuple[Chooser, int]],
    logits: Sequence[FloatArray],
    banned: npt.NDArray[np.bool_] | None,
) -> list[int | RunnerError]:
    """The next token of every text, or why it has none: one text's trouble is not another's.

    Args:
        choosers: how, and the token's place in its text.
        logits: [V] each.
        banned: [V] bool, tokens that are never chosen.
    """
    found: list[int | RunnerError] = []
    for (chooser, index), row in zip(choosers, logits, strict=True):
        try:
            if not chooser.plain:
                found.append(chooser.choose(row, banned, index))
                continue
            best = int((row if banned is None else np.where(banned, -np.inf, row)).argmax())
            if not np.isfinite(row[best]):
                sample(row[None], chooser.sampling)  # says what is wrong
            found.append(best)
        except RunnerError as error:
            found.append(error)
    return found


def token_out(token: int, logits: FloatArray, logprobs: int | None) -> TokenOut:
    """A chosen token with what is to be said of its probability; equal ones in the order of ids."""
    if logprobs is None:
        return TokenOut(token)
    wide = logits.astype(np.float64)
    highest = wide.max()
    total = highest + np.log(np.exp(wide - highest).sum())
    top: dict[int, float] = {}
    if logprobs:
        count = min(logprobs, wide.size)
        least = np.partition(wide, -count)[-count]
        best = np.flatnonzero(wide >= least)
        order = best[np.argsort(-wide[best], kind="stable")][:count]
        top = {int(i): float(wide[i] - total) for i in order}
    return TokenOut(token, float(wide[token] - total), top)
