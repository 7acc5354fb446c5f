"""Many threads on ONNX Runtime with CUDA give what one gives: `python threads.py BUNDLE [options]`.

Threads with a runner of their own each, threads that share one runner, and both at once: each opens states,
reads prompts of unequal lengths, makes steps (whose CUDA graphs are captured while the other threads copy,
wait and launch), carries its state over, resets rows and goes on. Everything must be bit for bit what the
same work gives in one thread alone, and no runner may have given its CUDA graphs up.

Needs NumPy, onnxruntime-gpu and a GPU; no PyTorch, no tokenizers, no click. `--no-lock` is the control: the
same without the lock under which runners take turns on the GPU, which is expected to fail. With `--runner
onnxruntime-cpu`, what needs no GPU. Prints a line for each check, exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.runners.onnxruntime.config import LOWERINGS
from dijiang_engines.runners.onnxruntime.cuda import CAPTURABLE
from dijiang_engines.runners.onnxruntime.providers import CPU, CUDA
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.onnxruntime.sessions import onnxruntime_module

Arrays = list[npt.NDArray[np.float32]]
MakeRunner = Callable[[str], OrtRunner]
"""A new runner with a lowering of the bundle."""

LENGTHS = (37, 5, 20)
"""Tokens of the rows of a prompt: a padded batch."""
PATIENCE = 240
"""Seconds after which a check is taken for a deadlock: every thread's stack is printed, and the run ends."""


@dataclass(frozen=True)
class Work:
    """What one thread does with one state: the same tokens whoever does it."""

    seed: int
    batch: int
    steps: int

    def run(self, runner: OrtRunner) -> Arrays:
        """Logits of every call and the states in between, in order."""
        rng = np.random.default_rng(self.seed)
        vocab, batch = runner.spec.vocab_size, self.batch
        ones = np.ones(batch, np.int64)
        lens = np.array(LENGTHS[:batch])
        state = runner.new_state(batch)
        ids = rng.integers(0, vocab, (batch, int(lens.max())))
        found = [runner.prefill(ids, 0 * ones, lens, state)]

        def step(where: Any, positions: npt.NDArray[np.int64]) -> None:
            found.append(runner.step(rng.integers(0, vocab, (batch, 1)), positions, ones, where))

        for index in range(self.steps):
            step(state, lens + index)
        layers = runner.export_state(state)
        carried = runner.import_state(layers)  # a second state: other buffers, a graph of its own
        positions = lens + self.steps
        for index in range(self.steps):
            step(carried, positions + index)
            step(state, positions + index)
        runner.reset_rows(carried, [0])
        positions = positions + self.steps
        positions[0] = 0
        step(carried, positions)
        return [*found, *layers, *runner.export_state(carried)]


class Overlap:
    """How many threads were inside calls of a runner, and inside ONNX Runtime, at once.

    Attributes:
        most_calls: calls of runners that had begun and not ended: above 1, threads did compete.
        most_inside: of those, how many ran a session.
    """

    def __init__(self) -> None:
        self.most_calls = self.most_inside = 0
        self._now = {"calls": 0, "inside": 0}
        self._lock = threading.Lock()

    def watch(self, runner: OrtRunner) -> OrtRunner:
        """Count this runner's calls."""
        for name in ("prefill", "step"):
            setattr(runner, name, self._counted(getattr(runner, name), "calls"))
        sessions = runner.sessions
        sessions.run = self._counted(sessions.run, "inside")  # type: ignore[method-assign]
        return runner

    def _counted(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            with self._lock:
                self._now[what] += 1
                self.most_calls = max(self.most_calls, self._now["calls"])
                self.most_inside = max(self.most_inside, self._now["inside"])
            try:
                return call(*arguments)
            finally:
                with self._lock:
                    self._now[what] -= 1

        return counted


class ThreadChecks:
    """One bundle, run by many threads.

    Args:
        make: makes a runner with a lowering.
        lowerings: those to run.
        threads: how many at once.
        rounds: how often each thread works.
        steps: of each piece of work; it makes three times as many.

    Attributes:
        facts: what `--save` writes.
    """

    def __init__(
        self, make: MakeRunner, lowerings: list[str], *, threads: int = 8, rounds: int = 3, steps: int = 12
    ) -> None:
        self._make, self.lowerings = make, lowerings
        self.threads, self.rounds, self.steps = threads, rounds, steps
        self._expected: dict[tuple[str, Work], Arrays] = {}
        self.facts: dict[str, Any] = {"threads": threads, "rounds": rounds, "steps": steps}

    def work(self, thread: int, round_: int) -> Work:
        """Batches of 1, 2 and 3 rows in turns, tokens of its own for each thread and round."""
        return Work(100 * round_ + thread, 1 + (thread + round_) % len(LENGTHS), self.steps)

    def alone(self) -> str:
        """What everything gives in one thread, each piece of work with a new runner, twice the same."""
        for lowering in self.lowerings:
            for thread in range(self.threads):
                for round_ in range(self.rounds):
                    work = self.work(thread, round_)
                    self._expected[lowering, work] = work.run(self._make(lowering))
            again = self.work(0, 0)
            difference = differences(again.run(self._make(lowering)), self._expected[lowering, again])
            assert difference is None, f"{lowering}, not even in one thread: {difference}"
        return f"{len(self._expected)} pieces of work"

    def own_runners(self) -> str:
        """Every thread makes runners of its own, all lowerings in turns."""

        def work(thread: int, overlap: Overlap) -> list[OrtRunner]:
            made = []
            for round_ in range(self.rounds):
                lowering = self.lowerings[(thread + round_) % len(self.lowerings)]
                made.append(overlap.watch(self._make(lowering)))
                self._compare(lowering, made[-1], self.work(thread, round_))
            return made

        return self._together("own runners", work)

    def one_runner(self, lowering: str) -> str:
        """All threads share one runner; states are their own, and come and go."""
        shared = self._make(lowering)

        def work(thread: int, overlap: Overlap) -> list[OrtRunner]:
            if thread == 0:
                overlap.watch(shared)
            for round_ in range(self.rounds):
                self._compare(lowering, shared, self.work(thread, round_))
            return [shared]

        return self._together(f"one runner, {lowering}", work)

    def mixed(self) -> str:
        """Half of the threads share a runner, the others make runners and let them go."""
        shared = {lowering: self._make(lowering) for lowering in self.lowerings}

        def work(thread: int, overlap: Overlap) -> list[OrtRunner]:
            used = [overlap.watch(runner) for runner in shared.values()] if thread == 0 else []
            for round_ in range(self.rounds):
                lowering = self.lowerings[(thread // 2 + round_) % len(self.lowerings)]
                runner = shared[lowering] if thread % 2 else overlap.watch(self._make(lowering))
                self._compare(lowering, runner, self.work(thread, round_))
                used.append(runner)
            return used

        return self._together("mixed", work)

    def all(self) -> list[tuple[str, Callable[[], str]]]:
        """Every check; the first makes what the others compare with."""
        shared = [(f"one runner, {name}", partial(self.one_runner, name)) for name in self.lowerings]
        return [
            ("alone", self.alone), ("own runners", self.own_runners), *shared, ("mixed", self.mixed)
        ]  # fmt: skip

    def _compare(self, lowering: str, runner: OrtRunner, work: Work) -> None:
        difference = differences(work.run(runner), self._expected[lowering, work])
        assert difference is None, f"{lowering}, {work}: {difference}"

    def _together(self, name: str, work: Callable[[int, Overlap], list[OrtRunner]]) -> str:
        """Run `work` in all threads at once; all must succeed, with their graphs."""
        overlap, begin = Overlap(), threading.Barrier(self.threads)

        def begun(thread: int) -> list[OrtRunner]:
            begin.wait(PATIENCE)
            return work(thread, overlap)

        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(begun, thread) for thread in range(self.threads)]
        failures = [f"{type(e).__name__}: {e}" for f in futures if (e := f.exception()) is not None]
        fact = self.facts.setdefault("found", {})[name] = {
            "failed_threads": failures, "calls_at_once": overlap.most_calls,
            "inside_at_once": overlap.most_inside,
        }  # fmt: skip
        assert not failures, f"{len(failures)} of {self.threads} threads: " + " | ".join(failures)[:1500]
        runners = {id(runner): runner for future in futures for runner in future.result()}.values()
        graphs = [r.cuda_graphs for r in runners if r.cuda_graphs.note != "the CPU has none"]
        notes = sorted({str(g.note) for g in graphs if not g.enabled and "standard step" not in str(g.note)})
        fact["runners"], fact["captured"] = len(runners), sum(g.captured for g in graphs)
        assert not notes, f"graphs were given up: {notes}"
        assert overlap.most_calls > 1, "the threads never met"
        said = f"{self.threads} threads, {len(runners)} runners: bit for bit what one thread gives"
        return (
            f"{said}; {fact['captured']} graphs captured; at most {overlap.most_calls} calls at once, "
            f"{overlap.most_inside} inside ONNX Runtime"
        )


def differences(got: Arrays, expected: Arrays) -> str | None:
    """Where two runs first differ in a bit, None if nowhere."""
    if len(got) != len(expected):
        return f"{len(got)} arrays instead of {len(expected)}"
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one.shape != other.shape or one.tobytes() != other.tobytes():
            worst = float(np.abs(one - other).max()) if one.shape == other.shape else float("nan")
            return f"result {index} of {len(got)} is off by {worst:.3g}"
    return None


def usable(bundle: Bundle, name: str) -> list[str]:
    """The lowerings that bundle and runtime have, each step graph once."""
    here = [n for n, graphs in LOWERINGS.items() if all(g in bundle.graphs for g in graphs)]
    if "ort-step" in here and "ort" in here:
        here.remove("ort")  # the same step; `ort-step` is what "auto" takes
    return here if name == CUDA else [n for n in here if n in ("standard", "ort-step")]


def about_machine(on_gpu: bool) -> dict[str, Any]:
    """Versions, the GPU and the command."""
    found = {
        "command": shlex.join(sys.argv), "python": platform.python_version(), "numpy": np.__version__,
        "onnxruntime": onnxruntime_module().__version__, "system": platform.platform(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }  # fmt: skip
    if on_gpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with suppress(OSError):
            found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def run_checks(checks: ThreadChecks, save: Path | None) -> int:
    """Run every check in order, with a line for each; 1 if one failed, else 0."""
    good = True
    for name, check in checks.all():
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=sys.__stderr__)
        start = time.perf_counter()
        try:
            said = f"ok   {name}: {check()}"
        except Exception as error:  # noqa: BLE001 - the other checks are still worth running
            said, good = f"FAIL {name}: {type(error).__name__}: {error}", False
        finally:
            faulthandler.cancel_dump_traceback_later()
        print(f"{said} ({time.perf_counter() - start:.1f} s)", flush=True)
        checks.facts.setdefault("checks", []).append(said)
        if save:
            save.write_text(json.dumps(checks.facts, indent=1))
    print("all right" if good else "not all right", flush=True)
    return 0 if good else 1


def main() -> int:
    """Run every check on one bundle."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runner", choices=(CUDA, CPU), default=CUDA)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="pieces of work of each thread")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-lock", action="store_true", help="the control: without turns on the GPU")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)

    def make(lowering: str) -> OrtRunner:
        runner = OrtRunner(bundle, arguments.runner, lowering=lowering, threads=1)  # type: ignore[arg-type]
        if arguments.no_lock:
            runner.alone = nullcontext()
        return runner

    checks = ThreadChecks(
        make, usable(bundle, arguments.runner), threads=arguments.threads, rounds=arguments.rounds,
        steps=arguments.steps,
    )  # fmt: skip
    on_gpu = arguments.runner == CUDA
    checks.facts["machine"] = about_machine(on_gpu)
    checks.facts["bundle"] = {"name": bundle.name, "dtype": bundle.dtype, "lowerings": checks.lowerings}
    checks.facts["graphs"] = [n for n in checks.lowerings if LOWERINGS[n][1] in CAPTURABLE and on_gpu]
    for name in ("machine", "bundle", "graphs"):
        print(json.dumps({name: checks.facts[name]}), flush=True)
    return run_checks(checks, arguments.save)


if __name__ == "__main__":
    sys.exit(main())
