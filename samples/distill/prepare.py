"""From texts and the teacher to streams of tokens."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from dijiang_engines.errors import UsageError

from .own_samples import Writer
from .settings import Settings
from .teacher import Teacher
from .text import documentation, read_files
from .tokens import Streams, encode, read_tokenizer

HELD_SAMPLES = 16
"""One of so many of the teacher's own samples is held out."""
SAMPLE = 512
"""Tokens of one."""
MEMORY_SHARE = 3
"""Their caches take one part of so many of a GPU's memory."""


def make_streams(settings: Settings, teacher: Teacher) -> Streams:
    """Read and tokenize everything, and let the teacher write.

    Raises:
        TextError: a text is not readable.
        UsageError: there is no tokenizer, or no separator.
    """
    config = teacher.net.config
    tokenizer = read_tokenizer(settings.teacher)
    separator = _separator(settings, config, tokenizer)
    documents = read_files(settings.text) if settings.text else documentation()
    if settings.held_out:
        train, held = documents, read_files(settings.held_out)
    else:
        train = [document for document in documents if not document.held_out]
        held = [document for document in documents if document.held_out]
    streams = {"text": encode(train, tokenizer, separator)}
    held_out = {"text": encode(held, tokenizer, separator)}
    for name, path in settings.also:
        held_out[name] = encode(read_files([path]), tokenizer, separator)
    if settings.samples_tokens:
        rows = _own_samples(settings, teacher, separator)
        kept = max(1, len(rows) // HELD_SAMPLES)
        streams["samples"], held_out["samples"] = rows[kept:].flatten(), rows[:kept].flatten()
    return Streams(streams, held_out, shares(settings))


def shares(settings: Settings) -> dict[str, float]:
    """How much of a batch is of each kind."""
    own = settings.samples_share if settings.samples_tokens else 0.0
    return {"text": 1 - own, "samples": own}


def _separator(settings: Settings, config: Any, tokenizer: Tokenizer) -> int:
    if settings.separator is not None:
        token = tokenizer.token_to_id(settings.separator)
        if token is None:
            raise UsageError("the tokenizer has no such token", got=settings.separator)
        return int(token)
    for token in (config.bos_token_id, config.eos_token_id):
        if isinstance(token, int):
            return token
    raise UsageError(
        "the model names no token for the begin or end of a text", hint="name one with --separator"
    )


def _own_samples(settings: Settings, teacher: Teacher, separator: int) -> Tensor:
    """int32 [rows, tokens of one]."""
    config = teacher.net.config
    length = min(SAMPLE, settings.context)
    rows = -(-settings.samples_tokens // length)
    starts = sorted({separator, config.bos_token_id} - {None})
    on_gpu = teacher.head_weight.is_cuda
    turns = -(-rows // _rows_at_once(teacher, length))
    writer = Writer(teacher.half() if on_gpu else teacher, -(-rows // turns), length)
    total = turns * writer.rows * length
    with tqdm(total=total, desc="teacher's own samples", unit="tok", unit_scale=True, mininterval=10) as bar:
        parts = [writer.write(starts, f"{settings.seed} {turn}", bar.update) for turn in range(turns)]
    del writer
    if on_gpu:
        torch.cuda.empty_cache()
    return torch.cat(parts)[:rows]


def _rows_at_once(teacher: Teacher, length: int) -> int:
    """So many texts that their caches and probabilities fit."""
    if not teacher.head_weight.is_cuda:
        return 64
    config = teacher.net.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * 2 * config.num_hidden_layers * heads * size * length + 12 * config.vocab_size
    memory = torch.cuda.get_device_properties(teacher.head_weight.device).total_memory
    return int(max(1, min(4096, memory // MEMORY_SHARE // each)))
