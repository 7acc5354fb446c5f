"""Measure our kernels beside others on this machine's GPU; one JSON document says everything about the run.

`record` says what is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from dijiang_engines.errors import UsageError
from dijiang_engines.machine import package_versions
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.bench.about import about_run, find_commit
from dijiang_export.bench.kernels.cells import Cell, Dtype, derive
from dijiang_export.bench.kernels.record import FORMAT, Buffers, medians

PEER_NAMES = ("fla", "fla-phi", "torch-compile", "copy")
_PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention")


class Lab(Protocol):
    """A GPU and who is measured on it: `lab.CudaLab`, or a test's stand-in."""

    absent: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """The GPU."""
        ...

    def library(self) -> dict[str, Any] | None:
        """Our library, None if it is not measured."""
        ...

    def ceilings(self) -> dict[str, Any]:
        """`copy` and `matmul`, each with `timing` and `per_second`."""
        ...

    def warm(self, cells: Sequence[Cell], jobs: int, progress: ProgressFactory) -> list[str]:
        """Compile ahead; what failed."""
        ...

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """By contestant: a `gpu.Measured`, or why there is none."""
        ...


def open_lab(peers: Sequence[str], dtype: Dtype, *, library: Path | None, ours: bool) -> Lab:
    """This machine's GPU; see `lab.CudaLab`."""
    from dijiang_export.bench.kernels.lab import CudaLab

    return CudaLab(peers, dtype, library=library, ours=ours)


def measure_kernels(
    lab: Lab,
    cells: Sequence[Cell],
    *,
    dtype: Dtype = "float16",
    seconds: float = 0.2,
    quoted: Buffers = "single",
    jobs: int = 1,
    limit: float | None = None,
    progress: ProgressFactory = silent,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure all contestants of `lab` at all `cells`.

    Args:
        lab: the GPU and the contestants, set up for `dtype`.
        cells: the sizes, in order.
        dtype: of qkv, gate and output.
        seconds: about how long to measure each figure.
        quoted: which of the two figures ratios and shares are of; both are measured.
        jobs: processes that compile ahead; 1 compiles on the way.
        limit: start no cell later than so many seconds from now; the others are left out, and named.
        progress: for the cells.
        report: called with what there is so far after each cell, and with the whole at the end.
    """
    start = time.monotonic()
    if not cells:
        raise UsageError("nothing is left to measure", hint="name at least one batch or prompt")
    about = about_run()
    about["versions"] |= package_versions(_PACKAGES)
    notes = lab.warm(cells, jobs, progress) if jobs > 1 else []
    ceilings = lab.ceilings()
    copy, matmul = ceilings["copy"]["per_second"], ceilings["matmul"]["per_second"]
    measured: list[dict[str, Any]] = []
    record = about | {
        "format": FORMAT,
        "commit": find_commit(),
        "gpu": lab.describe(),
        "library": lab.library(),
        "settings": {"dtype": dtype, "seconds": seconds, "quoted": quoted},
        "ceilings": plain(ceilings),
        "absent": lab.absent,
        "notes": notes,
        "cells": measured,
    }
    with progress("Measuring kernels", len(cells), "items") as bar:
        for index, cell in enumerate(cells):
            if limit is not None and time.monotonic() - start > limit:
                left = ", ".join(map(str, cells[index:]))
                notes.append(f"left out, the time was up: {left}")
                break
            results = {name: plain(found) for name, found in lab.measure(cell, seconds).items()}
            measured.append(
                {
                    "phase": cell.phase,
                    "heads": cell.shape.heads,
                    "head_dim": cell.shape.head_dim,
                    "batch": cell.batch,
                    "length": cell.length,
                    "results": results,
                    "derived": derive(cell, dtype, medians(results, quoted), copy, matmul),
                }
            )
            record["seconds"] = time.monotonic() - start
            report(record)
            bar.advance()
    return record


def plain(value: Any) -> Any:
    """Dataclasses and reasons as JSON-like data."""
    if isinstance(value, str):
        return {"skipped": value}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {k: plain(v) if is_dataclass(v) or isinstance(v, dict) else v for k, v in value.items()}
    return value
