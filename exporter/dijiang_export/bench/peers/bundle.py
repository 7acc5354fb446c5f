"""A bundle through ONNX Runtime, as a peer of the softmax model that it was converted from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.open import open_model
from dijiang_engines.generation.generator import PREFILL_TOKENS
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.base import FloatArray, IntArray, State
from dijiang_export.bench.peers.figures import BLOCK, LeftOut, Prepared, deviations
from dijiang_export.bench.peers.settings import PeerSettings


class BundlePeer:
    """Steps of the runner, each token chosen from its logits by NumPy; reads in pieces, as `generate` does.

    Args:
        settings: its bundle, the type and the sizes.

    Raises:
        LeftOut: the bundle is of another type, or an engine; the device is not the CPU.
        BundleError, RunnerError: it cannot be run.
    """

    forms: tuple[str, ...] = ("",)

    def __init__(self, settings: PeerSettings) -> None:
        assert settings.bundle is not None
        if settings.device != "cpu":
            raise LeftOut("a bundle is a peer on the CPU; elsewhere `bench run` measures it")
        model = open_model(Path(settings.bundle))
        if not isinstance(model, Bundle) or model.dtype != settings.dtype:
            raise LeftOut(f"it is not a bundle in {settings.dtype}", got=model.dtype)
        if (spec := settings.spec()).vocab_size != model.spec.vocab_size:
            raise LeftOut(
                "the bundle has another vocabulary than the checkpoint",
                got=f"{model.spec.vocab_size} and {spec.vocab_size} tokens",
            )
        self.runner = open_runner(model, "onnxruntime-cpu", threads=settings.threads)
        self._rng = np.random.default_rng(0)

    def _tokens(self, batch: int, length: int) -> IntArray:
        return self._rng.integers(0, self.runner.spec.vocab_size, (batch, length))

    def _read(self, ids: IntArray) -> tuple[FloatArray, State]:
        """Logits [B, V] of the last of `ids`, and the state behind it."""
        batch, length = ids.shape
        state = self.runner.new_state(batch)
        for begin in range(0, length, PREFILL_TOKENS):
            piece = ids[:, begin : begin + PREFILL_TOKENS]
            lens = np.full(batch, piece.shape[1], np.int64)
            logits = self.runner.prefill(piece, np.full(batch, begin, np.int64), lens, state)
        return logits[:, -1], state

    def prefill(self, form: str, batch: int, length: int) -> Prepared:
        """Read `length` tokens a row from an empty state; checked against a step for the last of them."""
        ids = self._tokens(batch, length)
        found = self._read(ids)[0]
        exact = self._whole_but_last(ids)
        return Prepared(lambda: self._read(ids), lambda: None, deviations(found, exact))

    def _whole_but_last(self, ids: IntArray) -> FloatArray:
        """Logits [B, V] of the last token by the step's graph, behind a prefill of the others."""
        batch, length = ids.shape
        state = self._read(ids[:, :-1])[1] if length > 1 else self.runner.new_state(batch)
        return self._step(ids[:, -1:], length - 1, state)

    def _step(self, token: IntArray, position: int, state: State) -> FloatArray:
        batch = len(token)
        positions, ones = np.full(batch, position, np.int64), np.ones(batch, np.int64)
        return self.runner.step(token, positions, ones, state)[:, -1]

    def decode(self, batch: int, context: int) -> Prepared:
        """Read `context` tokens, check the step after them against reading it with them, then decode."""
        ids = self._tokens(batch, context + 1)
        exact = self._read(ids)[0].copy()
        begun = time.perf_counter()
        state = self._read(ids[:, :-1])[1]
        read = time.perf_counter() - begun
        before = self.runner.export_state(state)
        error = deviations(self._step(ids[:, -1:], context, state), exact)
        held: list[State] = [state]

        def reset() -> None:
            held[0] = self.runner.import_state(before)

        def run() -> Any:
            token = ids[:, -1:]
            for i in range(BLOCK):
                token = self._step(token, context + i, held[0]).argmax(-1)[:, None]
            return token

        size = batch * self.runner.spec.state_bytes
        return Prepared(run, reset, error, read_seconds=read, context_bytes=size)
