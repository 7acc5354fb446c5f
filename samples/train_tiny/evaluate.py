"""Held-out loss: perplexity per token, and bits per byte, which does not depend on the tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from corpus import Document
from tokenizer import END
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Tokens:
    """One split as a stream: END, document, END, document, ..., END.

    ids int64 [n]; in_tests bool [n]: the token belongs to one of CPython's own tests.
    """

    ids: torch.Tensor
    in_tests: torch.Tensor
    bytes: int
    test_bytes: int


def encode(documents: list[Document], tokenizer: Tokenizer) -> Tokens:
    """Tokenize documents, in their order. Each document's closing END counts as part of it."""
    end = tokenizer.token_to_id(END)
    ids, flags = [end], [False]
    encodings = tokenizer.encode_batch([d.text for d in documents])
    for document, encoding in zip(documents, encodings, strict=True):
        ids += [*encoding.ids, end]
        flags += [document.is_test] * (len(encoding.ids) + 1)
    return Tokens(
        torch.tensor(ids),
        torch.tensor(flags),
        sum(d.size for d in documents),
        sum(d.size for d in documents if d.is_test),
    )


@torch.no_grad()
def token_losses(model: Any, ids: torch.Tensor, context: int, tokens_at_once: int) -> torch.Tensor:
    """Negative log-likelihoods in nats, float64 [n-1], of ids[1:], each predicted once.

    The stream is cut into windows of `context`; nothing is carried from one window to the next.
    Runs in float32 wherever the model is.
    """
    model.eval()
    device = next(model.parameters()).device
    batch = max(1, tokens_at_once // context)
    whole = (len(ids) - 1) // context * context
    windows = list(ids[:whole].view(-1, context).split(batch)) if whole else []
    targets = list(ids[1 : whole + 1].view(-1, context).split(batch)) if whole else []
    if whole < len(ids) - 1:
        windows.append(ids[None, whole:-1])
        targets.append(ids[None, whole + 1 :])
    losses = []
    for x, y in zip(windows, targets, strict=True):
        logits = model(x.to(device), use_cache=False).logits.float()
        losses.append(cross_entropy(logits.flatten(0, 1), y.to(device).flatten(), reduction="none").cpu())
    return torch.cat(losses).double()


def held_out(model: Any, tokens: Tokens, context: int, tokens_at_once: int = 65536) -> dict[str, Any]:
    """Perplexity per token and bits per byte: over everything, the library alone, the tests alone.

    `tokens_at_once` bounds memory; it changes nothing else.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    losses = token_losses(model, tokens.ids, context, tokens_at_once)
    torch.set_float32_matmul_precision(precision)
    in_tests = tokens.in_tests[1:]
    everything = torch.ones_like(in_tests)
    parts = {
        "all": (everything, tokens.bytes),
        "library": (~in_tests, tokens.bytes - tokens.test_bytes),
        "tests": (in_tests, tokens.test_bytes),
    }
    result = {}
    for name, (mask, size) in parts.items():
        if size:
            nats = losses[mask].sum().item()
            result[name] = {
                "tokens": int(mask.sum()),
                "bytes": size,
                "loss": nats / int(mask.sum()),
                "perplexity": math.exp(nats / int(mask.sum())),
                "bits_per_byte": nats / math.log(2) / size,
            }
    return result
