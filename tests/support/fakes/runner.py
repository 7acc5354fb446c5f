"""A runner over the toy model in NumPy, its recorded cases, and faults to put into it.

It proves orchestration only: what a real runtime computes is not its business."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from support.makers.toy_bundle import ToyModel
from support.oracles.array_rows import ArrayRows

from dijiang_engines.runners.checks import check_batch, check_call, check_layers


class ToyRunner(ArrayRows):
    """The toy model behind the Runner protocol.

    `tamper(name, arrays)` may change, in place, what a call returns: name is "prefill" or "step", arrays
    the logits (key "logits") and the new states (keys 0, 1, ...); "ids", "positions" and "seq_lens" are
    what the call was given.
    """

    name = "toy"

    def __init__(self, model: ToyModel, *, all_logits: bool = False) -> None:
        self.model = model
        self.spec = model.spec
        self.all_logits = all_logits
        self.tamper: Callable[[str, dict], None] = lambda name, arrays: None
        self.calls: list[str] = []

    def new_state(self, batch: int) -> list[np.ndarray]:
        check_batch(self, batch)
        return [np.zeros((batch, *self.spec.state_shape), np.float32) for _ in range(self.spec.num_layers)]

    def prefill(self, input_ids, positions, seq_lens, state) -> np.ndarray:
        return self._run("prefill", input_ids, positions, seq_lens, state)

    def step(self, input_ids, positions, seq_lens, state) -> np.ndarray:
        return self._run("step", input_ids, positions, seq_lens, state)

    def _run(self, name, input_ids, positions, seq_lens, state) -> np.ndarray:
        check_call(self, input_ids, positions, seq_lens, len(state[0]), step=name == "step")
        self.calls.append(name)
        batch, length = input_ids.shape
        assert input_ids.dtype == positions.dtype == seq_lens.dtype == np.int64
        every = self.all_logits and name == "prefill"
        logits = np.zeros((batch, length if every else 1, self.spec.vocab_size), np.float32)
        old = [layer.copy() for layer in state]
        for b in range(batch):
            count = int(seq_lens[b])
            for n in range(1, count + 1) if every else ([count] if count else []):
                new = self.model.states(input_ids[b, :n], int(positions[b]))
                total = [o[b] + s.astype(np.float32) for o, s in zip(old, new, strict=True)]
                logits[b, n - 1 if every else 0] = (
                    np.tanh(sum(t.reshape(-1) for t in total)) @ self.model.head
                )
            if count:
                for layer, value in zip(state, total, strict=True):
                    layer[b] = value
        arrays = {
            "logits": logits,
            "ids": input_ids,
            "positions": positions,
            "seq_lens": seq_lens,
            "old": old,
        }
        arrays |= dict(enumerate(state))
        self.tamper(name, arrays)
        return arrays["logits"]

    def export_state(self, state) -> list[np.ndarray]:
        return [layer.copy() for layer in state]

    def import_state(self, layers) -> list[np.ndarray]:
        return [layer.copy() for layer in check_layers(self.spec, layers)]


def toy_case(
    model: ToyModel, lengths: list[int], positions: list[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """A case's arrays, computed from the model's closed form; marks of short rows coincide."""
    rng = np.random.default_rng(seed)
    spec = model.spec
    batch, width = len(lengths), max(lengths)
    ids = np.zeros((batch, width), np.int64)
    marks = np.zeros((batch, 4), np.int64)
    state_marks = np.array([1, 3])
    logits = np.zeros((batch, 4, spec.vocab_size), np.float32)
    states = np.zeros((spec.num_layers, batch, 2, *spec.state_shape), np.float32)
    for b, (n, start) in enumerate(zip(lengths, positions, strict=True)):
        ids[b, :n] = rng.integers(1, spec.vocab_size - 1, n)
        marks[b] = [1, max(n // 3, 1), max(n - 1, 1), n]
        for m, mark in enumerate(marks[b]):
            logits[b, m] = model.logits(ids[b, :mark], start)
        for s, m in enumerate(state_marks):
            states[:, b, s] = np.stack(model.states(ids[b, : marks[b, m]], start))
    arrays = {
        "input_ids": ids, "seq_lens": np.array(lengths), "positions": np.array(positions), "marks": marks,
        "logits": logits, "state_marks": state_marks,
    }  # fmt: skip
    return arrays | {f"state.{i}": states[i].copy() for i in range(spec.num_layers)}


def write_reference(path: Path, cases: dict[str, dict[str, np.ndarray]]) -> Path:
    tensors = {f"{name}.{key}": value for name, case in cases.items() for key, value in case.items()}
    metadata = {
        "format": "dijiang-reference",
        "version": "1",
        "cases": json.dumps(list(cases)),
        "compute_dtype": "float64",
    }
    save_file(tensors, path, metadata=metadata)
    return path
