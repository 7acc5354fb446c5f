"""Text from files, tools and other people's libraries, made fit for a terminal: the one place that does it.

Names in manifests, tensor names, paths, messages of runtimes: any of them may hold what a terminal obeys
(escape sequences, carriage returns), what turns the order of letters round, or a hundred megabytes. Errors,
logs, tables and progress bars pass through here; `--json` through `json_text`.
"""

from __future__ import annotations

import json
import re
from typing import Any

MOST = 2000
"""Characters of one part of an error message; a longer one is cut, and says so."""

# Controls but newline and tab (Unicode's Cc), marks and overrides of writing direction (Bidi_Control of
# PropList.txt, Unicode 16), line and paragraph separators, and halves of surrogate pairs, which Python puts
# into names that are not in the file system's encoding.
_ODD = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[\x00-\x08\x0b-\x1f{_ODD}]")
_UNPRINTABLE_IN_JSON = re.compile(f"[{_ODD}]")


def printable(text: str, most: int | None = None) -> str:
    r"""`text` with control characters as Python writes them, such as \x1b; line ends and tabs stay.

    Args:
        text: from anywhere.
        most: characters to keep; what is cut off is counted behind an ellipsis. None keeps all.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}… ({len(text) - most:,} more characters)"
    return _UNPRINTABLE.sub(_escaped, text)


def json_text(value: Any, *, encoding: str | None, indent: int | None = None) -> str:
    r"""JSON for a stream: what the stream's encoding lacks, and what a terminal would obey, as \u escapes.

    Args:
        value: what json.dumps takes; NaN and infinities are refused.
        encoding: of the stream, None if that is unknown.
        indent: as json.dumps has it.

    Raises:
        ValueError: a number is not finite.
    """
    unicode = encoding is not None and encoding.lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=indent, ensure_ascii=not unicode, allow_nan=False)
    return _UNPRINTABLE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
