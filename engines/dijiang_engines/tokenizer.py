"""Text to token ids and back, from tokenizer.json alone.

A tokenizer may need the bytes of several tokens for one character, so text is given out as a stream:
`TextStream.push` returns what is certain, and never half a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import BundleError

MAX_TOKENIZER_BYTES = 256 << 20

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 3
"""A character is at most 4 bytes, so at most this many bytes of one can be waiting for the rest."""
_CONTEXT = 8
_LONGEST_WINDOW = 32


class Tokenizer:
    """A tokenizer.json. Nothing else of a checkpoint is consulted, and no code of its is run."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BundleError: the file is missing, too large, or not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        try:
            size = path.stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise BundleError(
                    f"{path} is too large", got=f"{size} bytes", expected=f"<= {MAX_TOKENIZER_BYTES}"
                )
            self._backend: Any = Backend.from_file(str(path))
        except OSError as error:
            raise BundleError(f"cannot read {path}", got=error.strerror) from error
        except BundleError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} is not a tokenizer", got=" ".join(str(error).split())[:200]) from error
        # A file saved after training may still cut or pad its inputs; a generator must do neither.
        self._backend.no_truncation()
        self._backend.no_padding()

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """All token ids, ascending: [n] int64."""
        return np.array(sorted(set(self._backend.get_vocab(True).values())), dtype=np.int64)

    def token_mask(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        """[vocab_size] bool: which of the model's ids are tokens. Padded vocabularies have ids that are not.

        Tokens that were added to the tokenizer beyond the model's vocabulary, such as <pad>, are left out.

        Raises:
            BundleError: another token's id is beyond the model's vocabulary.
        """
        ids = self.ids
        added = self._backend.get_added_tokens_decoder()
        foreign = [i for i in ids[ids >= vocab_size].tolist() if i not in added]
        if foreign:
            raise BundleError(
                "the tokenizer has a token that the model does not have",
                got=f"token id {foreign[-1]}",
                expected=f"ids below {vocab_size}",
                hint="the tokenizer belongs to another model",
            )
        mask = np.zeros(vocab_size, np.bool_)
        mask[ids[ids < vocab_size]] = True
        return mask

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the tokens that the tokenizer puts around a text (such as LLaMA's <s>)
        if `special_tokens`. Special tokens that are spelt out in the text are recognised."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token as it is spelt in the vocabulary, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token(self, token_id: int) -> str | None:
        """A token as it is spelt in the vocabulary, or None."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    def special_ids(self) -> list[int]:
        """Ids of the tokens that are marked as special, ascending."""
        return sorted(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """A stream of text that continues `context`."""
        return TextStream(self, context)


class TextStream:
    """Turns tokens into text as they come.

    Decoding is done over a short window, because a token's text can depend on those before it (a leading
    space, the bytes of a character), but never on all of them.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)[-_CONTEXT:]
        self._old = len(self._window)
        """Tokens of the window whose text is given out and that serve as context only."""
        self._given = len(tokenizer.decode(self._window))
        """Characters of the window's text that have been given out."""

    def push(self, token: int) -> str:
        """The text that has become certain with this token; may be empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        pending = len(text) - len(text.rstrip(_REPLACEMENT))
        certain = len(text) - min(pending, _MOST_PENDING)
        fresh = text[self._given : certain]
        self._given = max(self._given, certain)
        if fresh and not pending:
            self._forget(self._old, text)
        elif len(self._window) > _LONGEST_WINDOW:  # bytes that are no text, or tokens without any
            self._forget(len(self._window) - _CONTEXT, text)
        return fresh

    def finish(self) -> str:
        """What is still held back: half a character, as U+FFFD."""
        text = self._tokenizer.decode(self._window)
        fresh, self._given = text[self._given :], len(text)
        return fresh

    def _forget(self, count: int, text: str) -> None:
        """Drop the window's first `count` tokens; the characters that are held back stay held back."""
        held = len(text) - self._given
        self._window = self._window[count:]
        self._old = len(self._window)
        self._given = max(0, len(self._tokenizer.decode(self._window)) - held)
