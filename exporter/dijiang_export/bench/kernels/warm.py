"""Compile what the contestants of `bench kernels` need, in processes of their own, ahead of the measurement.

Triton and torch.compile keep what they compiled on disk, and compile one kernel after the other: some
hundred for the default sizes. Several processes fill those caches at once. Nothing is timed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.bench.kernels.cells import Cell, Dtype, Shape

COMPILING = ("fla", "fla-phi", "torch-compile")
TASK_SECONDS = 300
PARTS = 4
"""Processes among which the configurations of one of flash-linear-attention's prefills are shared out."""

Task = tuple[str, tuple[Cell, ...], tuple[int, int]]
"""Contestant, cells, and which part of how many of its kernels' configurations."""


def tasks(cells: Sequence[Cell], names: Sequence[str]) -> list[Task]:
    """What each process compiles: one shape and phase of one contestant, the longest work first."""
    groups: dict[tuple[str, str, Shape], list[Cell]] = {}
    for name in names:
        for cell in cells:
            if name in COMPILING:
                groups.setdefault((name, cell.phase, cell.shape), []).append(cell)
    order = {"fla": 0, "torch-compile": 1, "fla-phi": 2}
    ranked = sorted(groups, key=lambda group: (group[1] != "prefill", order[group[0]]))
    made: list[Task] = []
    for group in ranked:
        if group[0] == "fla" and group[1] == "prefill":
            made += [(group[0], tuple(groups[group][:1]), (part, PARTS)) for part in range(PARTS)]
        else:
            made.append((group[0], tuple(groups[group]), (0, 1)))
    return made


def warm(
    cells: Sequence[Cell],
    names: Sequence[str],
    dtype: Dtype,
    jobs: int,
    progress: ProgressFactory = silent,
) -> list[str]:
    """Run all tasks, `jobs` at a time.

    Returns:
        What failed, a line each. The measurement compiles that itself, and says what is wrong with it.
    """
    todo = tasks(cells, names)
    failed: list[str] = []
    with progress("Compiling", len(todo), "items") as bar, ThreadPoolExecutor(jobs) as pool:
        for (name, group, _), error in zip(todo, pool.map(lambda task: _run(task, dtype), todo), strict=True):
            if error is not None:
                failed.append(f"{name}, {group[0].phase} {group[0].shape}: {error}")
            bar.advance()
    return failed


def _run(task: Task, dtype: str) -> str | None:
    """One process; its last words if it fails."""
    name, cells, part = task
    described = [[c.phase, c.shape.heads, c.shape.head_dim, c.batch, c.length] for c in cells]
    request = json.dumps({"name": name, "dtype": dtype, "cells": described, "part": part})
    try:
        done = subprocess.run(
            command_for("dijiang_export.bench.kernels.warm"), input=request, capture_output=True, text=True,
            timeout=TASK_SECONDS, check=False, env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"took more than {TASK_SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]


def compile_all(request: dict[str, Any]) -> None:
    """Call one contestant once at each of the request's cells, on the current GPU."""
    import torch

    from dijiang_export.bench.kernels.inputs import make_calls, make_layer
    from dijiang_export.bench.kernels.peers import PEERS, PeerError
    from dijiang_export.reference.model import DTYPES

    device = torch.device("cuda")
    contestant = PEERS[request["name"]]()
    part, parts = request["part"]
    if parts > 1:
        for tuner in contestant.tuners:  # type: ignore[attr-defined]
            tuner.configs = tuner.configs[part::parts] or tuner.configs[:1]
    for phase, heads, head_dim, batch, length in request["cells"]:
        cell = Cell(phase, Shape(heads, head_dim), batch, length)
        layer = make_layer(cell.shape, device)
        calls = make_calls(cell, DTYPES[request["dtype"]], device)
        try:
            with torch.no_grad():
                contestant.prepare(cell, layer, calls).run(0)
        except PeerError:
            continue
    torch.cuda.synchronize()


def main() -> None:
    """Compile what the request on standard input, JSON, asks for."""
    compile_all(json.load(sys.stdin))


if __name__ == "__main__":
    main()
