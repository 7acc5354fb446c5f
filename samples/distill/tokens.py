"""Streams of tokens, and the windows that are cut from them.

A stream is separator, document, separator, document, ... Training windows begin anywhere in it; which ones a
step gets follows from the seed, the stage and the step alone: a resumed run sees what it would have seen.
Held-out windows lie side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dijiang_engines.errors import TextError, UsageError

from .text import Document

LIBRARY_LIMIT = 1 << 16
"""Characters that are given to the tokenizer at a time: some slow down on long texts without a break."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a checkpoint, which `convert` has seen to fit.

    Raises:
        UsageError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no tokenizer.json", hint="save the tokenizer with the model")
    return Tokenizer.from_file(str(path))


def encode(documents: Sequence[Document], tokenizer: Tokenizer, separator: int) -> Tensor:
    """Documents as one stream, int32 [N]: each begins with the separator."""
    pieces, starts = [], []
    for document in documents:
        starts.append(len(pieces))
        pieces += _pieces(document.text)
    encodings = tokenizer.encode_batch(pieces, add_special_tokens=False)
    ids: list[int] = []
    begins = set(starts)
    for index, encoding in enumerate(encodings):
        ids += [separator, *encoding.ids] if index in begins else encoding.ids
    return torch.tensor(ids, dtype=torch.int32)


def _pieces(text: str) -> list[str]:
    """A text in parts of at most about LIBRARY_LIMIT characters, cut before a line."""
    out, start = [], 0
    while len(text) - start > LIBRARY_LIMIT:
        cut = text.rfind("\n", start + 1, start + LIBRARY_LIMIT)
        cut = cut if cut > start else start + LIBRARY_LIMIT
        out.append(text[start:cut])
        start = cut
    return [*out, text[start:]]


@dataclass(frozen=True)
class Streams:
    """What is trained on and what is held out, by kind ("text", "samples", names of other texts).

    train, held_out: int32 [N] each. shares: how much of a batch is of each kind in `train`.
    """

    train: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    shares: Mapping[str, float]

    def check(self, context: int) -> None:
        """Refuse streams from which no window can be cut.

        Raises:
            TextError: one is shorter than a context.
        """
        for group, streams in (("training", self.train), ("held-out", self.held_out)):
            for kind, ids in streams.items():
                if len(ids) <= context:
                    raise TextError(
                        f"the {group} {kind} is shorter than one context",
                        got=f"{len(ids)} tokens",
                        expected=f"more than {context}",
                        hint="give more files, or a smaller --context",
                    )

    def batch(self, seed: str, rows: int, context: int) -> Tensor:
        """Training windows int64 [rows, context + 1], the same for the same seed."""
        generator = torch.Generator().manual_seed(number(seed))
        offsets = torch.arange(context + 1)
        out, left = [], rows
        kinds = [kind for kind in self.train if self.shares[kind] > 0]
        for kind in kinds:
            count = left if kind == kinds[-1] else min(left, round(rows * self.shares[kind]))
            left -= count
            starts = torch.randint(len(self.train[kind]) - context, (count, 1), generator=generator)
            out.append(self.train[kind][starts + offsets])
        return torch.cat(out).long()

    def windows(self, kind: str, context: int, most: int) -> Tensor:
        """The first held-out windows of a kind, side by side: int64 [n <= most, context]."""
        ids = self.held_out[kind]
        count = min(most, len(ids) // context)
        return ids[: count * context].view(count, context).long()

    def save(self, path: Path) -> None:
        """Keep the streams for a run that goes on, all or none."""
        tensors = {f"train.{k}": v for k, v in self.train.items()}
        beside = path.with_suffix(".new")
        save_file(tensors | {f"held_out.{k}": v for k, v in self.held_out.items()}, beside)
        beside.replace(path)


def load_streams(path: Path, shares: Mapping[str, float]) -> Streams:
    """What `Streams.save` kept."""
    parts: dict[str, dict[str, Tensor]] = {"train": {}, "held_out": {}}
    for name, ids in load_file(path).items():
        group, kind = name.split(".", 1)
        parts[group][kind] = ids
    return Streams(parts["train"], parts["held_out"], shares)


def number(seed: str) -> int:
    """63 bits from a text."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
