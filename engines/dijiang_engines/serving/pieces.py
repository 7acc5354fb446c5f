"""How a prompt is cut into pieces, and what names the state after each of them.

A state that was computed in other pieces differs in its last bits. So the cuts follow from the prompt and
from where its messages end alone, and a state's key tells all cuts before it: whoever finds a state under a
key has exactly what reading would have given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def piece_ends(tokens: int, piece: int, splits: Iterable[int] = (), start: int = 0) -> list[int]:
    """Where the pieces of a prompt end, ascending; the last is `tokens`.

    Args:
        tokens: of the prompt.
        piece: most tokens of a piece.
        splits: places where a piece ends in any case; those outside (start, tokens) are left out.
        start: tokens that are read already.
    """
    ends: list[int] = []
    for split in (*sorted({s for s in splits if start < s < tokens}), tokens):
        ends += range(start + piece, split, piece)
        ends.append(split)
        start = split
    return ends


def state_keys(salt: bytes, ids: Sequence[int], ends: Iterable[int]) -> Iterator[bytes]:
    """The key of the state after each piece: a keyed chain of hashes of 128 bits.

    Args:
        salt: at most 64 bytes that other users do not know.
        ids: token ids of the prompt.
        ends: where pieces end, ascending.
    """
    array, begin, link = np.asarray(ids, np.int64), 0, b""
    for end in ends:
        digest = hashlib.blake2b(link, key=salt[:64], digest_size=16)
        digest.update(array[begin:end].tobytes())
        begin, link = end, digest.digest()
        yield link
