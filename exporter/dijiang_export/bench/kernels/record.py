"""A result of `bench kernels`: reading it, and what follows from it. Needs no GPU.

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

from pathlib import Path
from typing import Any, Literal

from dijiang_export.bench.kernels.cells import Cell, Shape, derive
from dijiang_export.bench.report.records import KERNELS, RecordError, check, read_json

FORMAT = 1
Buffers = Literal["single", "rotated"]
"""The two figures of a contestant; see `gpu`. Ratios and shares are of the quoted one."""


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


def _number(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)
