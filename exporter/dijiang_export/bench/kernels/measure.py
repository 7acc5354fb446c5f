"""Measure our kernels beside others on this machine's GPU; one JSON document says everything about the run.

The document (`docs/performance.md` quotes such records):

    command, date, versions, machine, load_average    as of every measurement here
    commit                 of the working tree, None outside one; "+" if it had changes
    gpu, library           the device; our library's path, SHA-256, version and architectures, or None
    settings               dtype, seconds, which figure is quoted, the tolerance
    ceilings               the measured copy and matrix product
    seconds                that it all took, compiling included
    absent                 contestants that could not take part, and why
    cells                  phase, heads, head_dim, batch, length; `results` by contestant; `derived`
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dijiang_engines.errors import UsageError
from dijiang_engines.machine import package_versions
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.bench.bundle import about_run
from dijiang_export.bench.kernels.cells import Cell, Dtype, Shape, derive
from dijiang_export.bench.report.records import KERNELS, RecordError, check, read_json

FORMAT = 1
Buffers = Literal["single", "rotated"]
"""The two figures of a contestant; see bench_kernels_cuda. Ratios and shares are of the quoted one."""
PEER_NAMES = ("fla", "fla-phi", "torch-compile", "copy")
_PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention")


class Lab(Protocol):
    """A GPU and who is measured on it: bench_kernels_lab.CudaLab, or a test's stand-in."""

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
        """By contestant: a `bench_kernels_cuda.Measured`, or why there is none."""
        ...


def open_lab(peers: Sequence[str], dtype: Dtype, *, library: Path | None, ours: bool) -> Lab:
    """This machine's GPU; see `bench_kernels_lab.CudaLab`."""
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
        "ceilings": _plain(ceilings),
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
            results = {name: _plain(found) for name, found in lab.measure(cell, seconds).items()}
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


def requote(record: dict[str, Any], quoted: Buffers) -> dict[str, Any]:
    """The same record with ratios and shares of the other figure."""
    rates = [record["ceilings"][name]["per_second"] for name in ("copy", "matmul")]
    cells = []
    for cell in record["cells"]:
        size = Cell(cell["phase"], Shape(cell["heads"], cell["head_dim"]), cell["batch"], cell["length"])
        derived = derive(size, record["settings"]["dtype"], medians(cell["results"], quoted), *rates)
        cells.append(cell | {"derived": derived})
    return record | {"settings": record["settings"] | {"quoted": quoted}, "cells": cells}


def medians(results: dict[str, Any], figure: Buffers) -> dict[str, float]:
    """Seconds by contestant, of those that were right."""
    return {name: found[figure]["median"] for name, found in results.items() if found.get(figure) is not None}


def wrong(record: dict[str, Any], name: str = "ours") -> list[str]:
    """The cells at which a contestant computed something else, with its errors, or failed."""
    found = []
    for cell in record["cells"]:
        result = cell["results"].get(name, {})
        if "skipped" in result:
            found.append(f"{cell_name(cell)}: {result['skipped']}")
        elif result.get("right") is False:
            errors = ", ".join(f"{k} {_number(v)}" for k, v in result["errors"].items())
            found.append(f"{cell_name(cell)}: {errors}")
    return found


def cell_name(cell: dict[str, Any]) -> str:
    """A recorded cell in words."""
    size = f"{cell['heads']}x{cell['head_dim']}"
    return f"{cell['phase']} {size} B{cell['batch']} L{cell['length']}"


def read_record(path: Path) -> dict[str, Any]:
    """A saved result.

    Raises:
        RecordError: it cannot be read, or is something else.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or "cells" not in record:
        raise RecordError(
            f"{path} is no record of `bench kernels`", hint="such files come from `bench kernels --save`"
        )
    return check(record, KERNELS, path)


def find_commit() -> str | None:
    """The commit that this code was checked out at, with "+" if files differ from it; None if unknown.

    DIJIANG_COMMIT names it for a copy of the files that has no repository around it.
    """
    if named := os.environ.get("DIJIANG_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=20, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _plain(value: Any) -> Any:
    """Dataclasses and reasons as JSON-like data."""
    if isinstance(value, str):
        return {"skipped": value}
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {k: _plain(v) if is_dataclass(v) or isinstance(v, dict) else v for k, v in value.items()}
    return value


def _number(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
