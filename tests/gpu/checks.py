"""What the scripts for a GPU machine share: checks of a runner whatever its runtime, and their report.

engine.py (TensorRT) and ort/on_cuda.py (ONNX Runtime) add what only theirs can do. No PyTorch, no pytest.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dijiang_engines.formats.open import Model
from dijiang_engines.generation.generator import GenerateOptions, Generator
from dijiang_engines.tokenizer.tokenizer import Tokenizer

Check = tuple[str, Callable[[], str]]
"""A name, and what checks it: returns what it found in words, raises if it is wrong."""
LENGTHS = (128, 512, 2048, 8192)
"""Tokens of the prefills that are timed."""
POSITIONS = (100, 1000, 10_000, 100_000)
"""Where steps are timed: only a number differs, so the times must not."""
GROWTH_STEPS = 2000


class RunnerChecks:
    """Checks that need nothing but the Runner protocol.

    Args:
        model: an opened engine or bundle.
        greedy: tests/gpu/greedy.py's record of this model, None if there is none.

    Attributes:
        runner: the one that is checked; a subclass sets it.
        max_batch: most rows at once; a subclass sets it.
        facts: what `--save` writes.
    """

    runner: Any
    max_batch: int

    def __init__(self, model: Model, greedy: Path | None) -> None:
        self.spec, self.dtype = model.spec, model.dtype
        self.greedy = json.loads(greedy.read_text()) if greedy else None
        self.rng = np.random.default_rng(0)
        self.tokenizer = Tokenizer(model.tokenizer_path) if model.tokenizer_path else None
        self.facts: dict[str, Any] = {}

    def tokens(self, *shape: int) -> Any:
        """Random token ids, int64."""
        return self.rng.integers(0, self.spec.vocab_size, shape)

    def drive(self, runner: Any, ids: Any, lens: Any, steps: int) -> list[Any]:
        """Logits of a prefill and of steps, then the states."""
        state = runner.new_state(len(lens))
        found = [runner.prefill(ids, np.zeros(len(lens), np.int64), lens, state)]
        ones = np.ones(len(lens), np.int64)
        rng = np.random.default_rng(1)
        for index in range(steps):
            token = rng.integers(0, self.spec.vocab_size, (len(lens), 1))
            found.append(runner.step(token, lens + index, ones, state))
        return [*found, *runner.export_state(state)]

    def same_bits(self, one: Any, two: Any) -> str:
        """Two runners give the same bits in a padded batch, over a prefill and 20 steps."""
        batch = min(3, self.max_batch)
        ids, lens = self.tokens(batch, 37), np.array([37, 5, 20][:batch])
        pairs = zip(self.drive(one, ids, lens, 20), self.drive(two, ids, lens, 20), strict=True)
        worst = max(float(np.abs(a - b).max()) for a, b in pairs)
        assert worst == 0, f"they differ by {worst}"
        return "bit for bit the same"

    def batches_side_by_side(self) -> str:
        sizes = sorted({1, min(3, self.max_batch), self.max_batch})
        alone, states, tokens = [], [], []
        for size in sizes:
            token = self.tokens(12, size, 1)
            tokens.append(token)
            state = self.runner.new_state(size)
            ones = np.ones(size, np.int64)
            alone.append([self.runner.step(token[i], ones * i, ones, state) for i in range(12)])
            states.append(self.runner.new_state(size))
        for i in range(12):
            for size, state, token, expected in zip(sizes, states, tokens, alone, strict=True):
                ones = np.ones(size, np.int64)
                got = self.runner.step(token[i], ones * i, ones, state)
                assert np.array_equal(got, expected[i]), f"batch {size}, step {i}"
        return f"batches {sizes} interleaved give what each gives alone"

    def resetting_rows(self) -> str:
        batch = min(2, self.max_batch)
        state = self.runner.new_state(batch)
        ids, lens = self.tokens(batch, 9), np.full(batch, 9)
        self.runner.prefill(ids, np.zeros(batch, np.int64), lens, state)
        before = self.runner.export_state(state)
        self.runner.reset_rows(state, [0])
        for old, new in zip(before, self.runner.export_state(state), strict=True):
            assert old[0].any() and not new[0].any() and np.array_equal(old[1:], new[1:])
        return "row 0 is zero, the others are untouched"

    def used_memory(self) -> dict[str, tuple[int, int]]:
        """Bytes in use now by kind, and by how much each may grow; a subclass measures them."""
        raise NotImplementedError

    def no_growth(self) -> str:
        state = self.runner.new_state(1)
        one = np.ones(1, np.int64)
        ids = self.tokens(64, 1, 1)
        for i in range(20):
            self.runner.step(ids[i % 64], one * i, one, state)
        before = self.used_memory()
        for i in range(GROWTH_STEPS):
            self.runner.step(ids[i % 64], one * i, one, state)
        grown = {kind: used - before[kind][0] for kind, (used, _) in self.used_memory().items()}
        assert all(size <= before[kind][1] for kind, size in grown.items()), f"grown by {grown} bytes"
        return f"{GROWTH_STEPS} steps take no memory: {grown} bytes more"

    def greedy_text(self, runner: Any = None) -> str:
        """Texts beside PyTorch's, one by one and all at once; float32 must give every token."""
        assert self.greedy is not None and self.tokenizer is not None
        generator = Generator(self.runner if runner is None else runner, self.tokenizer)
        options = GenerateOptions(max_tokens=256, ignore_eos=True)
        same = 0
        for batch in (1, min(len(self.greedy), self.max_batch)):
            for first in range(0, len(self.greedy), batch):
                group = self.greedy[first : first + batch]
                generation = generator.start([g["prompt"] for g in group], options)
                for _ in generation:
                    pass
                for entry, completion in zip(group, generation.completions, strict=True):
                    pairs = list(zip(entry["tokens"], completion.token_ids, strict=True))
                    agree = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
                    same += agree == 256
                    if self.dtype == "float32":
                        assert agree == 256, f"{entry['prompt']!r} at batch {batch}: {agree} of 256 tokens"
        return f"{same} of {2 * len(self.greedy)} texts are PyTorch's over 256 tokens"

    def loop_seconds(self, batch: int, runner: Any = None, runs: int = 3, tokens: int = 400) -> float:
        """Seconds of a token of every row in the real decode loop, text included if there is a tokenizer."""
        generator = Generator(self.runner if runner is None else runner, self.tokenizer)
        walls = []
        for _ in range(runs):
            generation = generator.start(
                [self.tokens(16).tolist() for _ in range(batch)],
                GenerateOptions(max_tokens=tokens + 200, ignore_eos=True),
            )
            events = iter(generation)
            for _ in range(100 * batch):
                next(events)
            start = time.perf_counter()
            for _ in range(tokens * batch):
                next(events)
            walls.append((time.perf_counter() - start) / tokens)
            for _ in events:
                pass
        return statistics.median(walls)


def run_checks(checks: Iterable[Check], facts: dict[str, Any], save: Path | None) -> int:
    """Run checks in order, with a line for each: `ok` or `FAIL`. `save` is written anew after each.

    Returns:
        1 if one failed, else 0.
    """
    results = facts.setdefault("checks", {})
    seconds = facts.setdefault("check_seconds", {})
    for name, check in checks:
        key, start = name.replace(" ", "_"), time.perf_counter()
        try:
            print(f"ok   {name}: {check()}", flush=True)
            results[key] = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the other checks are still worth running
            results[key] = False
            print(f"FAIL {name}: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc(limit=-3)
        seconds[key] = round(time.perf_counter() - start, 3)
        if save:
            save.write_text(json.dumps(facts, indent=1))
    good = all(results.values())
    print("all right" if good else "not all right", flush=True)
    return 0 if good else 1
