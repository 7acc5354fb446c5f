"""Times dijiang_linear on a GPU: the products of one decoding step, alone and with attention between them.

    python tests/gpu/linear_times.py libdijiang_kernels.so [--shape 410m] [--rows 1 8] [--save times.json]

A step is a CUDA graph over as many layers as the model has, each with weights of its own, so that none stays
in the cache; times are medians of replays between two events. The floor is the weights' bytes over the
memory's rate as every benchmark measures it (dijiang_engines/bench/bandwidth.py), before the first and after
the last shape, the better of both. torch.matmul (cuBLAS) on the same weights is measured too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dijiang_engines.kernels.attention import Geometry, Kernels
from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm
from dijiang_export.bench.memory_rate import memory_rate

SHAPES = {  # layers, hidden, MLP, heads, head size, vocabulary
    "410m": (24, 1024, 4096, 16, 64, 50304),
    "1b": (16, 2048, 8192, 8, 256, 50304),
    "2.8b": (32, 2560, 10240, 32, 80, 50304),
}


def median_ms(run: Callable[[], object], replays: int = 60) -> float:
    """Of one replay of a graph over `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(10):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


class AllKernels(Kernels, LinearKernels):
    """Attention and the products around it."""


class Step:
    """The tensors of a GPT-NeoX decoding step with parallel residual."""

    def __init__(self, kernels: AllKernels, shape: str, rows: int) -> None:
        self.kernels = kernels
        self.layers, hidden, inner, heads, d, vocabulary = SHAPES[shape]
        self.geometry = Geometry(heads, heads, d, rotary_dim=d // 4, dtype="float16")
        width = heads * d

        def half(*sizes: int) -> Any:
            return torch.randn(*sizes, device="cuda", dtype=torch.float16) * 0.02

        def ones(size: int) -> Any:
            return torch.ones(size, device="cuda")

        self.x, self.y = half(rows, 1, hidden), half(rows, 1, hidden)
        self.qkv, self.gate = half(rows, 1, 3 * width), half(rows, 1, width)
        self.wide, self.mixed = half(rows, 1, inner), half(rows, 1, width)
        self.logits = half(rows, 1, vocabulary)
        self.norm, self.group = ones(hidden), ones(width)
        self.layer_norm: Any = ("layer_norm", self.norm, self.norm, 1e-5)
        self.weights = [
            (
                half(3 * width, hidden),
                half(width, hidden),
                half(inner, hidden),
                half(hidden, width),
                half(hidden, inner),
            )
            for _ in range(self.layers)
        ]
        self.biases = [ones(w.shape[0]) for w in self.weights[0]]
        self.head = half(vocabulary, hidden)
        self.state = torch.zeros(self.layers, rows, heads, d, d, device="cuda")
        self.positions = torch.full((rows,), 1000, dtype=torch.int32, device="cuda")
        self.lengths = torch.ones(rows, dtype=torch.int32, device="cuda")
        self.proj = torch.eye(d, device="cuda")
        self.frequencies = torch.rand(max(d // 8, 1), device="cuda")
        self.decay = torch.full((heads,), -0.1, device="cuda")
        bytes_ = kernels.workspace_size(self.geometry, rows, 1), kernels.sync_size(self.geometry, rows, 1)
        self.workspace, self.sync = (
            torch.zeros(max(n, 16), dtype=torch.uint8, device="cuda") for n in bytes_
        )

    def first_outputs(self, layer: int) -> list[LinearOutput]:
        """qkv, gate and the MLP's first product, with their norms."""
        qkv, gate, up, _, _ = self.weights[layer]
        norm = self.layer_norm
        return [
            LinearOutput(self.qkv, [LinearTerm(self.x, qkv, self.biases[0])], "identity", None, *norm),
            LinearOutput(self.gate, [LinearTerm(self.x, gate)], "identity", None, *norm),
            LinearOutput(self.wide, [LinearTerm(self.x, up, self.biases[2])], "gelu", None, *norm),
        ]

    def second_outputs(self, layer: int) -> list[LinearOutput]:
        """Attention's and the MLP's last products, and the residual."""
        _, _, _, dense, down = self.weights[layer]
        terms = [LinearTerm(self.mixed, dense, self.biases[3]), LinearTerm(self.wide, down, self.biases[4])]
        return [LinearOutput(self.y, terms, "identity", self.x)]

    def head_outputs(self) -> list[LinearOutput]:
        return [
            LinearOutput(self.logits, [LinearTerm(self.x, self.head)], "identity", None, *self.layer_norm)
        ]

    def linear(self, outputs: list[LinearOutput]) -> None:
        self.kernels.linear(outputs, constant_weights=True, stream=stream())

    def first(self, layer: int) -> None:
        self.linear(self.first_outputs(layer))

    def second(self, layer: int) -> None:
        self.linear(self.second_outputs(layer))
        self.x, self.y = self.y, self.x

    def attention(self, layer: int) -> None:
        state = self.state[layer]
        self.kernels.attention_tensors(
            self.geometry, qkv=self.qkv, gate=self.gate, past_state=state, present_state=state,
            positions=self.positions, seq_lens=self.lengths, proj=self.proj, norm_weight=self.group,
            norm_bias=self.group, inv_freq=self.frequencies, log_decay=self.decay, output=self.mixed,
            workspace=self.workspace, sync=self.sync, stream=stream(),
        )  # fmt: skip

    def all(self, *parts: Callable[[int], None], head: bool = True) -> Callable[[], None]:
        def run() -> None:
            for layer in range(self.layers):
                for part in parts:
                    part(layer)
            if head:
                self.linear(self.head_outputs())

        return run

    def cublas(self, layer: int) -> None:
        qkv, gate, up, dense, down = self.weights[layer]
        for x, weight in (
            (self.x, qkv),
            (self.x, gate),
            (self.x, up),
            (self.mixed, dense),
            (self.wide, down),
        ):
            x.view(x.shape[0], -1) @ weight.T

    def bytes(self) -> int:
        return int(sum(w.nbytes for layer in self.weights for w in layer) + self.head.nbytes)


def measure(step: Step) -> dict[str, float]:
    """Milliseconds of a step and of its parts, each over all layers; the head is in `step`, `products` and
    `head` alone."""
    return {
        "step": median_ms(step.all(step.first, step.attention, step.second)),
        "products": median_ms(step.all(step.first, step.second)),
        "first": median_ms(step.all(step.first, head=False)),
        "second": median_ms(step.all(step.second, head=False)),
        "attention": median_ms(step.all(step.attention, head=False)),
        "head": median_ms(step.all()),
        "cublas": median_ms(step.all(step.cublas, head=False)),
    }


def say(name: str, step: Step, times: dict[str, float]) -> None:
    for outputs in (step.first_outputs(0), step.second_outputs(0), step.head_outputs()):
        print(name, step.kernels.linear_plan(outputs))
    a_layer = {k: round(1e3 * times[k] / step.layers, 2) for k in ("first", "second", "attention", "cublas")}
    print(name, {k: round(v, 4) for k, v in times.items()}, "µs a layer:", a_layer, flush=True)


def with_floors(rate: float, sizes: dict[str, int], times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """For the record: to each measurement its weights' bytes, their time at `rate` bytes a second, and what
    share of the step and of its products that time is."""
    found: dict[str, Any] = {"memory_gb_s": rate / 1e9}
    for name, each in times.items():
        floor = 1e3 * sizes[name] / rate
        found[f"{name}, ms"] = each | {
            "floor": floor, "weight_bytes": sizes[name],
            "floor_over_step": floor / each["step"], "floor_over_products": floor / each["products"],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--shape", nargs="+", default=["410m"], choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    kernels = AllKernels(given.library)
    gpu = torch.device("cuda")
    rates = [memory_rate(gpu, 0).copy]
    sizes: dict[str, int] = {}
    times: dict[str, dict[str, float]] = {}
    for shape in given.shape:
        for rows in given.rows:
            name, step = f"{shape}, {rows} rows", Step(kernels, shape, rows)
            sizes[name], times[name] = step.bytes(), measure(step)
            say(name, step, times[name])
            del step
            torch.cuda.empty_cache()
    rates.append(memory_rate(gpu, 0).copy)
    results = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rates": rates}
    results |= with_floors(max(rates), sizes, times)
    print(json.dumps(results, indent=1))
    if given.save:
        given.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
