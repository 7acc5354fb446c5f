"""Whether what a tokenizer does to a text takes work and memory in proportion to it.

A tokenizer.json is a stranger's program: its regular expressions can backtrack for years, its replacements
can double a text forty times. Nothing tells a good one from a bad one for certain, so the usual ones are
known here, and whatever else a file holds runs in a process of its own, within limits (`tokenizer_apart`).
"""

from __future__ import annotations

import base64
import json
from typing import Any

from dijiang_engines.errors import BundleError

MAX_UNIGRAM_CHARACTERS = 8 << 20
"""Of all pieces together; the library keeps some 350 bytes for each. The largest in use have 2 million."""
_UNIGRAM_WORTH_COUNTING = 8 << 20

_MOST_GROWTH = 64
"""How many bytes a byte of the text may become."""
_LONGEST_RESULT = 64
"""Of a character that SentencePiece normalizes. Unicode's longest, of U+FDFA, has 33 bytes."""
_LONGEST_WORD = 1000
"""WordPiece tries all pieces of a word: work grows with its square. The library's default is 100."""
_LONGEST_PIECE = 512
"""Unigram tries all pieces that begin at a character."""
_MOST_STEPS = 64

_ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    rf"{_ENGLISH}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}",  # LLaMA 3, and tiktoken's cl100k_base
    rf"{_ENGLISH}|{_LETTERS}|\p{{N}}|{_OTHERS}",  # Qwen 2
    r" {2,}",  # converted SentencePiece models
}
"""Every alternative is one run of one class, next to nothing that could be part of it: no backtracking."""

_NORMALIZERS = {
    "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents",
}  # fmt: skip
_PRE_TOKENIZERS = {
    "BertPreTokenizer", "CharDelimiterSplit", "Delimiter", "Digits", "FixedLength", "Metaspace",
    "Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
}  # fmt: skip
_DECODERS = {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Strip", "WordPiece"}


def check_vocabulary(data: bytes) -> None:
    """Refuse a Unigram vocabulary that would take the library gigabytes to hold.

    Raises:
        BundleError: it would.
    """
    if len(data) < _UNIGRAM_WORTH_COUNTING or b"Unigram" not in data:
        return
    try:
        pieces = json.loads(data)["model"]["vocab"]
        characters = sum(len(piece) for piece, _ in pieces)
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # the library says what is wrong with it
    if characters > MAX_UNIGRAM_CHARACTERS:
        raise BundleError(
            "the tokenizer's pieces are too long",
            got=f"{characters} characters together",
            expected=f"at most {MAX_UNIGRAM_CHARACTERS}",
        )


def encoding_is_bounded(backend: Any) -> bool:
    """Whether everything that encoding does is known to take work in proportion to the text."""
    growth = _Growth()
    growth.normalize(backend)
    for step in _steps(backend.pre_tokenizer, "pretokenizers"):
        if step["type"] == "ByteLevel":
            growth.factor *= 2  # a byte becomes a character of one or two
        elif step["type"] == "Split":
            growth.known = growth.known and _is_known(step["pattern"])
        elif step["type"] not in _PRE_TOKENIZERS:
            growth.known = False
    for step in _steps(backend.post_processor, "processors"):
        growth.add_template(step)
    return growth.bounded and _model_is_bounded(backend)


def normalizing_is_bounded(backend: Any) -> bool:
    """The same of the normalizer alone."""
    growth = _Growth()
    growth.normalize(backend)
    return growth.bounded


def decoding_is_bounded(backend: Any) -> bool:
    """The same of decoding."""
    growth = _Growth()
    for step in _steps(backend.decoder, "decoders"):
        if step["type"] not in _DECODERS:
            growth.replace(step)
    return growth.bounded


class _Growth:
    """How much longer a text becomes from step to step."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.known = True

    @property
    def bounded(self) -> bool:
        return self.known and self.factor <= _MOST_GROWTH

    def normalize(self, backend: Any) -> None:
        """All steps of the normalizer."""
        for step in _steps(backend.normalizer, "normalizers"):
            if step["type"] == "Prepend":  # before each piece of a text between two added tokens
                self.factor *= 1 + len(step["prepend"].encode())
            elif step["type"] == "Precompiled":
                self.known = self.known and _longest_result(step) <= _LONGEST_RESULT
            elif step["type"] not in _NORMALIZERS:
                self.replace(step)

    def replace(self, step: dict[str, Any]) -> None:
        """Replace and ByteLevel; anything else is not known."""
        if step["type"] == "ByteLevel":
            self.factor *= 2
        elif step["type"] == "Replace" and _is_known(step["pattern"]):
            shortest = max(1, len(step["pattern"].get("String", "").encode()))
            self.factor *= max(1, len(step["content"].encode()) / shortest)
        else:
            self.known = False

    def add_template(self, step: dict[str, Any]) -> None:
        """What is put around a text, and how often the text itself."""
        if step["type"] == "TemplateProcessing":
            parts, special = step["single"], step["special_tokens"]
            sizes = [
                len(special[p["SpecialToken"]["id"]]["ids"]) if "SpecialToken" in p else 1 for p in parts
            ]
            self.factor *= max(1, sum(sizes))
            self.known = self.known and len(parts) <= _MOST_STEPS
        elif step["type"] not in ("BertProcessing", "ByteLevel", "RobertaProcessing"):
            self.known = False


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """A component's steps; those of a Sequence are taken out of it."""
    if component is None:
        return []
    steps = [json.loads(component.__getstate__())]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [inner for step in steps for inner in (step[name] if step["type"] == "Sequence" else [step])]
    return steps if len(steps) <= _MOST_STEPS else [{"type": "too many steps"}]


def _longest_result(step: dict[str, Any]) -> int:
    """Bytes that a SentencePiece normalizer may make of a character, at most: a size, a trie of that size,
    then the results, each with a NUL behind it (the `spm_precompiled` crate, v0.1.4, from_precompiled)."""
    data = base64.b64decode(step["precompiled_charsmap"])
    trie = int.from_bytes(data[:4], "little")
    return max(map(len, data[4 + trie :].split(b"\0")))


def _is_known(pattern: dict[str, str]) -> bool:
    return bool(pattern.get("String")) or pattern.get("Regex") in _KNOWN_PATTERNS


def _model_is_bounded(backend: Any) -> bool:
    kind = type(backend.model).__name__
    if kind == "WordPiece":
        return bool(backend.model.max_input_chars_per_word <= _LONGEST_WORD)
    if kind == "Unigram":
        return max(map(len, backend.get_vocab(False)), default=0) <= _LONGEST_PIECE
    return kind in ("BPE", "WordLevel")
