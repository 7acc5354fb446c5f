"""llguidance as this project uses it: a vocabulary of bytes, its grammars, and its limits.

Grammars of strangers are tried in `grammar_apart` first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

Kind = Literal["schema", "regex"]

_LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": True,
    "verbose_errors": False,
}
"""LLParserLimits of llguidance 1.9: masks take milliseconds, a text's states 50 MB at worst."""
WHITESPACE = r"\r?\n[ \t]{0,40}|[ \t]{1,40}"
"""Between JSON's values: one line end and an indentation, or some blanks. By default there may be any number,
and a weak model goes on with blanks for ever."""
_ESCAPES = 'nrbtf\\"'
"""Without \\uXXXX, with which a name that a schema knows could be spelt like one that it does not know."""
# The model chooses its tokens even where a grammar leaves no choice of text. Otherwise the library has the
# rest of such a text tokenized for each mask: 10 ms a token where 20 KB are fixed.
_OPTIONS = '%llguidance {"no_forcing": true}\n'


class Vocabulary:
    """A vocabulary of bytes, in the form that LLTokenizer asks for.

    Args:
        tokens: [V], the bytes of each; None for what is not text.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        # One more than the model has: an end of text, for models that have none.
        self.tokens = [
            *(f"<{n}>".encode() if data is None else data for n, data in enumerate(tokens)),
            b"<end>",
        ]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [*(n for n, data in enumerate(tokens) if data is None), len(tokens)]

    def __call__(self, text: str) -> NoReturn:
        """Tokens of a text, which nothing asks for: see _OPTIONS."""
        raise NotImplementedError


def tokenizer_for(vocabulary: Vocabulary, ends: Sequence[int]) -> Any:
    """LLTokenizer of a vocabulary, with the tokens that end a text."""
    from llguidance import LLTokenizer

    return LLTokenizer(vocabulary, eos_token=[*ends, vocabulary.eos_token_id])  # type: ignore[arg-type]


def matcher_for(tokenizer: Any, kind: Kind, text: str) -> Any:
    """LLMatcher of a grammar; whether it has an error is to be asked.

    Args:
        tokenizer: LLTokenizer.
        kind: what `text` is: a JSON schema that `json_schema` has read, or a regular expression.
        text: the grammar.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
    grammar = LLMatcher.grammar_from_lark(_OPTIONS + _rule(kind, text))
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _rule(kind: Kind, text: str) -> str:
    if kind == "regex":
        from llguidance import regex_to_lark

        return f"start: /{regex_to_lark(text, '')}/\n"
    options = {
        "whitespace_pattern": WHITESPACE, "json_allowed_escapes": _ESCAPES, "lenient": False,
        "coerce_one_of": False,
    }  # fmt: skip
    return f"start: %json {json.dumps(json.loads(text) | {'x-guidance': options})}\n"
