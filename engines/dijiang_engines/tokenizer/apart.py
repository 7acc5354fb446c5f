"""A tokenizer in a process of its own, which may take so much time and memory and no more.

Neither can be limited from within: the library holds the interpreter's lock while it works, allocates until
the system has no more, and panics where it meets a limit of its own.
"""

from __future__ import annotations

import array
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.limited_process import (
    DONE,
    FAILED,
    LOAD,
    LimitedProcess,
    ProcessEndedError,
    limit_process,
    receive,
    send,
)

SECONDS = 10.0
SECONDS_PER_MEGABYTE = 20
"""Of CPU, for each call. The slowest of the usual tokenizers take 2 for a megabyte on a slow core."""
BYTES = 1 << 30
BYTES_PER_BYTE = 600
"""The library takes up to 290 bytes for a byte of text, when every character is a token."""
_TOKENS, _TOKENS_PER_BYTE = 1 << 17, 16
_LOADING_BYTES_PER_BYTE = 64


class TokenizerApart:
    """Encodes and decodes as the library does, in another process that starts when it is first needed.

    Args:
        data: tokenizer.json.
        name: the file's name, for messages.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._name = name
        self._process = LimitedProcess(
            command_for("dijiang_engines.tokenizer.apart"), data,
            {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )  # fmt: skip

    def load(self) -> None:
        """Start, if it has not: then the library can load the file within the limits.

        Raises:
            BundleError: it cannot, or fails.
        """
        self._answer(lambda: self._process.start(SECONDS))

    def encode(self, text: str, special_tokens: bool) -> list[int]:
        """Token ids of a text.

        Raises:
            BundleError: it takes too long, or too much memory, or the library fails.
        """
        data = text.encode()
        ids = array.array("I", self._ask(b"S" if special_tokens else b"E", data))
        self._check_count(len(ids), len(data))
        return ids.tolist()

    def encode_with_ends(self, text: str, special_tokens: bool) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the character before which each of them ends, 0 for those around it.

        Raises:
            BundleError: as `encode`.
        """
        data = text.encode()
        both = array.array("I", self._ask(b"T" if special_tokens else b"O", data)).tolist()
        count = len(both) // 2
        self._check_count(count, len(data))
        return both[:count], both[count:]

    def _check_count(self, tokens: int, size: int) -> None:
        most = _TOKENS + _TOKENS_PER_BYTE * size
        if tokens > most:
            raise BundleError(
                f"the tokenizer {self._name} makes too many tokens of a text",
                got=f"{tokens} tokens of {size} bytes", expected=f"at most {most}",
            )  # fmt: skip

    def decode(self, tokens: Sequence[str]) -> str:
        """The text of tokens.

        Raises:
            BundleError: as `encode`.
        """
        return self._ask(b"D", json.dumps(list(tokens)).encode()).decode()

    def _ask(self, kind: bytes, data: bytes) -> bytes:
        return self._answer(lambda: self._process.ask(kind, data, SECONDS))

    def _answer(self, ask: Callable[[], tuple[bytes, bytes]]) -> bytes:
        try:
            status, answer = ask()
        except ProcessEndedError as error:
            raise self._ended(error) from None
        if status != DONE:
            raise BundleError(f"the tokenizer {self._name} fails", got=answer.decode()[:200])
        return answer

    def _ended(self, error: ProcessEndedError) -> BundleError:
        if error.too_long:
            seconds = SECONDS + SECONDS_PER_MEGABYTE * error.size / 1e6
            return BundleError(
                f"the tokenizer {self._name} takes too long",
                got=f"more than {seconds:.0f} s for {error.size} bytes",
                hint="its regular expressions, or its vocabulary, make it very slow",
            )
        return BundleError(
            f"the tokenizer {self._name} needs too much memory, or ends its process",
            got=f"{error.size} bytes of text, exit code {error.code}",
        )


# -- in the other process --------------------------------------------------------------------------------


def main() -> None:
    """Answer calls until there are no more."""
    from tokenizers import Tokenizer

    backend: Any = None
    while True:
        try:
            kind, data = receive(sys.stdin.buffer)
        except EOFError:
            return
        seconds = float(sys.argv[1]) + SECONDS_PER_MEGABYTE * len(data) / 1e6
        limit_process(
            seconds, BYTES + len(data) * (_LOADING_BYTES_PER_BYTE if kind == LOAD else BYTES_PER_BYTE)
        )
        try:
            if kind == LOAD:
                backend = Tokenizer.from_str(data.decode())
                backend.no_truncation()
                backend.no_padding()
                answer = b""
            elif kind == b"D":
                answer = backend.decoder.decode(json.loads(data)).encode()
            else:
                encoding = backend.encode(data.decode(), add_special_tokens=kind in b"ST")
                ends = [end for _, end in encoding.offsets] if kind in b"TO" else []
                answer = array.array("I", [*encoding.ids, *ends]).tobytes()
            status = DONE
        except BaseException as error:  # noqa: BLE001  the library's panics are no Exception
            status, answer = FAILED, " ".join(str(error).split()).encode("utf-8", "replace")
        send(sys.stdout.buffer, status, answer)


if __name__ == "__main__":
    main()
