"""Text as tokens come: what is given out never changes again, and all of it together is what decoding gives.

A token's text may depend on those after it: the bytes of a character may be spread over several tokens, and
some decoders undo a whole run of bytes when one of them fits no character. Such text is held back until it
is certain (`decoder_stages` says when), also from one run of the program to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dijiang_engines.tokenizer.decoder_stages import Pipeline, common_length

_BLOCK = 1 << 16
"""Tokens of the context that are worked on at once."""


class TextStream:
    """The text of a growing list of tokens, from where its context's text ends.

    If decode(context) is how decode(context + new) begins, then the pieces add up to the rest. Where it is
    not, because the context ends within a character, or in bytes that the new tokens undo, they begin with
    the first character that differs.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        names: Callable[[Sequence[int]], list[str]],
        context: Sequence[int] = (),
        held: int = 0,
    ) -> None:
        """
        Args:
            pipeline: a fresh pipeline of the tokenizer's decoder.
            names: gives the tokens of ids, leaving out those without text.
            context: ids that come before.
            held: how many characters at the end of the context's text have not been given out yet.
        """
        self._pipeline, self._names = pipeline, names
        certain = ""
        for start in range(0, len(context), _BLOCK):
            certain += pipeline.push(names(context[start : start + _BLOCK]))
            certain = certain[len(certain) - min(held, len(certain)) :]
        uncertain = pipeline.copy().finish()
        self._ready = certain[len(certain) - min(max(0, held - len(uncertain)), len(certain)) :]
        """Certain, and not given out yet."""
        self._expected = uncertain[: max(0, len(uncertain) - held)]
        """Was given out before it was certain; it is not given out again if it comes so."""

    def push(self, token: int) -> str:
        """The text that has become certain with this token; may be empty."""
        return self._fresh(self._pipeline.push(self._names([token])))

    def finish(self) -> str:
        """The rest of the text, if no more tokens come. Half a character is U+FFFD."""
        return self._fresh(self._pipeline.finish())

    def rest(self) -> str:
        """What `finish` would return, while the stream may go on."""
        text = self._pipeline.copy().finish()
        return self._ready + text[common_length(text, self._expected) :]

    def _fresh(self, text: str) -> str:
        common = common_length(text, self._expected)
        differs = common < min(len(text), len(self._expected))
        self._expected = "" if differs else self._expected[common:]
        ready, self._ready = self._ready, ""
        return ready + text[common:]
