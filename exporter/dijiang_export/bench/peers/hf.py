"""transformers' models beside ours: softmax attention and a KV cache.

A GPT-NeoX with random weights, or any checkpoint of the families that `convert` takes. Eager, the cache grows
(DynamicCache). Static and compiled, it is a StaticCache with room for the context and a block
of tokens; prefills let the model make its own cache, since a static one keeps torch.compile from the kernel
for causal attention (transformers' masking_utils, `_ignore_causal_mask_sdpa`).

transformers keeps a static cache's length in one of two ways: until 5.2 callers pass `cache_position`, later
each layer counts in a tensor, `cumulative_length`. Both are set here wherever they exist.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor

from dijiang_export.bench.peers.figures import BLOCK, LeftOut, Prepared
from dijiang_export.bench.peers.settings import PeerSettings
from dijiang_export.bench.peers.tools import block_decoder, captured, compiled, counting_skips, error_of
from dijiang_export.reference.model import DTYPES

ROOM = 64
"""Tokens that a static cache holds after the context: a block and some, aligned for the kernels."""


class HuggingFace:
    """A softmax model, run eagerly, with a static cache, compiled, or compiled and captured.

    Args:
        settings: the checkpoint or the shape, the type and the sizes.
        device: where.
        mode: "eager", "static", "compiled" or "graph".
    """

    forms: tuple[str, ...] = ("",)

    def __init__(self, settings: PeerSettings, device: torch.device, mode: str) -> None:
        self.settings, self.device, self.mode = settings, device, mode
        self.model = make_model(settings, device)
        known = inspect.signature(self.model.forward).parameters
        self._takes_position = "cache_position" in known
        self._takes_ids = "position_ids" in known
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
        begun = time.perf_counter()
        cache = self.model(input_ids=ids[:, :-1], use_cache=True, **self._last).past_key_values
        read, size = time.perf_counter() - begun, _cache_bytes(cache)
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
        return Prepared(run, reset, error, read_seconds=self._on_host(read), context_bytes=size)

    def _on_host(self, seconds: float) -> float | None:
        """A GPU's work is not done when the call returns; prefills are measured for themselves there."""
        return seconds if self.device.type == "cpu" else None

    def _static(self, ids: Tensor, exact: Tensor) -> Prepared:
        from transformers import StaticCache

        batch, context = ids.shape[0], ids.shape[1] - 1
        options: dict[str, Any] = {"config": self.model.config, "max_cache_len": context + ROOM}
        if "max_batch_size" in inspect.signature(StaticCache.__init__).parameters:
            options |= {"max_batch_size": batch, "device": self.device, "dtype": DTYPES[self.settings.dtype]}
        cache = StaticCache(**options)
        places = torch.arange(context, device=self.device)
        begun = time.perf_counter()
        self._call(ids[:, :-1], places, cache)  # eager: the cache comes into being outside of any graph
        read = time.perf_counter() - begun
        token, place = ids[:, -1:].clone(), torch.tensor([context], device=self.device)

        def reset() -> None:
            token.copy_(ids[:, -1:])
            place.fill_(context)
            for layer in getattr(cache, "layers", ()):
                if isinstance(length := getattr(layer, "cumulative_length", None), Tensor):
                    length.fill_(context)

        step = compiled(lambda t, p: self._step(t, p, cache), self.mode, self.settings.backend, self.device)
        prepared = block_decoder(step, token, place, reset, exact, self.mode, self.device)
        prepared.read_seconds, prepared.context_bytes = self._on_host(read), _cache_bytes(cache)
        return prepared

    def _step(self, token: Tensor, place: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """token [B, 1] at `place` [1] -> the next [B, 1], and logits [B, 1, V]."""
        logits = self._call(token, place, cache)
        return logits.argmax(-1), logits

    def _call(self, ids: Tensor, places: Tensor, cache: Any) -> Tensor:
        more: dict[str, Any] = {"cache_position": places} if self._takes_position else {}
        if self._takes_ids:
            more["position_ids"] = places.unsqueeze(0).expand(ids.shape[0], -1)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **more, **self._last)
        logits: Tensor = output.logits[:, -1:]
        return logits


def _nothing() -> None:
    """A prefill leaves nothing behind."""


def _cache_bytes(cache: Any) -> int | None:
    """Of its keys and values; None for a cache that does not keep them by layer."""
    layers = getattr(cache, "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    found = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in found) if found else None


def load_model(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a Hugging Face folder, attention through PyTorch's scaled_dot_product_attention.

    Raises:
        LeftOut: its files hold other parameters than transformers' model has: those of a DiJiang checkpoint,
            for example.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            raise LeftOut(f"{kind.replace('_', ' ')} in the checkpoint", got=", ".join(names[:3]))
    return model.to(device).eval().requires_grad_(False)


def make_model(settings: PeerSettings, device: torch.device) -> Any:
    """The checkpoint's model, or GPT-NeoX with random weights, both with PyTorch's own attention."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    if settings.checkpoint is not None:
        return load_model(settings.checkpoint, DTYPES[settings.dtype], device)
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
