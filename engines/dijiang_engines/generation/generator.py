"""The way in to generating text: prompts are checked here and become the rows of one generation (`loop`).

    generator = Generator(open_runner(bundle), Tokenizer(bundle.tokenizer_path))
    generation = generator.start(["def main("], GenerateOptions(max_tokens=50))
    for event in generation:
        print(event.text, end="", flush=True)

Prompts of a batch may differ in length: they are right-padded, and a row that is done gets no more tokens
while the others go on. What a row becomes does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import PromptError, UsageError
from dijiang_engines.generation.loop import Completion, GenerateOptions, Generation, Stats, TokenEvent
from dijiang_engines.generation.row import Row, begin_row
from dijiang_engines.generation.session import Session
from dijiang_engines.runners.base import Runner
from dijiang_engines.runners.checks import last_position, position_error
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Completion", "GenerateOptions", "Generation", "Generator", "SamplingOptions", "Stats", "TokenEvent",
]  # fmt: skip


class _Earlier(NamedTuple):
    """A row of a session."""

    token_ids: list[int]
    consumed: int
    held: int


DEFAULT_MAX_TOKENS = 128
_MOST_SILENT = 16
"""Tokens at the end of a text that are looked at first for whether there is any: mostly they say so."""
PREFILL_TOKENS = 2048
"""Tokens of all rows together that one prefill call takes; bounds the memory for activations."""


class Generator:
    """Generates with one runner.

    Args:
        runner: any runner.
        tokenizer: the model's; without one, prompts are token ids and there is no text.
        prefill_tokens: how many prompt tokens, of all rows together, one call may take.

    Raises:
        BundleError: the tokenizer has tokens that the model does not have.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None = None, *, prefill_tokens: int = PREFILL_TOKENS
    ) -> None:
        if prefill_tokens < 1:
            raise UsageError("prefill-tokens must be at least 1", got=prefill_tokens)
        self.runner = runner
        self.tokenizer = tokenizer
        self.prefill_tokens = prefill_tokens
        # Ids that pad the vocabulary are no tokens: their logits are whatever the padding rows give.
        self.banned: npt.NDArray[np.int64] | None = None
        if tokenizer is not None:
            self.banned = np.flatnonzero(~tokenizer.token_mask(runner.spec.vocab_size))

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at least one. An empty prompt is the model's beginning-of-text token.

        Raises:
            PromptError: the prompt is empty and the model has no such token.
        """
        if self.tokenizer is None:
            raise UsageError("the bundle has no tokenizer", hint="give token ids instead of text")
        ids = self.tokenizer.encode(prompt)
        bos = self.runner.spec.bos_token_id
        if not ids and bos is not None and bos < self.runner.spec.vocab_size:
            ids = [bos]
        if not ids:
            raise PromptError(
                "the prompt is empty, and the model has no beginning-of-text token to start from",
                hint="give at least one character",
            )
        return ids

    def start(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: GenerateOptions | None = None,
        *,
        session: Session | None = None,
        first_stream: int = 0,
    ) -> Generation:
        """Check everything and hand out the generation, which runs as it is iterated over.

        Args:
            prompts: text or token ids, one per row. With a session: one per row of it, where "" adds
                nothing, or none at all.
            options: when to stop and how to choose; greedy by default.
            session: what to go on from.
            first_stream: number of the first row's stream of random numbers; the others follow. Rows of
                a long list that is generated in groups keep their own numbers this way.

        Raises:
            PromptError: an empty prompt where there is nothing to start from.
            PositionError: a prompt, or prompt and max_tokens together, beyond the model's last position.
            UsageError: no prompt at all, or another number than the session's.
        """
        options = options or GenerateOptions()
        if options.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer")
        rows = [
            self._row(index, prompt, earlier, options, first_stream + index)
            for index, (prompt, earlier) in enumerate(self._pair(prompts, session))
        ]
        guides = None
        if options.grammar is not None:
            guides = [options.grammar.guide(at_start=self.at_start(row.ids)) for row in rows]
        return Generation(self.runner, rows, options, session, self.prefill_tokens, self.banned, guides)

    def at_start(self, ids: Sequence[int]) -> bool:
        """There is no text before what is generated, whatever tokens there are."""
        if self.tokenizer is None:
            return False
        return not self.tokenizer.decode(ids[-_MOST_SILENT:]) and not self.tokenizer.decode(ids)

    def _pair(
        self, prompts: Sequence[str | Sequence[int]], session: Session | None
    ) -> list[tuple[str | Sequence[int], _Earlier | None]]:
        if session is None:
            if not prompts:
                raise UsageError("there is no prompt")
            return [(prompt, None) for prompt in prompts]
        if prompts and len(prompts) != session.batch:
            raise UsageError(
                "the number of prompts is not the number of texts in the session",
                got=len(prompts),
                expected=f"{session.batch}, or none to go on as they are",
            )
        held = [0] * session.batch if session.held is None else session.held.tolist()
        earlier = map(_Earlier, session.token_ids, session.positions.tolist(), held)
        return list(zip(prompts or [""] * session.batch, earlier, strict=True))

    def _row(
        self,
        index: int,
        prompt: str | Sequence[int],
        earlier: _Earlier | None,
        options: GenerateOptions,
        stream_id: int,
    ) -> Row:
        old, consumed, held = earlier or _Earlier([], 0, 0)
        if not isinstance(prompt, str):
            new = list(prompt)
        elif earlier is None:
            new = self.encode(prompt)
        else:
            new = self.tokenizer.encode(prompt, special_tokens=False) if prompt and self.tokenizer else []
        if not old and not new:
            raise PromptError("a prompt has no tokens", hint="give at least one")
        self.check_tokens(new, spelt=isinstance(prompt, str))
        limit = self._room(index, len(old) + len(new), options.max_tokens)
        return begin_row(
            self.tokenizer, old, new, consumed=consumed, held=held, limit=limit, stream_id=stream_id,
            stop=options.stop,
        )  # fmt: skip

    def check_tokens(self, ids: Sequence[int], *, spelt: bool = False) -> None:
        """Whether these are tokens of the model.

        Args:
            ids: of a prompt.
            spelt: the tokenizer made them of a text, and messages spell them.

        Raises:
            PromptError: one is not.
        """
        vocab = self.runner.spec.vocab_size
        foreign = next((i for i in ids if not 0 <= i < vocab), None)
        if foreign is not None:
            known = self.tokenizer if spelt else None
            shown = "" if known is None else f"{known.token(foreign)!r}, "
            raise PromptError(
                "a prompt holds a token id that the model does not have",
                got=f"{shown}id {foreign}",
                expected=f"ids 0 to {vocab - 1}",
            )

    def _room(self, index: int, tokens: int, wanted: int | None) -> int:
        """How many tokens to generate after `tokens`: the last one is never read, so it needs no position."""
        spec, most = self.runner.spec, last_position(self.runner)
        if tokens > most:
            raise position_error(spec, index, tokens, most=most)
        room = most - tokens + 1
        if wanted is not None and wanted > room:
            raise position_error(
                spec, index, tokens + wanted - 1,
                f"the prompt has {tokens} tokens: ask for at most --max-tokens {room}, or leave it out",
                most=most,
            )  # fmt: skip
        return min(DEFAULT_MAX_TOKENS, room) if wanted is None else wanted
