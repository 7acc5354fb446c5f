"""Measure decoding steps on this machine's GPU; one JSON document says everything about the run.

command, date, versions, machine, load_average, commit    as of every measurement here
gpu, library     the device, and our kernels
settings         dtype and seconds
rate             bytes a second of a large copy, before the first step and after the last, the better one
steps            shape, weights, rows; `weight_bytes` and `floor`, their seconds at that rate; `results` by
                 contestant: error, right, timing (at position 100) and far (at 100,000), or skipped
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from dijiang_engines.machine import package_versions
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.bench.about import about_run, find_commit
from dijiang_export.bench.kernels.measure import plain
from dijiang_export.bench.step.shapes import SHAPES, Cell, weight_bytes


class Gpu(Protocol):
    """`gpu.StepGpu`, or a test's stand-in."""

    dtype: str

    def describe(self) -> dict[str, Any]:
        """`gpu` and `library`."""
        ...

    def rate(self) -> float:
        """Bytes a second of a large copy."""
        ...

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """By contestant."""
        ...


def open_gpu(dtype: str, library: Path | None) -> Gpu:
    """This machine's; see `gpu.StepGpu`."""
    from dijiang_export.bench.step.gpu import StepGpu

    return StepGpu(dtype, library)


def measure_steps(
    gpu: Gpu,
    cells: Sequence[Cell],
    *,
    seconds: float = 0.2,
    progress: ProgressFactory = silent,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every contestant at all `cells`.

    Args:
        gpu: where.
        cells: which steps, those of one model and format behind each other.
        seconds: about how long to replay for each figure.
        progress: for the cells.
        report: called with what there is so far after each cell.
    """
    about = about_run()
    about["versions"] |= package_versions(("torch",))
    steps: list[dict[str, Any]] = []
    rate = gpu.rate()
    record = about | {"commit": find_commit(), **gpu.describe()}
    record |= {"settings": {"dtype": gpu.dtype, "seconds": seconds}, "rate": rate, "steps": steps}
    with progress("Measuring steps", len(cells), "items") as bar:
        for cell in cells:
            nbytes = weight_bytes(SHAPES[cell.shape], cell.weights)
            results = plain(gpu.measure(cell, seconds))
            steps.append(asdict(cell) | {"weight_bytes": nbytes, "floor": nbytes / rate, "results": results})
            report(record)
            bar.advance()
    record["rate"] = max(rate, gpu.rate())
    for step in steps:
        step["floor"] = step["weight_bytes"] / record["rate"]
    return record


def wrong(record: dict[str, Any]) -> list[str]:
    """Which of ours computed something else."""
    return [
        f"{Cell(step['shape'], step['weights'], step['rows'])}, {name}: {result['error']:.1e}"
        for step in record["steps"]
        for name, result in step["results"].items()
        if result.get("right") is False
    ]
