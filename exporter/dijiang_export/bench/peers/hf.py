"""transformers' GPT-NeoX beside ours: softmax attention and a KV cache.

Eager, the cache grows (DynamicCache). Compiled, it is a StaticCache with room for the context and a block
of tokens; prefills let the model make its own cache, since a static one keeps torch.compile from the kernel
for causal attention (transformers' masking_utils, `_ignore_causal_mask_sdpa`).

transformers keeps a static cache's length in one of two ways: until 5.2 callers pass `cache_position`, later
each layer counts in a tensor, `cumulative_length`. Both are set here wherever they exist.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dijiang_export.bench.peers.settings import PeerSettings
from dijiang_export.bench.peers.tools import (
    BLOCK,
    Prepared,
    block_decoder,
    captured,
    compiled,
    counting_skips,
    error_of,
)
from dijiang_export.reference.model import DTYPES

ROOM = 64
"""Tokens that a static cache holds after the context: a block and some, aligned for the kernels."""


class HuggingFace:
    """A GPT-NeoX model with random weights, run eagerly, compiled, or compiled and captured.

    Args:
        settings: the shape, the type and the sizes.
        device: where.
        mode: "eager", "compiled" or "graph".
    """

    forms: tuple[str, ...] = ("",)

    def __init__(self, settings: PeerSettings, device: torch.device, mode: str) -> None:
        self.settings, self.device, self.mode = settings, device, mode
        self.model = make_model(settings, device)
        known = inspect.signature(self.model.forward).parameters
        self._takes_position = "cache_position" in known
        # Logits of the last token only; named differently by transformers' versions.
        keep = next((n for n in ("logits_to_keep", "num_logits_to_keep") if n in known), None)
        self._last: dict[str, int] = {keep: 1} if keep else {}
        self._rng = torch.Generator(device).manual_seed(0)

    # -- prefill ---------------------------------------------------------------------------------------

    def prefill(self, form: str, batch: int, length: int) -> Prepared:
        """Read `length` tokens a row into a cache that the call makes."""
        ids, notes = self._tokens(batch, length), list[str]()
        exact = self._whole(ids)
        call = compiled(self._read, self.mode, self.settings.backend, self.device)
        with counting_skips(self.mode, notes):
            logits = call(ids)[0].clone()
        error = error_of(logits, exact)

        def run() -> Any:
            return call(ids)

        return Prepared(captured(run, self.device) if self.mode == "graph" else run, _nothing, error, notes)

    def _read(self, ids: Tensor) -> tuple[Tensor, Any]:
        output = self.model(input_ids=ids, use_cache=True, **self._last)
        return output.logits[:, -1:], output.past_key_values

    def _whole(self, ids: Tensor) -> Tensor:
        """Eager logits [B, 1, V] after the last of `ids`."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **self._last).logits[:, -1:]
        return logits.clone()

    def _tokens(self, batch: int, length: int) -> Tensor:
        vocab = self.settings.shape.vocab
        return torch.randint(vocab, (batch, length), generator=self._rng, device=self.device)

    # -- decode ----------------------------------------------------------------------------------------

    def decode(self, batch: int, context: int) -> Prepared:
        """Fill a cache with a real prefill of `context` tokens, check the step after it, then decode."""
        ids = self._tokens(batch, context + 1)
        exact = self._whole(ids)
        return (self._dynamic if self.mode == "eager" else self._static)(ids, exact)

    def _dynamic(self, ids: Tensor, exact: Tensor) -> Prepared:
        context = ids.shape[1] - 1
        cache = self.model(input_ids=ids[:, :-1], use_cache=True, **self._last).past_key_values
        places = torch.arange(context, context + BLOCK, device=self.device)
        first = ids[:, -1:]

        def reset() -> None:
            # A negative count of tokens to drop is what all versions understand.
            if (extra := int(cache.get_seq_length()) - context) > 0:
                cache.crop(-extra)

        def run() -> Tensor:
            token = first
            for i in range(BLOCK):
                token = self._step(token, places[i : i + 1], cache)[0]
            return token

        error = error_of(self._step(first, places[:1], cache)[1], exact)
        return Prepared(run, reset, error)

    def _static(self, ids: Tensor, exact: Tensor) -> Prepared:
        from transformers import StaticCache

        batch, context = ids.shape[0], ids.shape[1] - 1
        options: dict[str, Any] = {"config": self.model.config, "max_cache_len": context + ROOM}
        if "max_batch_size" in inspect.signature(StaticCache.__init__).parameters:
            options |= {"max_batch_size": batch, "device": self.device, "dtype": DTYPES[self.settings.dtype]}
        cache = StaticCache(**options)
        places = torch.arange(context, device=self.device)
        self._call(ids[:, :-1], places, cache)  # eager: the cache comes into being outside of any graph
        token, place = ids[:, -1:].clone(), torch.tensor([context], device=self.device)

        def reset() -> None:
            token.copy_(ids[:, -1:])
            place.fill_(context)
            for layer in getattr(cache, "layers", ()):
                if isinstance(length := getattr(layer, "cumulative_length", None), Tensor):
                    length.fill_(context)

        step = compiled(lambda t, p: self._step(t, p, cache), self.mode, self.settings.backend, self.device)
        return block_decoder(step, token, place, reset, exact, self.mode, self.device)

    def _step(self, token: Tensor, place: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """token [B, 1] at `place` [1] -> the next [B, 1], and logits [B, 1, V]."""
        logits = self._call(token, place, cache)
        return logits.argmax(-1), logits

    def _call(self, ids: Tensor, places: Tensor, cache: Any) -> Tensor:
        more: dict[str, Any] = {"cache_position": places} if self._takes_position else {}
        output = self.model(
            input_ids=ids, position_ids=places.unsqueeze(0).expand(ids.shape[0], -1),
            past_key_values=cache, use_cache=True, **more, **self._last,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1:]
        return logits


def _nothing() -> None:
    """A prefill leaves nothing behind."""


def make_model(settings: PeerSettings, device: torch.device) -> Any:
    """GPT-NeoX with random weights, attention through PyTorch's scaled_dot_product_attention."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    shape = settings.shape
    longest = max(shape.positions, *settings.lengths, *(n + ROOM for n in settings.contexts))
    config = GPTNeoXConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, hidden_act="gelu",
        rotary_pct=shape.rotary_pct, max_position_embeddings=longest, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(device).eval().requires_grad_(False)
    for parameter in model.parameters():  # not the buffers: RoPE's frequencies stay float32
        parameter.data = parameter.data.to(DTYPES[settings.dtype])
    return model
