"""Two builds of the kernels against each other: the same bits, and the same time?

    python tests/gpu/kernel_builds.py BEFORE.so AFTER.so [--turns 100] [--places 3] [--save builds.json]

For changes that must not cost anything. Each size is timed at several places in memory, where both builds
work on the same tensors: what a call takes depends on where its tensors lie, by more than such a change may
cost. At a place, CUDA graphs of before, after and before again take turns; the figures are medians, in µs of
one call, and the ratios those of the medians at one place. Exits with 1 if any bit differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.kernels.attention import Geometry, Kernels, load_kernels
from dijiang_export.bench.kernels.cells import Cell, Shape
from dijiang_export.bench.kernels.inputs import Call, Layer, make_calls, make_layer

CALLS = 24
"""In a graph: enough that the events around it do not count."""
SIZES = [
    # heads, d, type, B, L
    *((16, 64, t, b, 1) for t in ("float16", "float32") for b in (1, 8, 64)),
    *((32, 80, t, b, 1) for t in ("float16", "bfloat16", "float32") for b in (1, 8, 32)),
    *((32, 128, t, b, 1) for t in ("float16", "bfloat16", "float32") for b in (1, 32)),
    *((h, 256, t, b, 1) for t in ("float16", "bfloat16", "float32") for h, b in ((16, 1), (8, 4), (16, 32))),
    *((16, 64, t, 4, 1024) for t in ("float16", "bfloat16")),
    *((32, 80, t, b, length) for t in ("float16", "bfloat16") for b, length in ((1, 2048), (8, 512))),
    *((32, 128, t, 4, 1024) for t in ("float16", "bfloat16")),
    *((8, 256, t, 4, 1024) for t in ("float16", "bfloat16")),
]


class Place:
    """Tensors of one size, for whichever build."""

    def __init__(self, layer: Layer, call: Call, geometry: Geometry, builds: list[Kernels]) -> None:
        self.layer, self.call, self.geometry = layer, call, geometry
        batch, length = call.qkv.shape[:2]

        def scratch(sizes: list[int]) -> torch.Tensor | None:
            return torch.zeros(max(sizes), dtype=torch.uint8, device="cuda") if max(sizes) else None

        self.workspace = scratch([build.workspace_size(geometry, batch, length) for build in builds])
        self.sync = scratch([build.sync_size(geometry, batch, length) for build in builds])
        self.output, self.state = torch.empty_like(call.gate), call.state.clone()

    def attend(self, build: Kernels) -> None:
        layer, call = self.layer, self.call
        build.attention_tensors(
            self.geometry, qkv=call.qkv, gate=call.gate, past_state=self.state, positions=call.positions,
            seq_lens=call.seq_lens, proj=layer.proj, norm_weight=layer.norm_weight,
            norm_bias=layer.norm_bias, inv_freq=layer.inv_freq, log_decay=layer.log_decay,
            output=self.output, present_state=self.state, workspace=self.workspace, sync=self.sync,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def result(self, build: Kernels) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and state of one call from the beginning."""
        self.state.copy_(self.call.state)
        self.output.fill_(float("nan"))
        self.attend(build)
        torch.cuda.synchronize()
        return self.output.clone(), self.state.clone()

    def graph(self, build: Kernels) -> Callable[[], float]:
        """A function that times one replay of CALLS calls: µs of one."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            self.attend(build)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self.attend(build)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e3 / CALLS

        return replay


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """Bit for bit, and nothing was left unwritten."""
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in one)
    return finite and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def compare(size: tuple[Any, ...], builds: list[Kernels], turns: int, places: int) -> dict[str, Any]:
    """One size: the same bits, and the times at each place."""
    heads, d, dtype, batch, length = size
    device = torch.device("cuda")
    cell = Cell("decode" if length == 1 else "prefill", Shape(heads, d), batch, length)
    layer = make_layer(cell.shape, device)
    geometry = Geometry(**asdict(layer.attributes), dtype=dtype)
    kept, times, same = [], [], True
    for number in range(places):
        (call,) = make_calls(cell, getattr(torch, dtype), device, seed=number + 1)
        place = Place(layer, call, geometry, builds)
        same = same and equal(*(place.result(build) for build in builds))
        before, after, again = (place.graph(build) for build in (builds[0], builds[1], builds[0]))
        samples: list[tuple[float, ...]] = [(before(), after(), again()) for _ in range(turns + 3)]
        times.append([statistics.median(column) for column in zip(*samples[3:], strict=True)])
        kept.append(place)  # or the next would lie where this one did
    return {
        "heads": heads, "d": d, "dtype": dtype, "batch": batch, "length": length, "same": same,
        "times": times, "kernels": builds[1].plan(geometry, batch, length),
    }  # fmt: skip


def main() -> int:
    """All sizes as lines; 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--places", type=int, default=3)
    parser.add_argument("--save", type=Path, help="all medians as JSON")
    arguments = parser.parse_args()
    builds = [load_kernels(arguments.before), load_kernels(arguments.after)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print("µs before and after, after/before, before/before (noise) at each place; bits; kernels")
    found = []
    for size in SIZES:
        row = compare(size, builds, arguments.turns, arguments.places)
        found.append(row)
        parts = [f"{b:8.3f} {a:8.3f} {a / b:.4f} {g / b:.4f}" for b, a, g in row["times"]]
        name = f"{row['heads']}x{row['d']} {row['dtype']} B{row['batch']} L{row['length']}"
        print(
            f"{name:26} {' |'.join(parts)} {'same' if row['same'] else 'OTHER'} {row['kernels']}", flush=True
        )
    ratios = sorted(a / b for row in found for b, a, _ in row["times"])
    noise = sorted(g / b for row in found for b, _, g in row["times"])
    for name, values in (("after/before", ratios), ("before/before", noise)):
        print(f"{name}: median {statistics.median(values):.4f}, {values[0]:.4f} to {values[-1]:.4f}")
    if arguments.save is not None:
        arguments.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["same"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
