"""A tokenizer's files, of a vocabulary that needs no training."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel


def write_tokenizer(folder: Path, vocab: int, extra_tokens: int = 0) -> None:
    """A byte-level tokenizer: every byte one token, and `<|endoftext|>` as id 0 where `vocab` has room.

    `extra_tokens` adds that many tokens after the bytes (to make a vocabulary that is too large).
    """
    if vocab < 256:
        raise ValueError("a byte-level tokenizer needs vocab >= 256")
    alphabet = sorted(ByteLevel.alphabet())
    names = (["<|endoftext|>"] if vocab > 256 else []) + alphabet
    names += [f"extra{i}" for i in range(extra_tokens)]
    tok = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tok.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = ByteLevelDecoder()
    if vocab > 256:
        tok.add_special_tokens(["<|endoftext|>"])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
