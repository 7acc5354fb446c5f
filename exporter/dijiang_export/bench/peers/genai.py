"""ONNX Runtime GenAI as a peer: softmax attention with its own KV cache, on the graph that its builder makes.

`build` makes the graph in a process of its own, since that takes PyTorch, and there compares it with
transformers. Measured is what GenAI's documentation has everybody write: append the prompt, then one
`generate_next_token` for each token, greedily.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np

from dijiang_engines.runners.base import FloatArray, IntArray
from dijiang_export.bench.peers.figures import BLOCK, LeftOut, Prepared, deviations, wrong
from dijiang_export.bench.peers.settings import PeerSettings

TRIED_TOKENS = 24
"""Of the text on which a built model is compared with transformers'."""


class GenaiPeer:
    """One sequence through `onnxruntime_genai.Generator`, whose cache has exactly the room that is needed.

    Args:
        settings: where the built model is, and the sizes.

    Raises:
        LeftOut: there is no built model for this type or device.
    """

    forms: tuple[str, ...] = ("",)

    def __init__(self, settings: PeerSettings) -> None:
        if settings.genai is None:
            raise LeftOut("no model was built for it")
        self._library = library()
        self.model = open_genai(settings.genai, settings.threads)
        self.spec = settings.spec()
        self._rng = np.random.default_rng(0)

    def _tokens(self, batch: int, length: int) -> IntArray:
        if batch != 1:
            raise LeftOut("it is measured with one sequence")
        return self._rng.integers(0, self.spec.vocab_size, length)

    def _generator(self, room: int) -> Any:
        """Greedy, with a cache of `room` tokens, which it fills whatever it reads."""
        parameters = self._library.GeneratorParams(self.model)
        parameters.set_search_options(max_length=room, min_length=room, do_sample=False)
        return self._library.Generator(self.model, parameters)

    def _last_logits(self, ids: IntArray) -> FloatArray:
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids.astype(np.int32))
        return last_logits(generator)

    def prefill(self, form: str, batch: int, length: int) -> Prepared:
        """Read `length` tokens into a cache that the call makes."""
        ids = self._tokens(batch, length)
        found = self._last_logits(ids)
        generator = self._generator(length + 1)
        if length > 1:
            generator.append_tokens(ids[:-1].astype(np.int32))
        generator.append_tokens(ids[-1:].astype(np.int32))
        error = deviations(found, last_logits(generator))
        del generator
        return Prepared(lambda: self._last_logits(ids), lambda: None, error)

    def decode(self, batch: int, context: int) -> Prepared:
        """Fill a cache with `context` tokens, check the step after it, then decode."""
        ids = self._tokens(batch, context + 1)
        exact = self._last_logits(ids)
        room = context + 1 + BLOCK
        generator = self._generator(room)
        begun = time.perf_counter()
        generator.append_tokens(ids[:-1].astype(np.int32))
        read = time.perf_counter() - begun
        first = ids[-1:].astype(np.int32)
        generator.append_tokens(first)
        error = deviations(last_logits(generator), exact)

        def reset() -> None:
            generator.rewind_to(context)

        def run() -> Any:
            generator.append_tokens(first)  # the first step; each call below chooses, and all but one step
            for _ in range(BLOCK):
                generator.generate_next_token()
            return generator.get_sequence(0)[-1]

        spec = self.spec
        size = 2 * 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim * room
        return Prepared(run, reset, error, read_seconds=read, context_bytes=size)


def library() -> Any:
    """The package, which is optional.

    Raises:
        LeftOut: it is not installed.
    """
    try:
        return import_module("onnxruntime_genai")
    except ImportError as error:
        raise LeftOut("onnxruntime-genai is not installed (pip install onnxruntime-genai)") from error


def open_genai(folder: str, threads: int) -> Any:
    """A built model, on the CPU with so many threads."""
    config = library().Config(folder)
    config.clear_providers()
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return library().Model(config)


def last_logits(generator: Any) -> FloatArray:
    """Logits [V] of the last token that it read."""
    logits: FloatArray = np.array(generator.get_logits(), np.float32)
    last: FloatArray = logits.reshape(-1, logits.shape[-1])[-1]
    return last


def main() -> None:
    """Build the model of the folder that the first argument names into the second; float32, for CPUs."""
    source, target = sys.argv[1:]
    try:
        library()
    except LeftOut as error:
        sys.exit(error.what)
    # Logits of the last token alone, as every peer: the graph would make those of a whole prompt otherwise.
    sys.argv = [
        "builder", "-i", source, "-o", target, "-p", "fp32", "-e", "cpu", "-c", f"{target}.cache",
        "--extra_options", "prune_lm_head=true",
    ]  # fmt: skip
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    off = compare(source, target)
    if wrong(off, "float32"):
        sys.exit(f"the built model computes something else: logits {off:.1e} deviations off")


def compare(source: str, target: str) -> float:
    """The built model's largest error against transformers' logits: of a prompt, then token by token."""
    import torch

    from dijiang_export.bench.peers.hf import load_model

    model = load_model(source, torch.float32, torch.device("cpu"))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, TRIED_TOKENS).astype(np.int32)
    built = open_genai(target, 1)
    parameters = library().GeneratorParams(built)
    parameters.set_search_options(max_length=len(ids) + BLOCK + 1, do_sample=False)
    generator = library().Generator(built, parameters)
    errors = []
    for piece in (ids[:-BLOCK], *np.split(ids[-BLOCK:], BLOCK)):
        generator.append_tokens(piece)
        errors.append(last_logits(generator))
    with torch.no_grad():
        exact = model(input_ids=torch.as_tensor(ids, dtype=torch.long)[None]).logits[0]
    wanted = exact[-BLOCK - 1 :].numpy()
    return max(deviations(found, want) for found, want in zip(errors, wanted, strict=True))


if __name__ == "__main__":
    main()
