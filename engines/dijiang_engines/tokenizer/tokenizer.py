"""Text to token ids and back, from tokenizer.json alone.

Text that grows is given out as a stream (`text_stream`), never as half a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import BundleError, PromptError
from dijiang_engines.formats.safe_files import LIMITS, read_bounded
from dijiang_engines.tokenizer.apart import TokenizerApart
from dijiang_engines.tokenizer.decoder_stages import (
    Pipeline,
    agrees,
    guarded,
    library_call,
    pipeline_for,
    whole,
)
from dijiang_engines.tokenizer.file import only_normalizer
from dijiang_engines.tokenizer.text_stream import TextStream
from dijiang_engines.tokenizer.token_bytes import token_bytes
from dijiang_engines.tokenizer.work import (
    check_vocabulary,
    decoding_is_bounded,
    encoding_is_bounded,
    normalizing_is_bounded,
)

__all__ = ["MAX_TOKENIZER_BYTES", "TextStream", "Tokenizer"]

MAX_TOKENIZER_BYTES = LIMITS["tokenizer"]


class Tokenizer:
    """A tokenizer.json. Nothing else of a checkpoint is consulted, and no code of its is run.

    What may take more work than its text is worth, such as regular expressions that nobody knows, is done in
    a process of its own, within limits.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            BundleError: the file is missing, too large, no ordinary file, or not a tokenizer.
        """
        from tokenizers import Tokenizer as Backend

        data = read_bounded(path, MAX_TOKENIZER_BYTES, links=True)
        check_vocabulary(data)
        apart = TokenizerApart(data, path.name)
        normalizer = only_normalizer(data, str(path))
        with library_call(f"{path} is not a tokenizer"):
            if not normalizing_is_bounded(Backend.from_str(normalizer)):
                apart.load()  # the library normalizes added tokens; what it can do there it can do here
            self._backend: Any = Backend.from_buffer(data)
            # A file saved after training may still cut or pad its inputs; a generator must do neither.
            self._backend.no_truncation()
            self._backend.no_padding()
        self._path = path
        self._encodes_here = encoding_is_bounded(self._backend)
        self._decodes_here = decoding_is_bounded(self._backend)
        self._apart = None if self._encodes_here and self._decodes_here else apart

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
        if `special_tokens`. Special tokens that are spelt out in the text are recognised.

        Raises:
            PromptError: the text is not valid Unicode.
            BundleError: the tokenizer fails, or needs too much time or memory.
        """
        _check_text(text)
        if self._apart is not None and not self._encodes_here:
            return self._apart.encode(text, special_tokens)
        with library_call(f"the tokenizer {self._path} fails to encode a text"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def encode_with_ends(self, text: str, special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Token ids as `encode` gives them, and before which of the text's characters each token ends.

        A token that the tokenizer puts around the text ends at 0, wherever it stands.

        Raises:
            PromptError, BundleError: as `encode`.
        """
        _check_text(text)
        if self._apart is not None and not self._encodes_here:
            return self._apart.encode_with_ends(text, special_tokens)
        with library_call(f"the tokenizer {self._path} fails to encode a text"):
            encoding = self._backend.encode(text, add_special_tokens=special_tokens)
            return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            BundleError: as `encode`.
        """
        if self._apart is not None and not self._decodes_here:
            names = self._names(ids) if skip_special else map(self._backend.id_to_token, ids)
            return self._apart.decode([name for name in names if name is not None])
        with library_call(f"the tokenizer {self._path} fails to decode tokens"):
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

    def token_bytes(self, vocab_size: int) -> list[bytes | None]:
        """[vocab_size]: the bytes that each token adds to a text; None for special tokens and for ids that
        are no tokens.

        Raises:
            BundleError: they depend on a token's neighbours, or are only known in a process apart.
        """
        if not self._decodes_here:
            raise BundleError(
                "texts cannot be kept to a grammar with this tokenizer",
                got="a decoder whose work is not bounded",
            )
        mask = self.token_mask(vocab_size)
        names = [self._known[i] if mask[i] else None for i in range(vocab_size)]
        return token_bytes(self._backend.decoder, names)

    def stream(self, context: Sequence[int] = (), *, held: int = 0) -> TextStream:
        """A stream of text that continues `context`, without special tokens.

        Args:
            context: the ids that come before.
            held: how many characters at the end of the context's text an earlier stream has held back.
        """
        return TextStream(self._pipeline.copy(), self._names, context, held)

    def continuation(self, context: Sequence[int], new: Sequence[int]) -> str:
        """The text that `new` adds to that of `context`: what a stream gives, at once."""
        stream = self.stream(context)
        return "".join(map(stream.push, new)) + stream.finish()

    def _names(self, ids: Sequence[int]) -> list[str]:
        """The tokens of `ids`, as decoding sees them: without special ones, and without ids that are none."""
        known = self._known
        return [name for name in [known[i] for i in ids] if name is not None]

    @cached_property
    def _known(self) -> _Names:
        return _Names(self._backend)

    @cached_property
    def _pipeline(self) -> Pipeline:
        if self._apart is not None and not self._decodes_here:
            return whole(self._apart.decode)
        decoder = self._backend.decoder
        sample = self._names(self.ids[:: max(1, self.ids.size // 256)].tolist())
        if decoder is not None and sample and not agrees(decoder, sample):
            return whole(guarded(decoder.decode))
        return pipeline_for(decoder)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError("a text holds half a surrogate pair", got=f"at character {error.start}") from error


class _Names(dict[int, "str | None"]):
    """What each id is called, or None for special tokens and ids without a token; asked for when needed."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        tokens = backend.get_added_tokens_decoder().values()
        self._special = {token.content for token in tokens if token.special}

    def __missing__(self, token: int) -> str | None:
        with library_call("a token id is out of range"):
            name: str | None = self._backend.id_to_token(token)
        self[token] = None if name in self._special else name
        return self[token]
