"""The rate of a GPU's memory by several kinds of copy: what a floor must not be taken from.

    python tests/gpu/memory_rate.py [--sizes 64 256 1024 2048] [--save rates.json]

For each size of the source in MiB, GB/s of bytes read and written, the best of 20 after one that does not
count:

    stream    a copy on a stream, as dijiang_engines.bench.bandwidth measures it for every benchmark
    graph     the same copy, captured in a CUDA graph and replayed
    kernel    a kernel that reads and writes as much (bitwise not, 64-bit), on a stream
    kernel, graph   the same kernel, captured
    cuda-bindings   as `stream`, through cuda-bindings in place of PyTorch, where they are installed

The graphs' figures are between events around one replay, so a launch's few microseconds are in them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.bench.bandwidth import GPU_ROUNDS, CudaCopy, measure_gpu_bandwidth
from dijiang_engines.errors import RunnerError
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_export.bench.memory_rate import TorchCopy

MIB = 1 << 20


class Work:
    """Anything that reads and writes `size` bytes, timed as a GpuCopy is."""

    def __init__(self, size: int, call: Callable[[], object]) -> None:
        self.size, self._call = size, call
        self._begin, self._end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def seconds(self) -> float:
        self._begin.record()
        self._call()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


def captured(call: Callable[[], object]) -> Callable[[], None]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rates(size: int) -> dict[str, float]:
    """GB/s by kind; those of PyTorch work on the same two buffers."""
    plain = TorchCopy(torch.device("cuda"), size)
    source, target = plain.source.view(torch.int64), plain.target.view(torch.int64)

    def copy() -> object:
        return plain.target.copy_(plain.source)

    def kernel() -> object:
        return torch.bitwise_not(source, out=target)

    works: dict[str, Any] = {
        "stream": plain,
        "graph": Work(size, captured(copy)),
        "kernel": Work(size, kernel),
        "kernel, graph": Work(size, captured(kernel)),
    }
    with suppress(RunnerError):
        works["cuda-bindings"] = CudaCopy(Cuda(), size)
    return {name: measure_gpu_bandwidth(work).copy / 1e9 for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 2048], help="MiB of a source")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rounds": GPU_ROUNDS,
        "gb_s": {},
    }
    for turn in (1, 2):  # twice: what differs less than the turns do says nothing
        for size in given.sizes:
            measured = rates(size * MIB)
            found["gb_s"][f"{size} MiB, turn {turn}"] = measured
            print(f"turn {turn} {size:5} MiB", {k: round(v) for k, v in measured.items()}, flush=True)
            torch.cuda.empty_cache()
    if given.save:
        given.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
