"""Everything about one engine that `validate` does not see: `python engine.py ENGINE [options]`.

CUDA graphs against none, batches side by side, two runners in one process, choosing tokens on the GPU against
the host, resetting rows, memory that must not grow, greedy text against PyTorch's record
(tests/gpu/greedy.py), and times. Needs TensorRT, the plugin and a GPU; no PyTorch. Prints a line for each
check, exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from checks import LENGTHS, POSITIONS, RunnerChecks, run_checks

from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.generation.generator import GenerateOptions, Generator, SamplingOptions
from dijiang_engines.runners.tensorrt.prefills import RECORDED_AT, Prefills
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner


class OnHost:
    """A runner without its own decode loop: logits are sampled on the host."""

    def __init__(self, runner: TensorRTRunner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        if name == "start_decoding":
            raise AttributeError(name)
        return getattr(self._runner, name)


class Checks(RunnerChecks):
    """One engine, checked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.engine = open_engine(arguments.engine)
        super().__init__(self.engine, arguments.greedy)
        started = time.perf_counter()
        self.runner = TensorRTRunner(self.engine)
        self.max_batch = self.runner.max_batch
        self.facts |= {
            "engine": self.engine.manifest["made_for"] | {
                "name": self.engine.name, "dtype": self.engine.dtype, "layout": self.engine.layout,
                "plan_bytes": {n: self.engine.files[n].bytes for n in self.engine.plans},
                "profiles": self.engine.manifest["profiles"],
                "builds": self.engine.manifest["made_with"]["plans"],
                "validated": self.engine.manifest["validated"],
            },
            "load_seconds": time.perf_counter() - started,
        }  # fmt: skip

    def graphs_and_none(self) -> str:
        plain = TensorRTRunner(self.engine, cuda_graph=False)  # also: two runners in one process
        return self.same_bits(self.runner, plain)

    def recorded_prefills(self) -> str:
        """Prefills before, at and after their recording give the bits of those enqueued layer by layer."""
        batch, length = min(3, self.max_batch), min(200, self.runner.max_length)
        ids, lens = self.tokens(batch, length), np.array([length, 5, 20][:batch])
        one, other = self.runner.new_state(batch), self.runner.new_state(batch)
        starts = np.zeros(batch, np.int64)
        plain = self.plain_prefills()
        for n in range(RECORDED_AT + 2):
            got = self.runner.prefill(ids, starts, lens, one)
            assert np.array_equal(got, plain.run(ids, starts, lens, other)), f"other logits, call {n}"
            same = np.array_equal(self.memory(one.layers, one), self.memory(other.layers, other))
            assert same, f"other states, call {n}"
            starts = starts + lens
        recorded = (batch, length) in self.runner.prefills.sizes
        assert recorded == (self.runner.rtx is None and not self.runner.all_logits), (
            self.runner.prefills.sizes
        )
        return f"{RECORDED_AT + 2} calls of {batch} x {length} tokens, recorded: {recorded}"

    def plain_prefills(self) -> Prefills:
        return Prefills(self.runner.contexts, self.runner.transfers, recorded=False)

    def states_apart(self) -> str:
        """A step that writes its states elsewhere gives the same, and leaves the old ones."""
        gpu, contexts, batch = self.runner.gpu, self.runner.contexts, self.max_batch
        ids, lens = self.tokens(batch, 9), np.full(batch, 9)
        one, other = self.runner.new_state(batch), self.runner.new_state(batch)
        for state in (one, other):
            self.runner.prefill(ids, np.zeros(batch, np.int64), lens, state)
        before = self.memory(other.layers, other)
        logits = self.runner.step(ids[:, :1], lens, np.ones(batch, np.int64), one)
        elsewhere = gpu.cuda.buffer(other.memory.size)
        context = contexts.for_steps(batch)
        contexts.bind(context, other.addresses(elsewhere.address))
        other.put(ids[:, :1], lens, np.ones(batch, np.int64))
        contexts.execute(context, other)
        found = np.empty(logits.shape, np.float32)
        gpu.stream.download(found.ctypes.data, other.logits, found.nbytes)
        gpu.stream.synchronize()
        places = [elsewhere.address + index * other.layer_bytes for index in range(len(other.layers))]
        assert np.array_equal(self.memory(places, other), self.memory(one.layers, one)), "other states"
        assert np.array_equal(self.memory(other.layers, other), before), "the old states have changed"
        assert np.array_equal(found, logits), "other logits"
        return f"{len(places)} layers of {batch} rows"

    def memory(self, places: list[int], state: Any) -> Any:
        """The states of all layers at these addresses."""
        size = state.batch * state.row_bytes
        found = np.empty((len(places), size // 4), np.float32)
        for row, place in zip(found, places, strict=True):
            self.runner.gpu.stream.download(row.ctypes.data, place, size)
        self.runner.gpu.stream.synchronize()
        return found

    def too_large(self) -> str:
        try:
            self.runner.new_state(self.runner.max_batch + 1)
        except RunnerError as error:
            said = str(error).replace("\n", " ")
        else:
            said = "no error"
        assert "--max-batch" in said, said
        return said

    def long_prefill(self) -> str:
        length = self.runner.max_length + 70
        ids, lens = self.tokens(1, length), np.array([length])
        zero = np.zeros(1, np.int64)
        whole, parts = self.runner.new_state(1), self.runner.new_state(1)
        got = self.runner.prefill(ids, zero, lens, whole)
        self.runner.prefill(ids[:, : self.runner.max_length], zero, zero + self.runner.max_length, parts)
        again = self.runner.prefill(
            ids[:, self.runner.max_length :], zero + self.runner.max_length, zero + 70, parts
        )
        assert np.array_equal(got[:, -1], again[:, -1])
        return f"{length} tokens are cut at {self.runner.max_length}"

    def device_and_host(self) -> str:
        ids = [self.tokens(n).tolist() for n in (5, 40, 1, 17)][: self.runner.max_batch]
        choices = {
            "greedy": GenerateOptions(max_tokens=60, ignore_eos=True),
            "greedy, eos": GenerateOptions(max_tokens=60),
            "top-k, top-p": GenerateOptions(
                max_tokens=60, seed=7, sampling=SamplingOptions(temperature=0.9, top_k=40, top_p=0.95)
            ),
            "penalty, min-p": GenerateOptions(
                max_tokens=60, seed=8,
                sampling=SamplingOptions(temperature=1.1, min_p=0.02, repetition_penalty=1.2),
            ),
        }  # fmt: skip
        said = []
        for name, options in choices.items():
            texts = []
            for runner in (self.runner, OnHost(self.runner)):
                generation = Generator(runner, self.tokenizer).start(ids, options)  # type: ignore[arg-type]
                for _ in generation:
                    pass
                texts.append([c.token_ids for c in generation.completions])
                end = generation.session()
                texts[-1].append([end.positions.tolist(), *[float(np.abs(x).sum()) for x in end.layers]])
            assert texts[0] == texts[1], f"{name}: {texts[0]} and {texts[1]}"
            said.append(f"{name} {sum(map(len, texts[0][:-1]))}")
        return "the same tokens and states: " + "; ".join(said)

    def stops(self) -> str:
        assert self.tokenizer is not None
        options = GenerateOptions(max_tokens=80, stop=("\n",), ignore_eos=True)
        texts, prompts = [], ["def main(", "x = 1  #"][: self.max_batch]
        for runner in (self.runner, OnHost(self.runner)):
            generation = Generator(runner, self.tokenizer).start(prompts, options)  # type: ignore[arg-type]
            for _ in generation:
                pass
            session = generation.session()
            texts.append(
                [(c.text, c.finish_reason) for c in generation.completions]
                + [session.positions.tolist(), [float(np.abs(x).sum()) for x in session.layers]]
            )
        assert texts[0] == texts[1], str(texts)
        return f"{texts[0][:2]}"

    def kernels_are_kept(self) -> str:
        """TensorRT for RTX: what the first runner compiled, the second one finds."""
        assert self.runner.rtx is not None
        self.runner.warm_up()
        state = self.runner.new_state(1)
        self.runner.step(self.tokens(1, 1), np.zeros(1, np.int64), np.ones(1, np.int64), state)
        self.runner.rtx.cache.save()
        path, note = self.runner.rtx.cache.path, self.runner.rtx.cache.note
        assert note is None and path.is_file(), note
        started = time.perf_counter()
        second = TensorRTRunner(self.engine)
        second.warm_up()
        assert second.rtx is not None and second.rtx.cache.loaded, second.notes()
        return (
            f"{path.stat().st_size} bytes; a second runner was ready in {time.perf_counter() - started:.2f} s"
        )

    def used_memory(self) -> dict[str, tuple[int, int]]:
        return {"device": (-self.runner.gpu.cuda.memory()[0], 0)}

    def times(self) -> str:
        found: dict[str, Any] = {"steps": [], "prefill": [], "loop": []}
        limit = self.spec.max_positions
        for batch in sorted({1, min(4, self.runner.max_batch), self.runner.max_batch}):
            for position in POSITIONS:
                if limit is None or position + 400 < limit:
                    seconds = self.runner.step_gpu_seconds(batch, position, 300)
                    found["steps"].append(
                        {"batch": batch, "position": position, "gpu_us": 1e6 * statistics.median(seconds)}
                    )
        for length in LENGTHS:
            if limit is not None and length > limit:
                continue
            ids, zero = self.tokens(1, length), np.zeros(1, np.int64)
            state = self.runner.new_state(1)
            entry: dict[str, float] = {"length": length}
            ways = {"enqueued_ms": self.plain_prefills().run} if length <= self.runner.max_length else {}
            for name, prefill in (ways | {"ms": self.runner.prefill}).items():
                seconds = []
                for _ in range(10 + RECORDED_AT):
                    start = time.perf_counter()
                    prefill(ids, zero, zero + length, state)
                    seconds.append(time.perf_counter() - start)
                entry[name] = 1e3 * statistics.median(seconds[RECORDED_AT:])
                entry[name.replace("ms", "slowest_ms")] = 1e3 * max(seconds[1:])
            found["prefill"].append(entry)
        for batch in sorted({1, self.runner.max_batch}):
            found["loop"].append({"batch": batch, **self.loop(batch)})
        found["memory"] = self.runner.memory()
        self.facts["times"] = found
        return json.dumps(found)

    def loop(self, batch: int) -> dict[str, float]:
        wall = self.loop_seconds(batch)
        gpu = statistics.median(self.runner.step_gpu_seconds(batch, 100, 300))
        return {"wall_us": 1e6 * wall, "gpu_us": 1e6 * gpu, "overhead_us": 1e6 * (wall - gpu)}

    def layers(self) -> str:
        """Where a step's time goes, layer by layer, without graphs."""
        trt = self.runner.tensorrt.trt
        sums: dict[str, float] = defaultdict(float)

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def report_layer_time(self, name: str, ms: float) -> None:
                sums[name] += ms

        runner = TensorRTRunner(self.engine, cuda_graph=False)
        state = runner.new_state(1)
        context = runner.contexts.bound_step(state)
        profiler = Profiler()
        context.profiler = profiler
        calls = 30
        one = np.ones(1, np.int64)
        for i in range(calls + 5):
            if i == 5:
                sums.clear()
            state.put(self.tokens(1, 1), one * i, one)
            runner.contexts.execute(context, state)
            runner.gpu.stream.synchronize()
        self.facts["layers_us"] = {name: 1e3 * ms / calls for name, ms in sums.items()}
        kinds: dict[str, list[float]] = defaultdict(list)
        for name, us in self.facts["layers_us"].items():
            kinds[kind_of(name)].append(us)
        self.facts["kinds_us"] = {k: {"count": len(v), "us": sum(v)} for k, v in kinds.items()}
        return json.dumps(self.facts["kinds_us"])


def kind_of(name: str) -> str:
    """A layer's name without its place."""
    for kind in (
        "DijiangLinear",
        "DijiangStep",
        "qkv",
        "gate",
        "dense",
        "up",
        "down",
        "lm_head",
        "DijiangAttention",
        "norm",
        "embed",
    ):
        if kind in name:
            return kind
    return "reformat" if "eformat" in name else "other"


def main() -> int:
    """Run every check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", type=Path)
    parser.add_argument("--greedy", type=Path, help="tests/gpu/greedy.py's record")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--skip", nargs="*", default=[])
    arguments = parser.parse_args()
    checks = Checks(arguments)
    names = [
        "graphs_and_none", "recorded_prefills", "states_apart", "batches_side_by_side", "resetting_rows",
        "too_large", "long_prefill", "device_and_host", "stops", "no_growth", "greedy_text", "times",
        "layers",
    ]  # fmt: skip
    left_out = set(arguments.skip)
    if checks.runner.rtx is not None:
        names.insert(0, "kernels_are_kept")
    if checks.engine.made_for.graphs != "plugin":
        left_out |= {"states_apart"}  # these are never in place
    if checks.tokenizer is None:
        left_out |= {"stops"}
    if checks.greedy is None:
        left_out |= {"greedy_text"}
    wanted = [(n.replace("_", " "), getattr(checks, n)) for n in names if n not in left_out]
    return run_checks(wanted, checks.facts, arguments.save)


if __name__ == "__main__":
    sys.exit(main())
