"""Measure an export: its time beside that of copying the checkpoint, and its memory above torch's own.

The export runs in a process of its own. Memory is taken there from the kernel's high-water mark (VmHWM:
everything resident, file pages included) and, sampled from here, as proportional set size with its
anonymous part. The baseline is the same process right after `import torch`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from dijiang_engines.errors import DijiangError, OutputError, RunnerError, UsageError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_export.bench.process_memory import memory, reset_peak
from dijiang_export.bench.random_checkpoint import SHAPES, write_random_checkpoint
from dijiang_export.export.cases import Cases

SAMPLE_SECONDS = 0.02
COPY_BLOCK = 16 << 20
COPIES_ON_DISK = 4.5
"""Free space needed, in checkpoints: itself, then a copy or a bundle (twice its size in float32), slack."""


@dataclass(frozen=True)
class ExportMeasurement:
    """One measured export. Bytes and seconds."""

    shape: str
    dtype: str
    cases: Cases
    checkpoint_bytes: int
    weights_bytes: int
    bundle_bytes: int
    copy_seconds: float
    """Copying the checkpoint's weights, from a cold cache, and flushing the copy to disk."""
    export_seconds: float
    """From the first import after torch to the renamed bundle, flushed; all parts."""
    parts: dict[str, float]
    """Seconds of each part as the exporter reports them."""
    baseline_rss: int
    """Resident after `import torch`."""
    peak_rss: int
    """High-water mark, file pages included."""
    baseline_pss: int
    peak_pss: int
    """Highest sampled proportional set size, file pages included."""
    peak_anonymous: int
    """Highest sampled anonymous part of it."""

    @property
    def rss_above(self) -> int:
        """What the export adds to an interpreter with torch imported."""
        return self.peak_rss - self.baseline_rss

    @property
    def seconds_without_cases(self) -> float:
        """The export less the recording of reference cases."""
        return self.export_seconds - self.parts.get("cases", 0.0)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with what follows from them."""
        return asdict(self) | {
            "rss_above": self.rss_above,
            "pss_above": self.peak_pss - self.baseline_pss,
            "seconds_without_cases": self.seconds_without_cases,
            "copies": self.seconds_without_cases / self.copy_seconds,
        }


def measure_export(
    shape: str,
    folder: Path,
    *,
    dtype: str = "float16",
    cases: Cases = "short",
    progress: ProgressFactory = silent,
) -> ExportMeasurement:
    """Write a random checkpoint of `shape`, copy it, export it, and say what that took.

    Args:
        shape: a name in `random_checkpoint.SHAPES`.
        folder: where checkpoint/ and the bundle are made; they are left there.
        dtype: of the bundle. The checkpoint is float16.
        cases: none, short or full.
        progress: for writing the checkpoint.

    Raises:
        UsageError: there is no such shape.
        OutputError: the disk has no room.
        RunnerError: the export failed.
    """
    if shape not in SHAPES:
        raise UsageError(f"there is no shape {shape!r}", expected=f"one of {', '.join(SHAPES)}")
    _check_space(folder, shape)
    weights = write_random_checkpoint(folder / "checkpoint", SHAPES[shape], progress=progress)
    with progress("Copying it, for comparison", None, "items"):
        copy_seconds = time_copy(weights, folder / "copy.safetensors")
    forget_pages(weights)
    bundle = folder / f"{shape}.bundle"
    with progress(f"Exporting {shape}", None, "items"):
        first, last, peak_pss, peak_anonymous = _run_child(weights.parent, bundle, dtype, cases)
    return ExportMeasurement(
        shape=shape,
        dtype=dtype,
        cases=cases,
        checkpoint_bytes=weights.stat().st_size,
        weights_bytes=last["weights_bytes"],
        bundle_bytes=sum(file.stat().st_size for file in bundle.iterdir()),
        copy_seconds=copy_seconds,
        export_seconds=last["seconds"],
        parts=last["parts"],
        baseline_rss=first["baseline"]["VmRSS"],
        peak_rss=last["peak"]["VmHWM"],
        baseline_pss=first["baseline"]["Pss"],
        peak_pss=max(peak_pss, first["baseline"]["Pss"]),
        peak_anonymous=peak_anonymous,
    )


def _run_child(source: Path, target: Path, dtype: str, cases: Cases) -> tuple[Any, Any, int, int]:
    """The child's two messages, and the highest sampled Pss and Pss_Anon."""
    command = command_for("dijiang_export.bench.export", str(source), str(target), dtype, cases)
    errors = target.with_suffix(".log")
    pss = anonymous = 0
    with (
        errors.open("w+b") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as child,
    ):
        assert child.stdout is not None
        try:
            while child.poll() is None:
                with suppress(OSError):
                    now = memory(str(child.pid))
                    pss, anonymous = max(pss, now.get("Pss", 0)), max(anonymous, now.get("Pss_Anon", 0))
                time.sleep(SAMPLE_SECONDS)
        except BaseException:
            child.kill()
            raise
        lines = child.stdout.read().decode().splitlines()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    errors.unlink()
    if child.returncode != 0 or len(lines) < 2:
        raise RunnerError(
            "the measured export failed", got=_last_words(said) or f"exit code {child.returncode}"
        )
    return json.loads(lines[0]), json.loads(lines[-1]), pss, anonymous


def _last_words(said: str) -> str:
    """An error as its author wrote it; of a traceback, the last line."""
    return said.splitlines()[-1] if "Traceback (most recent call last)" in said else said[-800:]


def time_copy(source: Path, target: Path) -> float:
    """Seconds to copy a file from a cold cache and to flush the copy to disk; the copy is removed."""
    os.sync()
    forget_pages(source)
    start = time.perf_counter()
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, COPY_BLOCK)
            writer.flush()
            os.fsync(writer.fileno())
        return time.perf_counter() - start
    finally:
        target.unlink(missing_ok=True)


def forget_pages(path: Path) -> None:
    """Ask the kernel to drop a file's cached pages, so that the next reader has to go to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check_space(folder: Path, shape: str) -> None:
    s = SHAPES[shape]
    size = 2 * (s.layers * (5 * s.hidden**2 + 2 * s.hidden * s.intermediate) + 2 * s.vocab * s.hidden)
    free = shutil.disk_usage(folder).free
    if free < COPIES_ON_DISK * size:
        raise OutputError(
            f"{folder} has too little room to measure the export of {shape}",
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{COPIES_ON_DISK * size / 1e9:.1f} GB",
            hint="name a folder on another disk with --folder",
        )


def main() -> None:
    """Export once in this process: source, target, type and cases are its arguments.

    Prints two lines of JSON: the memory before, and what the export took.
    """
    import torch  # noqa: F401 - the baseline is an interpreter that has it

    reset_peak()
    print(json.dumps({"baseline": memory("self")}), flush=True)
    start = time.perf_counter()
    from dijiang_export.export.to_onnx import export_bundle

    imported = time.perf_counter() - start
    source, target, dtype = sys.argv[1:4]
    cases = cast(Cases, sys.argv[4])
    try:
        report = export_bundle(source, target, dtype=dtype, cases=cases)
    except DijiangError as error:
        sys.exit(str(error))
    measured = {
        "seconds": time.perf_counter() - start,
        "parts": report.seconds | {"imports": imported},
        "peak": memory("self"),
        "weights_bytes": report.weights_bytes,
    }
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
