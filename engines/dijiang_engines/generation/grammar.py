"""Grammars that a text is kept to: a JSON schema, any JSON object, a regular expression.

    grammars = Grammars(Tokenizer(bundle.tokenizer_path), runner.spec)
    options = GenerateOptions(grammar=grammars.json_schema({"type": "object"}))

llguidance says which tokens may come next (extra `guided`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.generation.grammar_apart import GrammarsApart
from dijiang_engines.generation.json_schema import read_schema
from dijiang_engines.generation.matchers import Kind, Vocabulary, matcher_for, tokenizer_for
from dijiang_engines.spec import ModelSpec
from dijiang_engines.tokenizer.tokenizer import Tokenizer

MAX_REGEX_CHARACTERS = 16_384
_KEPT = 64
"""Compiled grammars; requests mostly come with few different ones."""


class Grammars:
    """Makes grammars for one model. Any thread may call it.

    Args:
        tokenizer: the model's.
        spec: the model's.

    Raises:
        UsageError: llguidance is not here.
        BundleError: texts cannot be kept to a grammar with this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        _require_llguidance()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Kind, str], Grammar] = OrderedDict()
        self.tokens = tokenizer.token_bytes(spec.vocab_size)
        self.ends = [i for i in spec.eos_token_ids if 0 <= i < spec.vocab_size]
        # A token that ends a text is none of its text, whatever the tokenizer says of it.
        for end in self.ends:
            self.tokens[end] = None
        self._apart = GrammarsApart(self.tokens, self.ends)
        self._matchers = tokenizer_for(Vocabulary(self.tokens), self.ends)

    def json_schema(self, schema: object, what: str = "the JSON schema") -> Grammar:
        """JSON that a schema describes.

        Args:
            schema: JSON text, its bytes, or the value.
            what: names it in messages.

        Raises:
            UsageError: it is no schema, no text can be kept to it, or that would take too much.
        """
        return self._grammar("schema", json.dumps(read_schema(schema, what)), what)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self._grammar("schema", json.dumps({"type": "object"}), "the JSON object", trusted=True)

    def regex(self, pattern: object, what: str = "the regular expression") -> Grammar:
        """Text that a regular expression matches as a whole.

        Args:
            pattern: in the syntax of Rust's crate regex, without looking around.
            what: names it in messages.

        Raises:
            UsageError: it is no such expression, matches nothing, or would take too much.
        """
        if not isinstance(pattern, str):
            raise UsageError(f"{what} is not a text", got=repr(pattern)[:200])
        if not 0 < len(pattern) <= MAX_REGEX_CHARACTERS:
            raise UsageError(
                f"{what} is empty or too long",
                got=f"{len(pattern)} characters", expected=f"1 to {MAX_REGEX_CHARACTERS}",
            )  # fmt: skip
        try:
            pattern.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what} holds half a surrogate pair") from None
        return self._grammar("regex", pattern, what)

    @cached_property
    def changed_at_start(self) -> npt.NDArray[np.bool_]:
        """[V] bool: tokens that are other text where a text begins, such as words that lose a space."""
        found = np.zeros(len(self.tokens), np.bool_)
        for token, data in enumerate(self.tokens):
            if data is not None:
                found[token] = self._tokenizer.decode([token]) != data.decode("utf-8", "replace")
        return found

    def _grammar(self, kind: Kind, text: str, what: str, *, trusted: bool = False) -> Grammar:
        key = (kind, text)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        if not trusted:
            self._apart.check(kind, text, what)
        matcher = matcher_for(self._matchers, kind, text)
        if matcher.is_error():
            raise UsageError(f"{what} cannot be used", got=matcher.get_error())
        grammar = Grammar(self, matcher)
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar


def _require_llguidance() -> None:
    try:
        import llguidance  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(
            "texts are kept to a grammar with the Python package llguidance, which is not here",
            hint="pip install 'dijiang-export[guided]'",
        ) from None


class Grammar:
    """What a text is kept to. `Grammars` makes them."""

    def __init__(self, owner: Grammars, matcher: Any) -> None:
        self._owner, self._matcher = owner, matcher

    def guide(self, *, at_start: bool = False) -> GrammarGuide:
        """Keeps one text to the grammar.

        Args:
            at_start: there is no text before: some tokenizers take a space off a text's beginning, so tokens
                that would be changed by that cannot begin one.
        """
        excluded = self._owner.changed_at_start if at_start else None
        return GrammarGuide(self._matcher.deep_copy(), self._owner.ends, len(self._owner.tokens), excluded)


class GrammarGuide:
    """The `Guide` of one text.

    Args:
        matcher: LLMatcher, at the beginning of the text.
        ends: tokens that end a text.
        vocab_size: of the model.
        excluded: [vocab_size] bool, tokens that may not come first.

    Attributes:
        complete: the text so far satisfies the grammar, whether or not it could go on.
    """

    def __init__(
        self, matcher: Any, ends: list[int], vocab_size: int, excluded: npt.NDArray[np.bool_] | None
    ) -> None:
        self._matcher, self._ends, self._vocab_size = matcher, ends, vocab_size
        self._error: str | None = None
        self.complete = bool(matcher.is_accepting())
        self._allowed = self._mask()
        if excluded is not None:
            self._allowed &= ~excluded

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V] bool, at least one True: tokens that may come next.

        Raises:
            RunnerError: nothing may, or it cannot be computed within limits.
        """
        if self._error is None and not self._allowed.any():
            self._error = "the model has no token that can come next"
        if self._error is not None:
            raise RunnerError("a text cannot be kept to its grammar any longer", got=self._error)
        return self._allowed

    def accept(self, token: int) -> bool:
        """Take the token that came; True if the text is complete with it: it ended, or nothing can follow."""
        if token in self._ends:
            return True
        if self._error is None and not self._matcher.consume_token(token):
            self._error = self._matcher.get_error()
        if self._error is not None:
            return False
        self.complete = bool(self._matcher.is_accepting())
        self._allowed = self._mask()
        if not self.complete:
            return False
        others = self._allowed.copy()
        others[self._ends] = False
        return not others.any()

    def _mask(self) -> npt.NDArray[np.bool_]:
        """[V], what may come next; nothing after an error."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            self._error = self._matcher.get_error()
            return np.zeros(self._vocab_size, np.bool_)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return mask.view(np.bool_)
