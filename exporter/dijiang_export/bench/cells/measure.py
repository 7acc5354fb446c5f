"""Measure everybody at several sizes on this machine's GPU; one JSON document says everything about the run.

command, date, versions, machine, load_average, commit    as of every measurement here
gpu, library     the device, and our kernels
settings         of all cells: `seconds`, and what the command adds
rate             bytes a second of a large copy, before the first cell and after the last, the better one
cells            what the size is, and its `name`; `bytes` that one call must move, `floor`, their seconds
                 at that rate, and `operations` of its matrix products; `results` by contestant: `skipped`
                 with the reason, or `timing` and, of what is compared with a reference, `error` and `right`;
                 what is wrong has no timing
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, TypeVar

from dijiang_engines.machine import package_versions
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.bench.about import about_run, find_commit
from dijiang_export.bench.kernels.measure import plain


class Cell(Protocol):
    """One size, a frozen dataclass; its string is what people read."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def nbytes(self) -> int:
        """That one call must move."""
        ...

    @property
    def operations(self) -> int:
        """Multiplications and additions of matrix products; 0 where none matter."""
        ...


C = TypeVar("C", bound=Cell)
_C = TypeVar("_C", bound=Cell, contravariant=True)


class Gpu(Protocol[_C]):
    """Where a command's cells are measured: a `device.KernelsGpu`, or a test's stand-in."""

    settings: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """`gpu` and `library`."""
        ...

    def rate(self) -> float:
        """Bytes a second of a large copy."""
        ...

    def measure(self, cell: _C, seconds: float) -> dict[str, Any]:
        """By contestant."""
        ...


def measure_cells(
    gpu: Gpu[C],
    cells: Sequence[C],
    *,
    title: str,
    seconds: float = 0.2,
    progress: ProgressFactory = silent,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every contestant at all `cells`.

    Args:
        gpu: where.
        cells: the sizes, those behind each other that share what takes long to make.
        title: of the progress, such as "Measuring steps".
        seconds: about how long to replay for each figure.
        progress: for the cells.
        report: called with what there is so far after each cell.
    """
    about = about_run()
    about["versions"] |= package_versions(("torch",))
    measured: list[dict[str, Any]] = []
    rate = gpu.rate()
    record = about | {"commit": find_commit(), **gpu.describe()}
    record |= {"settings": {**gpu.settings, "seconds": seconds}, "rate": rate, "cells": measured}
    with progress(title, len(cells), "items") as bar:
        for cell in cells:
            size = {"name": str(cell), **asdict(cell), "bytes": cell.nbytes, "operations": cell.operations}
            size["floor"] = cell.nbytes / rate
            measured.append(size | {"results": plain(gpu.measure(cell, seconds))})
            report(record)
            bar.advance()
    record["rate"] = max(rate, gpu.rate())
    for size in measured:
        size["floor"] = size["bytes"] / record["rate"]
    return record


def wrong(record: Mapping[str, Any]) -> list[str]:
    """Which of ours computed something else."""
    return [
        f"{cell['name']}, {name}: {result['error']:.1e}"
        for cell in record["cells"]
        for name, result in cell["results"].items()
        if result.get("right") is False
    ]
