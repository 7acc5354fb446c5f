"""Trying a stranger's grammar in a process of its own, before it is used in this one.

Most bad grammars get an error from llguidance. Some take minutes or gigabytes to compile, and neither can be
limited from within; nor can a stack that overflows be caught.
"""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.generation.matchers import Kind, Vocabulary, matcher_for, tokenizer_for
from dijiang_engines.limited_process import (
    DONE,
    LOAD,
    LimitedProcess,
    ProcessEndedError,
    limit_process,
    receive,
    send,
)

SECONDS = 2.0
"""Of CPU, for a grammar and a few texts that keep to it. Usual ones take milliseconds."""
SECONDS_PER_MEGABYTE = 5
BYTES = 512 << 20
BYTES_PER_BYTE = 100
_STEPS, _TEXTS = 40, 2


class GrammarsApart:
    """Compiles grammars in another process, which starts when it is first needed.

    Args:
        tokens: [V], the bytes of each token, None for what is not text.
        ends: tokens that end a text.
    """

    def __init__(self, tokens: Sequence[bytes | None], ends: Sequence[int]) -> None:
        texts = [None if data is None else data.decode("latin-1") for data in tokens]
        self._process = LimitedProcess(
            command_for("dijiang_engines.generation.grammar_apart"),
            json.dumps([texts, list(ends)]).encode(), {"RUST_BACKTRACE": "0"},
        )  # fmt: skip

    def check(self, kind: Kind, text: str, what: str) -> None:
        """Compile a grammar and keep a few texts to it.

        Args:
            kind: what `text` is.
            text: the grammar.
            what: names it in messages.

        Raises:
            UsageError: it is wrong, unsupported, matches nothing, or takes too long or too much memory.
        """
        try:
            _, problem = self._process.ask(b"S" if kind == "schema" else b"R", text.encode(), SECONDS)
        except ProcessEndedError as error:
            if error.too_long:
                got = f"more than {SECONDS:.0f} s"
                raise UsageError(f"{what} takes too long to compile", got=got) from None
            raise UsageError(
                f"{what} needs too much memory, or ends its process", got=f"exit code {error.code}"
            ) from None
        if problem:
            raise UsageError(f"{what} cannot be used", got=problem.decode())


# -- in the other process --------------------------------------------------------------------------------


def main() -> None:
    """Answer calls until there are no more: what is wrong with a grammar, or nothing."""
    trial: _Trial | None = None
    while True:
        try:
            kind, data = receive(sys.stdin.buffer)
        except EOFError:
            return
        # A vocabulary of 260,000 tokens is 3 MB.
        seconds = float(sys.argv[1]) + SECONDS_PER_MEGABYTE * len(data) / 1e6
        limit_process(seconds, BYTES + BYTES_PER_BYTE * len(data))
        try:
            if kind == LOAD:
                trial, problem = _Trial(*json.loads(data)), ""
            else:
                assert trial is not None
                problem = trial.problem("schema" if kind == b"S" else "regex", data.decode())
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001  the library's panics are no Exception
            problem = str(error) or type(error).__name__
        send(sys.stdout.buffer, DONE, " ".join(problem.split())[:2000].encode("utf-8", "replace"))


class _Trial:
    def __init__(self, tokens: Sequence[str | None], ends: Sequence[int]) -> None:
        vocabulary = Vocabulary([None if text is None else text.encode("latin-1") for text in tokens])
        self._ends = [*ends, vocabulary.eos_token_id]
        self._tokenizer = tokenizer_for(vocabulary, ends)

    def problem(self, kind: Kind, text: str) -> str:
        """What is wrong with a grammar; "" if nothing is."""
        if kind == "regex" and (problem := _regex_problem(text)):
            return problem
        whole = matcher_for(self._tokenizer, kind, text)
        if whole.is_error():
            return _cause(whole.get_error())
        for number in range(_TEXTS):
            problem = self._walk(whole.deep_copy(), random.Random(number))  # noqa: S311  no secret
            if problem:
                return problem
        return ""

    def _walk(self, matcher: Any, rng: random.Random) -> str:
        import numpy as np

        for step in range(_STEPS):
            if matcher.is_stopped() and not matcher.is_error():
                return "" if step else "it matches the empty text alone"
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            if matcher.is_error():
                where = f"after {step} tokens of a trial text" if step else "at the beginning"
                return f"nothing can come {where}: {_cause(matcher.get_error())}"
            allowed = np.flatnonzero(bits)
            if not allowed.size:
                return "the model's tokens cannot spell it"
            if not step and np.isin(allowed, self._ends).all():
                return "it matches the empty text alone"
            matcher.consume_token(int(allowed[rng.randrange(allowed.size)]))
        return ""


def _cause(error: str) -> str:
    """What llguidance says is wrong, without the grammar that it was given and its own names of options."""
    error = re.split(r"\n\s*1 \| |<non-verbose/>", error)[0].strip()
    error = re.sub(r"^at \d+\(\d+\): ", "", error).removeprefix("failed to compile JSON schema: ")
    if "regex parse error" in error:  # regex-syntax: the expression, and in a last line what is wrong
        return "regular expression: " + error.rpartition("error: ")[2]
    if "coerce_one_of" in error:
        return "oneOf with alternatives of which one value may satisfy several: write anyOf"
    return error.replace("NoExtensionBias", "no text satisfies it")


def _regex_problem(pattern: str) -> str:
    """What llguidance takes for something else than other readers of regular expressions, without a word."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        return "a backslash at its end"
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        try:
            re.compile(pattern)
        except FutureWarning as warning:  # [a&&b], [[:alpha:]]: sets here, characters there
            return f"{warning}: write such characters with a backslash"
        except Exception:  # noqa: BLE001  not all that llguidance takes is known to Python
            return ""
    return ""


if __name__ == "__main__":
    main()
