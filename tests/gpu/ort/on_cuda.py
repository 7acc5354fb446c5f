"""What `validate` does not see of a bundle on ONNX Runtime with CUDA: `python on_cuda.py BUNDLE [options]`.

For each lowering that the bundle has (`to-onnx --variant ort --variant capture`): the recorded cases, CUDA
graphs against none, several runners, states and threads in one process, prefills in pieces, greedy text
against PyTorch's record (tests/gpu/greedy.py), memory that must not grow, and times of all lowerings in one
run. Needs onnxruntime-gpu and a GPU; no PyTorch. With `--runner onnxruntime-cpu`, what needs no GPU.
Prints a line for each check, exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu.checks import LENGTHS, Check, RunnerChecks, run_checks
from gpu.ort.times import OrtTimes

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners.onnxruntime.config import LOWERINGS
from dijiang_engines.runners.onnxruntime.cuda import CAPTURABLE, MAX_CAPTURES
from dijiang_engines.runners.onnxruntime.providers import CPU, CUDA
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.onnxruntime.sessions import onnxruntime_module
from dijiang_engines.validation.compare import compare_logits, compare_state
from dijiang_engines.validation.replay import REPLAYS
from dijiang_engines.validation.tolerances import tolerance
from dijiang_engines.validation.validate import validate

DRIFT = "drift"
"""The case of 10,000 tokens, which takes as long as all others together many times over."""
HOST_GROWTH = 4 << 20
"""Bytes by which the process may grow over many steps; an array leaked at each would be more."""


class Gpu:
    """The CUDA driver on the device's primary context, in which ONNX Runtime works."""

    def __init__(self, device: int = 0) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        handle, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)

    def used(self) -> int:
        """Bytes of the device that anyone uses."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._inside("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def synchronize(self) -> None:
        """Wait for everything in the context."""
        self._inside("cuCtxSynchronize")

    def _inside(self, name: str, *arguments: Any) -> None:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            self._call(name, *arguments)
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise OSError(f"{name} gives {code}")


class Checks(RunnerChecks):
    """One bundle, checked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.bundle = open_bundle(arguments.bundle)
        super().__init__(self.bundle, arguments.greedy)
        limit = self.spec.max_positions
        self.name, self.seconds = arguments.runner, arguments.seconds
        self.lengths = [n for n in arguments.lengths if limit is None or n <= limit]
        self.on_gpu = self.name == CUDA
        self.max_batch = 8
        self.runner = OrtRunner(self.bundle, self.name)
        """As `generate` opens it."""
        here = [n for n, graphs in LOWERINGS.items() if all(g in self.bundle.graphs for g in graphs)]
        self.lowerings = [n for n in here if n in arguments.lowering] if arguments.lowering else here
        self.runners: dict[str, OrtRunner] = {}
        for lowering in self.lowerings:
            self.runners[lowering] = OrtRunner(self.bundle, self.name, lowering=lowering)  # type: ignore[arg-type]
        self.gpu = Gpu() if self.on_gpu else None
        self.facts |= {
            "bundle": {
                "name": self.bundle.name, "dtype": self.dtype, "layers": self.spec.num_layers,
                "heads": self.spec.num_heads, "head_dim": self.spec.head_dim,
                "weights_bytes": self.bundle.files["weights.data"].bytes,
            },
            "machine": about_machine(self.on_gpu),
            "auto": self.runner.config.lowering,
        }  # fmt: skip

    @property
    def captured(self) -> list[str]:
        """Lowerings whose steps can be CUDA graphs, each step graph once."""
        return [n for n in self.lowerings if LOWERINGS[n][1] in CAPTURABLE and n != "ort-step"]

    def loading(self) -> str:
        """Seconds until each lowering's sessions are there and the first calls are done, capture included."""
        found = self.facts["load_seconds"] = {}
        for name, runner in self.runners.items():
            start = time.perf_counter()
            runner.warm_up()
            loaded = time.perf_counter()
            self.drive(runner, self.tokens(1, 3), np.array([3]), 2)
            found[name] = {"sessions": loaded - start, "first_calls": time.perf_counter() - loaded}
        return json.dumps(found)

    def placement(self) -> str:
        """Which provider each node is assigned to, before providers fuse theirs."""
        ort = onnxruntime_module()
        found: dict[str, Any] = {}
        for graph in dict.fromkeys(g for n in self.lowerings for g in LOWERINGS[n]):
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            session = ort.InferenceSession(
                str(self.bundle.graph_path(graph)), options, providers=[self.runner.sessions.provider(False)]
            )
            ops: dict[str, Counter[str]] = {}
            for part in session.get_provider_graph_assignment_info():
                nodes = ops.setdefault(part.ep_name, Counter())
                nodes.update(node.op_type for node in part.get_nodes())
            found[graph] = {name: dict(count.most_common()) for name, count in ops.items()}
        self.facts["placement"] = found
        said = {g: {n: sum(o.values()) for n, o in ops.items()} for g, ops in found.items()}
        return "nodes " + json.dumps(said)

    def cases(self, name: str, drift: bool = False) -> str:
        """The recorded cases; those of 10,000 tokens only with `drift`."""
        reference = self.bundle.reference()
        wanted = [case for case in self.bundle.cases or () if (case == DRIFT) == drift]
        report = validate(
            self.runners[name], reference, dtype=self.dtype, cases=wanted, replays=tuple(REPLAYS)
        )
        self.facts.setdefault("validated", {})[f"{name}{' drift' if drift else ''}"] = report.to_json()
        report.raise_on_mismatch()
        worst = max(r.logits_error or 0 for r in report.results)
        state = max(r.state_error or 0 for r in report.results)
        checks = sum(r.checks for r in report.results)
        return f"{checks} checks, largest errors {worst:.1e} (logits), {state:.1e} (states)"

    def graphs(self, name: str) -> str:
        """Steps are CUDA graphs, and those change no bit."""
        runner = self.runners[name]
        assert LOWERINGS[name][1] in CAPTURABLE
        plain = OrtRunner(self.bundle, self.name, lowering=name, cuda_graph=False)  # type: ignore[arg-type]
        said = self.same_bits(runner, plain)
        assert runner.cuda_graphs.enabled and runner.cuda_graphs.captured, str(runner.cuda_graphs.note)
        return f"{said}; {runner.cuda_graphs.captured} bindings are graphs"

    def runners_side_by_side(self) -> str:
        """Runners of all lowerings in turns, each with two states, give what each gives alone."""
        ids = self.tokens(10, 2, 1)
        ones = np.ones(2, np.int64)

        def alone(runner: OrtRunner) -> list[Any]:
            state = runner.new_state(2)
            return [runner.step(ids[i], ones * i, ones, state) for i in range(10)]

        expected = {name: alone(runner) for name, runner in self.runners.items()}
        states = {name: [r.new_state(2), r.new_state(2)] for name, r in self.runners.items()}
        for i in range(10):
            for name, runner in self.runners.items():
                for state in states[name]:
                    got = runner.step(ids[i], ones * i, ones, state)
                    assert np.array_equal(got, expected[name][i]), f"{name}, step {i}"
        return f"{len(self.runners)} runners, two states each"

    def threads(self) -> str:
        """A new runner in each of two threads, which load, capture and step at once."""
        ids = self.tokens(40, 2, 1)
        ones = np.ones(2, np.int64)

        def work(_: int) -> tuple[list[Any], Any]:
            runner = OrtRunner(self.bundle, self.name)
            state = runner.new_state(2)
            return [runner.step(ids[i], ones * i, ones, state) for i in range(40)], runner.cuda_graphs

        expected, _ = work(0)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(work, range(4)))
        for got, _ in found:
            assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        notes = [graphs.note for _, graphs in found if not graphs.enabled]
        return (
            f"the same in {len(found)} runners, two at once; without graphs: {notes if self.on_gpu else '-'}"
        )

    def many_states(self) -> str:
        """States that come and go reuse buffers and graphs."""
        one = np.ones(1, np.int64)
        before, captured = self.used_memory(), 0
        for i in range(3 * MAX_CAPTURES):
            state = self.runner.new_state(1)
            for n in range(2):
                self.runner.step(self.tokens(1, 1), one * n, one, state)
            del state
            gc.collect(0)
            if i == 4:
                before, captured = self.used_memory(), self.runner.cuda_graphs.captured
        grown = {kind: used - before[kind][0] for kind, (used, _) in self.used_memory().items()}
        assert self.runner.cuda_graphs.captured == captured
        assert all(size <= before[kind][1] for kind, size in grown.items()), f"grown by {grown} bytes"
        return f"{3 * MAX_CAPTURES} states, one after the other: {captured} graphs, {grown} bytes more"

    def pieces(self, name: str) -> str:
        """A long prefill in pieces with the state carried gives what it gives in one call."""
        runner, length = self.runners[name], max(self.lengths)
        ids = self.tokens(1, length)
        zero = np.zeros(1, np.int64)
        whole = runner.new_state(1)
        expected = runner.prefill(ids, zero, zero + length, whole)[:, -1]
        states = runner.export_state(whole)
        worst = 0.0
        for size in (length // 4, length // 3 + 1):
            state = runner.new_state(1)
            for start in range(0, length, size):
                part = ids[:, start : start + size]
                got = runner.prefill(part, zero + start, zero + part.shape[1], state)[:, -1]
            found = [compare_logits(got, expected, tolerance(self.dtype, "logits"), scale=expected.std())]
            found += [
                compare_state(a, b, tolerance(self.dtype, "state"))
                for a, b in zip(runner.export_state(state), states, strict=True)
            ]
            for one in found:
                assert one.passed, f"pieces of {size}: {one.reason}"
                worst = max(worst, one.relative_error or 0)
        return f"{length} tokens at once, in 4 and in 3 pieces: within {worst:.1e}"

    def used_memory(self) -> dict[str, tuple[int, int]]:
        lines = Path("/proc/self/status").read_text().splitlines()
        host = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
        found = {"host": (1024 * host, HOST_GROWTH)}
        if self.gpu is not None:
            found["device"] = (self.gpu.used(), 0)
        return found

    def all(self, drift: bool) -> list[Check]:
        """Every check, those that say most first."""
        found: list[Check] = [("loading", self.loading)]
        for name in self.lowerings:
            found.append((f"recorded cases, {name}", partial(self.cases, name)))
        if self.on_gpu:
            for name in self.captured:
                found.append((f"graphs and none, {name}", partial(self.graphs, name)))
        times = OrtTimes(self)
        found += [("step times", times.steps), ("prefill times", times.prefill), ("loop times", times.loop)]
        if self.greedy is not None:
            for name, runner in self.runners.items():
                found.append((f"greedy text, {name}", partial(self.greedy_text, runner)))
        found.append(("no growth", self.no_growth))
        for name in dict.fromkeys("ort" if n == "ort" else "standard" for n in self.lowerings):
            if name in self.runners:
                found.append((f"prefill in pieces, {name}", partial(self.pieces, name)))
        found += [
            ("batches side by side", self.batches_side_by_side),
            ("runners side by side", self.runners_side_by_side),
            ("resetting rows", self.resetting_rows),
            ("many states", self.many_states),
            ("threads", self.threads),
            ("placement", self.placement),
        ]
        if self.on_gpu:
            found.append(("back to back", times.back_to_back))
        if drift and DRIFT in (self.bundle.cases or ()):
            found.append(("10,000 tokens", lambda: self.cases(self.runner.config.lowering, drift=True)))
        return found


def about_machine(on_gpu: bool) -> dict[str, Any]:
    """Versions, and the GPU."""
    ort = onnxruntime_module()
    found = {
        "onnxruntime": ort.__version__, "providers": ort.get_available_providers(),
        "build": ort.get_build_info(), "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip
    if on_gpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with suppress(OSError):
            found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def main() -> int:
    """Run every check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runner", choices=(CUDA, CPU), default=CUDA)
    parser.add_argument("--lowering", nargs="*", choices=tuple(LOWERINGS), help="only these")
    parser.add_argument("--greedy", type=Path, help="tests/gpu/greedy.py's record")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help="names of checks, or their beginnings")
    parser.add_argument("--only", nargs="*", help="likewise")
    parser.add_argument("--first", nargs="*", default=[], help="likewise: before all others")
    parser.add_argument("--drift", action="store_true", help="also the recorded case of 10,000 tokens")
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=0.4, help="measure each figure for about this long")
    arguments = parser.parse_args()
    checks = Checks(arguments)
    print(json.dumps(checks.facts["machine"] | checks.facts["bundle"] | {"auto": checks.facts["auto"]}))

    def wanted(name: str) -> bool:
        named = arguments.only is None or name.startswith(tuple(arguments.only))
        return named and not name.startswith(tuple(arguments.skip))

    chosen = [check for check in checks.all(arguments.drift) if wanted(check[0])]
    chosen.sort(key=lambda check: not check[0].startswith(tuple(arguments.first)))
    return run_checks(chosen, checks.facts, arguments.save)


if __name__ == "__main__":
    sys.exit(main())
