"""Recompute a DiJiang checkpoint's held-out numbers with dijiang_export's reference model.

    python samples/train_tiny/check.py samples/tiny-stdlib --windows 1024 8192

This is a second implementation (recurrent state, chunked form), so it can also carry the state through
windows longer than the model was trained on, which the official code cannot.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from corpus import describe, read_corpus
from evaluate import encode, held_out
from tokenizers import Tokenizer

from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.reference.model import ReferenceModel


class Adapter(torch.nn.Module):
    """Gives ReferenceModel the calling convention that `evaluate` uses."""

    def __init__(self, reference: ReferenceModel) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """input_ids [B, L] -> .logits [B, L, V]."""
        return SimpleNamespace(logits=self.reference(input_ids)[0])


def main(arguments: list[str] | None = None) -> None:
    """Print one JSON line for each window length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--stdlib", type=Path, help="library folder (default: this Python's own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, nargs="+", default=[1024])
    args = parser.parse_args(arguments)
    documents = read_corpus(args.stdlib)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    tokens = encode([d for d in documents if d.split == "held-out"], tokenizer)
    with open_checkpoint(args.checkpoint) as checkpoint:
        reference = ReferenceModel(checkpoint.spec, device=args.device)
        reference.load_state_dict(checkpoint.load_state_dict())
    print(json.dumps({"corpus_sha256": describe(documents)["sha256"], "checkpoint": args.checkpoint.name}))
    for window in args.windows:
        result = held_out(Adapter(reference), tokens, window, tokens_at_once=16384)
        print(json.dumps({"window": window, "held_out": result}), flush=True)


if __name__ == "__main__":
    main()
