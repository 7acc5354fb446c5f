"""What plugins/include/dijiang/sampling.h says of `sample` and `advance`: NumPy on cuda.py's memory.

It calls the product's own sampling, so it proves orchestration only; the kernels have tests of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from support.fakes import cuda as fake_cuda

from dijiang_engines.errors import RunnerError
from dijiang_engines.sampling import SamplingOptions, sample, uniform


class FakeKernels:
    """`dijiang_engines.kernels.attention.Kernels`, as far as a decode loop uses it."""

    def sample(
        self, options: SamplingOptions, *, logits: Any, tokens: Any, row_status: Any, seed: int = 0,
        streams: Any = None, draws: Any = None, allowed: Any = None, seen: Any = None, stream: int = 0,
    ) -> None:  # fmt: skip
        batch, vocabulary = logits.shape
        assert tokens.shape == row_status.shape == (batch,) and row_status.dtype == np.int32

        def work() -> None:
            scores, draw, rows = read(logits), read(draws), read(streams)
            mask = np.ones(vocabulary, bool) if allowed is None else bits(read(allowed)[None], vocabulary)[0]
            known = None if seen is None else bits(read(seen), vocabulary)
            chosen, status = np.full(batch, -1, tokens.dtype), np.zeros(batch, np.int32)
            for row in range(batch):
                number = np.array([uniform(seed, int(rows[row]), int(draw[row]))])
                try:
                    chosen[row] = sample(
                        scores[row : row + 1], options, number,
                        seen=None if known is None else known[row : row + 1], banned=np.flatnonzero(~mask),
                    )[0]  # fmt: skip
                except RunnerError:
                    status[row] = 1
            fake_cuda.DEVICE.write(tokens.address, chosen)
            fake_cuda.DEVICE.write(row_status.address, status)

        fake_cuda.DEVICE.stream(stream).enqueue(work)

    def advance(
        self, *, tokens: Any, finished: Any, vocabulary: int, row_status: Any, positions: Any, seq_lens: Any,
        draws: Any, input_ids: Any, seen: Any = None, stop_ids: Any = None, stream: int = 0,
    ) -> None:  # fmt: skip
        def work() -> None:
            done, chosen, lens = read(finished), read(tokens), read(seq_lens)
            goes_on = (done == 0) & (read(row_status) == 0)
            if seen is not None:
                known = bits(read(seen), vocabulary)
                known[goes_on, chosen[goes_on]] = True
                packed = np.packbits(known, axis=1, bitorder="little")
                whole = np.zeros((len(done), 4 * seen.shape[1]), np.uint8)
                whole[:, : packed.shape[1]] = packed
                fake_cuda.DEVICE.write(seen.address, whole)
            write(draws, read(draws) + goes_on)
            if stop_ids is not None:
                goes_on &= ~np.isin(chosen, read(stop_ids))
            write(finished, ~goes_on)
            write(positions, read(positions) + lens)
            write(seq_lens, goes_on)
            write(input_ids, np.where(goes_on, chosen, 0))

        assert positions.dtype == seq_lens.dtype == input_ids.dtype == tokens.dtype
        fake_cuda.DEVICE.stream(stream).enqueue(work)


def read(view: Any) -> np.ndarray:
    return fake_cuda.DEVICE.read(view.address, view.shape, view.dtype)


def write(view: Any, values: np.ndarray) -> None:
    fake_cuda.DEVICE.write(view.address, values.astype(view.dtype))


def bits(words: np.ndarray, vocabulary: int) -> np.ndarray:
    """uint32 [B, W] as booleans [B, V]."""
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary].astype(bool)
