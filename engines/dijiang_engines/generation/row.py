"""One text being generated: its tokens, and which of its text may be given out."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dijiang_engines.generation.stop import StopMatcher
from dijiang_engines.tokenizer.text_stream import TextStream
from dijiang_engines.tokenizer.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "error"]
"""eos: a token that ends a text came; stop: a stop string, or the text's grammar is complete; length: there
was no room for more; error: the text could not go on."""


@dataclass
class Row:
    """One text being generated."""

    ids: list[int]
    """The whole text: earlier session, prompt, new tokens."""
    consumed: int
    """How many of `ids` are in the state."""
    start: int
    """Where the new tokens begin."""
    prompt_tokens: int
    limit: int
    """Most new tokens."""
    stream_id: int
    """Which stream of random numbers it draws from."""
    text: TextStream | None = None
    stop: StopMatcher = field(default_factory=StopMatcher)
    held: int = 0
    """Characters at the end of the text that have not been given out."""
    opening: str = ""
    """Held back by the session, and given out before the first event."""
    parts: list[str] = field(default_factory=list)
    finish: FinishReason | None = None

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self.ids) - self.start

    def accept(
        self, token: int, eos_token_ids: Container[int], *, complete: bool = False, resumable: bool = False
    ) -> str:
        """Add a token, and end the row if it is the last.

        Args:
            token: the new one.
            eos_token_ids: tokens that end a text.
            complete: nothing can follow this token, says the text's guide.
            resumable: what is not certain when the row ends by its length is kept for whoever goes on.

        Returns:
            The text that became certain.
        """
        self.ids.append(token)
        text = ""
        if token in eos_token_ids:
            self.finish = "eos"
        elif self.text is not None:
            text = self.stop.push(self.text.push(token))
        if self.finish is None and complete:
            self.finish = "stop"
        if self.finish is None and not self.stop.found and self.new_tokens >= self.limit:
            self.finish = "length"
        if self.text is not None and self.finish == "length" and resumable:
            self.held = len(self.stop.held) + len(self.text.rest())
        elif self.text is not None and self.finish is not None:
            text += self.stop.push(self.text.finish()) + self.stop.flush()
            self.held = 0
        if self.stop.found:
            self.finish, self.held = "stop", 0
        self.parts.append(text)
        return text


def begin_row(
    tokenizer: Tokenizer | None,
    old: Sequence[int],
    new: Sequence[int],
    *,
    consumed: int = 0,
    held: int = 0,
    limit: int,
    stream_id: int,
    stop: Sequence[str] = (),
) -> Row:
    """A text before its first new token.

    Args:
        tokenizer: the model's; without one there is no text.
        old: tokens of an earlier session.
        new: tokens of the prompt.
        consumed: of both, those that are in the state.
        held: characters at the end of `old`'s text that were not given out.
        limit: most new tokens.
        stream_id: which stream of random numbers it draws from.
        stop: strings that end it.
    """
    ids = [*old, *new]
    row = Row(ids, consumed, len(ids), len(ids) - consumed, limit, stream_id, stop=StopMatcher(stop))
    if tokenizer is not None:
        if new and held:  # what was held back belongs before the new prompt
            row.opening, held = tokenizer.stream(old, held=held).finish(), 0
        row.held = held
        row.text = tokenizer.stream(ids, held=held)
    return row
