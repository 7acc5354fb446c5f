"""Measure a bundle or an engine on this machine, and say everything that the figures depend on.

The result is one JSON document: command, date, versions, machine, model, the outcome of a validation, the
figures of `dijiang_engines.bench`, PyTorch's if a checkpoint was given, and how long `generate` takes to
begin. Nothing here needs PyTorch, but for a checkpoint: TensorRT may live in a Python that has none.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dijiang_engines.bench.bandwidth import Bandwidth, CudaCopy, measure_bandwidth, measure_gpu_bandwidth
from dijiang_engines.bench.runner import BATCHES, FAR, NEAR, PREFILL_LENGTHS, bench_runner
from dijiang_engines.bench.timing import Effort
from dijiang_engines.errors import DijiangError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.open import Model, open_model
from dijiang_engines.machine import usable_cpus
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.runners import Runner, open_runner
from dijiang_engines.runners.base import HasSettings
from dijiang_engines.sizes import part_sizes
from dijiang_engines.tokenizer.load import load_tokenizer
from dijiang_engines.validation.validate import validate
from dijiang_export.bench.about import about_run
from dijiang_export.bench.process_memory import memory

KIND = "bench"
"""What these documents call themselves; `bench report` reads them."""
STARTUPS = 3


def measure_bundle(
    path: Path,
    *,
    runner: str = "auto",
    threads: int | None = None,
    spinning: str | None = None,
    prepack: str | None = None,
    checkpoint: Path | None = None,
    seconds: float = 2.0,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    progress: ProgressFactory = silent,
) -> dict[str, Any]:
    """Validate and measure a bundle or an engine.

    Args:
        path: its folder.
        runner: as for `open_runner`.
        threads: of ONNX Runtime and of PyTorch; default: the CPUs that this process may use.
        spinning: as for `open_runner`, as `prepack`; None for a runner's default.
        prepack: likewise.
        checkpoint: where the bundle came from, to measure PyTorch's reference model beside it.
        seconds: about how long to measure each figure.
        lengths: of prefills.
        batches: of steps.
        positions: of steps.
        progress: for the parts.

    Raises:
        ValidationMismatch: the model computes something else than was recorded; nothing is measured.
        BundleError, CheckpointError, RunnerError: it cannot be run.
    """
    about = about_run()
    model = open_model(path)
    told = {"threads": threads, "spinning": spinning, "prepack": prepack}
    threads = threads or usable_cpus()
    if isinstance(model, Bundle):
        told["threads"] = threads
    elif checkpoint is not None:
        told["threads"] = None  # they are PyTorch's then
    opened = open_runner(model, runner, **told)
    device = _device(opened.name)
    validated = _validated(model, opened, progress)
    effort = Effort(seconds)
    chosen = tuple(lengths or PREFILL_LENGTHS)
    before = _bandwidth(device, threads)
    report = bench_runner(
        opened,
        model.dtype,
        lengths=chosen,
        batches=tuple(batches or BATCHES),
        positions=tuple(positions or (NEAR, FAR)),
        effort=effort,
        bandwidth=None,
        tokenizer=load_tokenizer(model),
        quantised=model.quantised,
        progress=progress,
    )
    found = report.with_bandwidth(_better(before, _bandwidth(device, threads)))
    reference = None
    if checkpoint is not None:
        from dijiang_export.bench.reference import measure_in_subprocess

        with progress("Measuring PyTorch", None, "items"):
            reference = measure_in_subprocess(checkpoint, threads=threads, lengths=chosen, effort=effort)
    return about | {
        "kind": KIND,
        "threads": threads,
        "device": device,
        "settings": opened.settings() if isinstance(opened, HasSettings) else {},
        "model": {
            "name": model.name,
            "parameters": sum(part.count + part.wide for part in part_sizes(model.spec).values()),
            "spec": model.spec.to_json(),
            "weights_sha256": model.identity.weights_sha256,
            "weight_format": model.weight_format,
        },
        "validated": validated,
        "bench": found.to_json(),
        "reference": reference,
        "startup": _startup(model, opened.name, told),
    }


def _validated(model: Model, runner: Runner, progress: ProgressFactory) -> str:
    if model.reference_path is None:
        return "not validated: there are no recorded cases"
    report = validate(
        runner, model.reference(),
        dtype=model.dtype, activations=model.activations, replays=["prefill", "steps"], progress=progress,
    )  # fmt: skip
    report.raise_on_mismatch()
    worst = max(r.logits_error or 0.0 for r in report.results)
    return f"validated: largest logit error {worst:.1e} standard deviations"


def _device(runner: str) -> Literal["cpu", "gpu", "cuda"]:
    """What a runner computes on; "gpu" is somebody else's than NVIDIA's."""
    if runner.endswith("cpu"):
        return "cpu"
    return "gpu" if runner.endswith("gpu") else "cuda"


def _bandwidth(device: Literal["cpu", "gpu", "cuda"], threads: int) -> Bandwidth | None:
    """Of what the runner computes on; None for a GPU that cannot be asked from this Python."""
    if device == "cpu":
        return measure_bandwidth(threads)
    if device == "gpu":
        return None
    try:
        from dijiang_engines.nvidia.cuda import Cuda

        return measure_gpu_bandwidth(CudaCopy(Cuda()))
    except DijiangError:  # no cuda-bindings, or the model leaves no room: `bench peers` measures it too
        return None


def _better(a: Bandwidth | None, b: Bandwidth | None) -> Bandwidth | None:
    """The stricter of two measurements: anything else that ran meanwhile makes them smaller."""
    if a is None or b is None:
        return a or b
    return Bandwidth(a.threads, max(a.read, b.read), max(a.copy, b.copy))


def _startup(model: Model, runner: str, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """Seconds until a new `generate` process prints, and its peak memory; None without a tokenizer."""
    if model.tokenizer_path is None:
        return None
    command = [
        sys.executable, "-m", "dijiang_export", "generate", str(model.path), "--prompt", "def main():",
        "--max-tokens", "16", "--runner", runner, "--quiet",
    ]  # fmt: skip
    for name, value in told.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    seconds: list[float] = []
    peak = 0
    for _ in range(STARTUPS):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as child:
            assert child.stdout is not None
            first = child.stdout.read(1)
            seconds.append(time.perf_counter() - start)
            # Not wait4's ru_maxrss: across a fork it begins with what this process has resident.
            while first and (child.stdout.read(4096) or child.poll() is None):
                peak = max(peak, memory(str(child.pid)).get("VmHWM", 0))
        if child.returncode != 0 or not first:
            return None
    return {"first_output_seconds": statistics.median(seconds), "runs": seconds, "peak_rss": peak}
