"""Prompts from the command line, files and standard input, as text that a tokenizer can take."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dijiang_engines.errors import PromptError

STDIN = "-"
MAX_PROMPT_BYTES = 256 << 20


def read_prompt(source: str | Path) -> str:
    """The text of a file, which may be a pipe such as `<(command)`, or of standard input if `source` is "-".

    One line end at the end of the text is left out: editors and `echo` add one that nobody means. A byte
    order mark at the beginning too.

    Raises:
        PromptError: it cannot be read, is larger than 256 MiB, or is not UTF-8.
    """
    name = "standard input" if str(source) == STDIN else str(source)
    try:
        if str(source) == STDIN:
            if sys.stdin is None:  # closed by whoever started this program: `<&-`
                raise PromptError("cannot read the prompt from standard input", got="it is closed")
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with open(source, "rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, a closed file
        got = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"cannot read the prompt from {name}", got=got) from error
    if len(data) > MAX_PROMPT_BYTES:
        raise PromptError(f"the prompt in {name} is too large", expected=f"at most {MAX_PROMPT_BYTES} bytes")
    text = decode_prompt(data, name)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def decode_prompt(data: bytes, name: str) -> str:
    """Bytes as text.

    Raises:
        PromptError: they are not UTF-8; the message says where.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the prompt in {name} is not UTF-8",
            got=f"byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from error


def check_argument(text: str, name: str) -> str:
    """An argument of the command line, which Python hands over with its undecodable bytes escaped.

    In a locale that is not UTF-8, such as POSIX, these may be UTF-8 all the same.

    Raises:
        PromptError: they are not.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            data = os.fsencode(text)
        except UnicodeEncodeError:
            raise PromptError(f"{name} holds half a surrogate pair", hint="give valid text") from None
        return decode_prompt(data, name)
    return text
