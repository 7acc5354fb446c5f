"""Builds of dijiang_sample against each other: the same tokens, and what a call takes.

    python tests/gpu/sampling_builds.py BEFORE.so AFTER.so [MORE.so ...] [--turns 30] [--save builds.json]

For every size and setting, rows of several kinds draw with several random numbers; each build must choose
what the first chooses. CUDA graphs of the builds then take turns, with normal logits of width 2.5; the
figures are medians, in µs of one call. Exits with 1 if a token differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.kernels.attention import Kernels, load_kernels
from dijiang_engines.sampling import SamplingOptions

CALLS = 20
"""In a graph."""
SIZES = [(v, b) for v in (5000, 32000, 50304, 128256, 256000) for b in (1, 2, 8, 64, 256)]
OPTIONS = {
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(1.0),
    "top-k 50": SamplingOptions(0.9, top_k=50),
    "top-k 50, top-p .95": SamplingOptions(0.9, top_k=50, top_p=0.95),
    "top-p .9": SamplingOptions(1.0, top_p=0.9),
    "top-k 400": SamplingOptions(0.7, top_k=400),
    "top-k 400, top-p .95, min-p": SamplingOptions(0.7, top_k=400, top_p=0.95, min_p=0.002),
    "top-k 5000, top-p .9": SamplingOptions(1.0, top_k=5000, top_p=0.9),
}
DRAWS = 24
"""Random numbers of each row whose tokens are compared."""


class Rows:
    """Logits of one size and kind, and where tokens go."""

    def __init__(self, logits: torch.Tensor) -> None:
        batch = logits.shape[0]
        self.logits = logits
        self.tokens = torch.full((batch,), -77, dtype=torch.int64, device="cuda")
        self.status = torch.full((batch,), -77, dtype=torch.int32, device="cuda")
        self.draws = torch.zeros(batch, dtype=torch.int64, device="cuda")

    def choose(self, build: Kernels, options: SamplingOptions) -> None:
        build.sample(
            options, logits=self.logits, tokens=self.tokens, row_status=self.status, draws=self.draws, seed=3,
            stream=torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def chosen(self, build: Kernels, options: SamplingOptions) -> list[int]:
        """Tokens of all rows and draws."""
        found = []
        for draw in range(DRAWS):
            self.draws.fill_(draw)
            self.tokens.fill_(-77)
            self.choose(build, options)
            assert not self.status.any()
            found += self.tokens.tolist()
        return found

    def graph(self, build: Kernels, options: SamplingOptions) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                self.choose(build, options)
        return graph


def kinds(vocabulary: int, batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(vocabulary + batch)
    normal = torch.randn(batch, vocabulary, device="cuda", generator=generator)
    ties = torch.round(4 * normal) / 2
    sparse = torch.where(normal.abs() < 1.5, -torch.inf, 2 * normal)
    crowded = torch.where(normal > 0, 1e-5 * normal, normal - 20)
    kinds = {"normal": 2.5 * normal, "ties": ties, "sparse": sparse, "crowded": crowded}
    return kinds | {"sorted": (2.5 * normal).sort(dim=1).values, "equal": torch.zeros_like(normal)}


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / CALLS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("builds", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    builds = [load_kernels(path) for path in arguments.builds]
    record: list[dict[str, Any]] = []
    different = 0
    print(torch.cuda.get_device_name(), *(path.name for path in arguments.builds))
    for vocabulary, batch in SIZES:
        rows = {name: Rows(logits) for name, logits in kinds(vocabulary, batch).items()}
        print(
            f"V={vocabulary} B={batch}", *(build.sample_plan(batch, vocabulary) for build in builds), sep="; "
        )
        for name, options in OPTIONS.items():
            for kind, it in rows.items():
                first, *others = (it.chosen(build, options) for build in builds)
                for path, tokens in zip(arguments.builds[1:], others, strict=True):
                    wrong = sum(a != b for a, b in zip(first, tokens, strict=True))
                    different += wrong
                    if wrong:
                        print(f"DIFFERENT: {path.name} {name} {kind}: {wrong} of {len(first)} tokens")
            graphs = [rows["normal"].graph(build, options) for build in builds]
            turns = [[microseconds(graph) for graph in graphs] for _ in range(arguments.turns)]
            medians = [statistics.median(times) for times in zip(*turns, strict=True)]
            print(f"  {name:28}", *(f"{time:8.2f}" for time in medians), flush=True)
            record.append(
                {"vocabulary": vocabulary, "batch": batch, "options": name, "microseconds": medians}
            )
    print("the same tokens" if different == 0 else f"{different} tokens differ")
    if arguments.save:
        arguments.save.write_text(json.dumps(record, indent=1) + "\n")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
