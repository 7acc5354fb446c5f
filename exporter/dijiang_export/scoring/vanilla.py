"""transformers' own model of a vanilla checkpoint as a reader: what people compare a converted model with.

The checkpoint is opened, checked and read as `convert` does it; transformers gets a configuration and
tensors, and never a path: it opens no file, runs no code of the checkpoint's and asks no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dijiang_engines.errors import CheckpointError
from dijiang_engines.runners.base import MAX_POSITIONS, IntArray
from dijiang_engines.scoring.readers import Logits, piece_of
from dijiang_export.checkpoint.source import Source, check_finite
from dijiang_export.scoring.reference import memory_is_enough

CLASSES = {"gpt_neox": "GPTNeoX", "llama": "Llama", "opt": "OPT"}
"""Families, and how the names of transformers' classes for them begin."""
WINDOW_TOKENS = 8192
"""Most tokens of all rows together, whose activations are held at once; one row may have more."""
_CHUNK = 64
_NOT_THE_MODELS = ("auto_map", "_name_or_path", "quantization_config", "_attn_implementation")
"""Keys of config.json that are no part of the mathematics, or name code."""


class VanillaReader:
    """A causal language model of transformers: each window is read whole, with softmax attention."""

    name = "transformers"
    recurrent = False

    def __init__(self, model: Any, context: int, most_tokens: int | None) -> None:
        self.model = model.eval()
        self.vocab_size = int(model.config.vocab_size)
        self.context = context
        self.most_tokens = MAX_POSITIONS if most_tokens is None else most_tokens
        self._item_bytes = 8 if model.dtype == torch.float64 else 4

    def rows(self, length: int) -> int:
        """As many as hold WINDOW_TOKENS."""
        return max(1, WINDOW_TOKENS // length)

    def piece(self, rows: int) -> int:
        """As many as logits fit."""
        return piece_of(rows, self.vocab_size, _CHUNK, self._item_bytes)

    def start(self, ids: IntArray, lengths: IntArray) -> VanillaReading:
        """Read all rows to their ends; no token sees the padding behind it."""
        return VanillaReading(self.model, torch.from_numpy(ids).to(self.model.device))


class VanillaReading:
    """What the layers made of all tokens; logits are made of it piece by piece."""

    @torch.inference_mode()
    def __init__(self, model: Any, ids: Tensor) -> None:
        with memory_is_enough():
            self._hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        self._head = model.get_output_embeddings()
        self._done = 0

    def skip(self, count: int) -> None:
        """They have been read."""
        self._done += count

    @torch.inference_mode()
    def read(self, count: int) -> Logits:
        """The output projection of the next tokens."""
        with memory_is_enough():
            logits = self._head(self._hidden[:, self._done : self._done + count])
            wide = logits if logits.dtype == torch.float64 else logits.float()
            found: Logits = wide.cpu().numpy()
        self._done += count
        return found

    def keep(self, rows: int) -> None:
        """The first rows; nothing else is computed of the others."""
        self._hidden = self._hidden[:rows]


def load_vanilla(source: Source, dtype: torch.dtype) -> Any:
    """transformers' model with the weights of an opened vanilla checkpoint, on the CPU.

    Args:
        source: opened; its names and shapes are checked here.
        dtype: of the weights and activations.

    Raises:
        CheckpointError: it is not whole, or transformers' model of its configuration is another one.
    """
    import transformers

    source.check(dijiang=False)
    name = CLASSES[source.family.name]
    values = {key: value for key, value in source.config.items() if key not in _NOT_THE_MODELS}
    tensors = {key: _read(source, key, dtype) for key in source.expected(dijiang=False)}
    try:
        config = getattr(transformers, f"{name}Config").from_dict(values)
        given = {"dtype" if hasattr(config, "dtype") else "torch_dtype": dtype}  # until 4.55 the latter
        with _quiet():
            model, info = getattr(transformers, f"{name}ForCausalLM").from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                output_loading_info=True,
                local_files_only=True,
                **given,
            )
    except Exception as error:  # what it says of a configuration has many classes
        raise CheckpointError(
            f"transformers makes no model of {source.path}", got=" ".join(str(error).split())[:300]
        ) from error
    wrong = [str(key) for kind in ("missing", "unexpected", "mismatched") for key in info[f"{kind}_keys"]]
    if wrong:
        raise CheckpointError(
            f"transformers' model of {source.path} has other weights than the checkpoint",
            got=", ".join(wrong[:5]),
        )
    return model.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    """A stored tensor, in blocks of rows."""
    stored = source.tensors[name]
    out = torch.empty(stored.shape, dtype=stored.delivered_dtype)
    if out.numel():
        stored.read_rows(out, 0)
        check_finite(out, name)
    return out.to(dtype)
