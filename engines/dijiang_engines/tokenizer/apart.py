"""A tokenizer in a process of its own, which may take so much time and memory and no more.

Neither can be limited from within: the library holds the interpreter's lock while it works, allocates until
the system has no more, and panics where it meets a limit of its own.
"""

from __future__ import annotations

import array
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.process_apart import end, limit, receive, send

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
        self._data, self._name = data, name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def load(self) -> None:
        """Start, if it has not: then the library can load the file within the limits.

        Raises:
            BundleError: it cannot, or fails.
        """
        self._ask(b"", b"")

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
        with self._lock:
            try:
                if self._process is None:
                    at_work = len(self._data)
                    self._start()
                at_work = len(data)
                return self._call(kind, data) if kind else b""
            except (OSError, EOFError):
                raise self._failed(at_work) from None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dijiang_engines.tokenizer.apart", str(SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {
                "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false",
                "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0",
            },
        )  # fmt: skip
        weakref.finalize(self, end, self._process)
        self._call(b"L", self._data)

    def _call(self, kind: bytes, data: bytes) -> bytes:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        send(process.stdin, kind, data)
        status, answer = receive(process.stdout)
        if status != b"K":
            raise BundleError(f"the tokenizer {self._name} fails", got=answer.decode()[:200])
        return answer

    def _failed(self, size: int) -> BundleError:
        process, self._process = self._process, None
        assert process is not None
        end(process)
        if process.returncode == -signal.SIGXCPU:
            return BundleError(
                f"the tokenizer {self._name} takes too long",
                got=f"more than {SECONDS + SECONDS_PER_MEGABYTE * size / 1e6:.0f} s for {size} bytes",
                hint="its regular expressions, or its vocabulary, make it very slow",
            )
        return BundleError(
            f"the tokenizer {self._name} needs too much memory, or ends its process",
            got=f"{size} bytes of text, exit code {process.returncode}",
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
        limit(seconds, BYTES + len(data) * (_LOADING_BYTES_PER_BYTE if kind == b"L" else BYTES_PER_BYTE))
        try:
            if kind == b"L":
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
            status = b"K"
        except BaseException as error:  # noqa: BLE001  the library's panics are no Exception
            status, answer = b"E", " ".join(str(error).split()).encode("utf-8", "replace")
        send(sys.stdout.buffer, status, answer)


if __name__ == "__main__":
    main()
