"""Bundle + recipe -> engine folder: plans built, validated on this GPU, and put in place as a whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dijiang_engines import io_names
from dijiang_engines.building.memory import MemoryEstimate, check_memory, estimate_memory
from dijiang_engines.building.recipes import Recipe
from dijiang_engines.building.request import BuildRequest, Profile
from dijiang_engines.building.step_products import MAX_BATCH, MAX_INPUT_BYTES
from dijiang_engines.errors import OutputError, RunnerError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import (
    ENGINE_MANIFEST,
    LAYOUTS,
    EngineFolder,
    Profiles,
    open_engine,
    write_engine_manifest,
)  # fmt: skip
from dijiang_engines.formats.manifest import MANIFEST, REFERENCE, WEIGHTS
from dijiang_engines.nvidia.cuda import Cuda, DeviceFacts
from dijiang_engines.nvidia.tensorrt_library import TensorRT
from dijiang_engines.plugin.cache import cache_folder
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.version import __version__

_GRACE_SECONDS = 5


@dataclass(frozen=True)
class BuildResult:
    """What `build_engine` made."""

    engine: EngineFolder
    seconds: float
    """In the builder, all plans together."""
    report: Any
    """`validate.Report`, or None."""
    estimate: MemoryEstimate


def build_engine(
    bundle: Bundle,
    output: Path,
    recipe: Recipe,
    *,
    precision: str | None = None,
    device: int = 0,
    force: bool = False,
    timing_cache: Path | None = None,
    use_timing_cache: bool = True,
    validate: bool = True,
    check_estimate: bool = True,
    progress: ProgressFactory = silent,
    log: Callable[[str], None] = lambda text: None,
) -> BuildResult:
    """Build an engine for this machine's GPU and the TensorRT that is installed.

    Args:
        bundle: what to build.
        output: the engine folder; appears only when everything is done, validated and complete.
        recipe: for which sizes, and how.
        precision: must be the bundle's type if given: it is fixed when a bundle is exported.
        device: index of the GPU.
        force: replace an engine that is there.
        timing_cache: file of kernel timings to start from and add to; default: one per TensorRT and GPU in
            the user's cache folder.
        use_timing_cache: False measures everything anew.
        validate: replay the recorded cases on the new engine; a difference means that there is no engine.
        check_estimate: refuse to begin if memory will not suffice.
        progress: for the parts.
        log: takes lines for people.

    Raises:
        UsageError: bundle and recipe do not fit each other.
        RunnerError: TensorRT or the GPU is missing, memory does not suffice, or the build failed.
        PluginError: the plugin is missing.
        ValidationMismatch: the engine computes something else than PyTorch did.
        OutputError: `output` exists, cannot be written, or is being written by another process.
    """
    check_fit(bundle, recipe, precision)
    cuda = Cuda(device)
    facts = cuda.facts()
    tensorrt = TensorRT(facts.compute_capability)
    _check_dialect(bundle, recipe, tensorrt, facts)
    estimate = estimate_memory(bundle, recipe)
    log(f"TensorRT {tensorrt.version}, {facts.name}; {estimate}")
    if check_estimate:
        check_memory(estimate, facts)
    cache = None
    if use_timing_cache:
        cache = timing_cache or timing_cache_path(tensorrt.version, facts)
        cache.parent.mkdir(parents=True, exist_ok=True)
    with (
        _only_builder(output),
        output_folder(output, force=force, markers=(ENGINE_MANIFEST,)) as folder,
        bundle.opened.unchanged_by_name(*bundle.files),
    ):
        builds = []
        for file, graph, profiles in plans(bundle, recipe):
            request = BuildRequest(
                onnx=bundle.graph_path(graph), plan=folder / file, plugin=tensorrt.plugin_library,
                dtype=bundle.dtype, profiles=profiles, workspace=recipe.workspace_mb << 20,
                optimization_level=recipe.optimization_level, timing_cache=cache, device=device,
                plugin_products=file == LAYOUTS["two"][1] and plugin_multiplies(bundle, recipe),
            )  # fmt: skip
            log(f"building {file}; this takes minutes for a large model")
            builds.append({"file": file} | _run_worker(request, folder, progress, f"Building {file}"))
        _copy_files(bundle, folder)
        about = _facts(bundle, recipe, tensorrt, facts, builds)
        write_engine_manifest(folder, about)
        report = None
        if validate and bundle.cases is not None:
            report = _validate(folder, device, progress)
            write_engine_manifest(folder, about | {"validated": report_facts(report)})
    seconds = sum(float(b["seconds"]) for b in builds)
    return BuildResult(open_engine(output, verify=False), seconds, report, estimate)


def timing_cache_path(version: str, facts: DeviceFacts) -> Path:
    """Where kernel timings are kept: they hold for one TensorRT and one kind of GPU."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", facts.name).strip("-")
    name = f"tensorrt-{version}-sm{facts.compute_capability}-{gpu}.cache"
    return cache_folder().parent / "timing" / name


def report_facts(report: Any) -> dict[str, Any]:
    """What engine.json keeps of a validation."""
    results = report.results

    def most(name: str) -> float | None:
        return max((getattr(r, name) for r in results if getattr(r, name) is not None), default=None)

    return {
        "passed": report.passed,
        "cases": sorted({r.case for r in results}),
        "replays": sorted({r.replay for r in results}),
        "checks": sum(r.checks for r in results),
        "logits_error": most("logits_error"),
        "state_error": most("state_error"),
    }


def check_fit(bundle: Bundle, recipe: Recipe, precision: str | None) -> None:
    """Compare a bundle's precision with what was asked for and what the recipe is meant for.

    Raises:
        UsageError: they do not fit.
    """
    if precision is not None and precision != bundle.dtype:
        raise UsageError(
            "the bundle has another precision than was asked for",
            got=bundle.dtype, expected=precision,
            hint=f"export the checkpoint again with `--dtype {precision}`",
        )  # fmt: skip
    if bundle.dtype not in recipe.precisions:
        raise UsageError(
            f"the recipe {recipe.name} is not meant for this bundle's precision",
            got=bundle.dtype, expected=" or ".join(recipe.precisions),
            hint=f"export the checkpoint again with `--dtype {recipe.precisions[0]}`",
        )  # fmt: skip


def _check_dialect(bundle: Bundle, recipe: Recipe, tensorrt: TensorRT, facts: DeviceFacts) -> None:
    if bundle.dtype not in tensorrt.dialect.dtypes:
        raise RunnerError(
            f"TensorRT {tensorrt.version} has no {bundle.dtype}",
            expected=" or ".join(tensorrt.dialect.dtypes),
            hint="export the checkpoint again with `--dtype float16`",
        )
    if recipe.architectures and facts.compute_capability not in recipe.architectures:
        raise UsageError(
            f"the recipe {recipe.name} is for other GPUs",
            got=f"{facts.name}, sm_{facts.compute_capability}",
            expected=", ".join(f"sm_{number}" for number in recipe.architectures),
            hint="choose another with --recipe; engines are built on the GPU that runs them",
        )


def plans(bundle: Bundle, recipe: Recipe) -> Iterator[tuple[str, str, list[Profile]]]:
    """(file, graph, profiles) of each plan."""
    context = profile_shapes(bundle, recipe.profiles, step=False)
    generation = profile_shapes(bundle, recipe.profiles, step=True)
    files = LAYOUTS[recipe.layout]
    if recipe.layout == "one":
        yield files[0], "prefill_trt", [context, generation]
    else:
        yield files[0], "prefill_trt", [context]
        yield files[1], "step_trt", [generation]


def plugin_multiplies(bundle: Bundle, recipe: Recipe) -> bool:
    """Are a step plan's matrix products the plugin's? Its kernels are for few rows of float16."""
    if recipe.step_products != "plugin" or bundle.dtype != "float16" or recipe.max_batch > MAX_BATCH:
        return False
    spec = bundle.spec
    width = spec.intermediate_size + (spec.hidden_size if spec.parallel_residual else 0)
    return recipe.max_batch * max(width, spec.hidden_size) * 2 <= MAX_INPUT_BYTES


def profile_shapes(bundle: Bundle, sizes: Profiles, *, step: bool) -> Profile:
    """Least, best and most shape of every input: for prefill any length, for steps one token."""
    lengths = (1, 1, 1) if step else (1, sizes.opt_length, sizes.max_length)
    batches = (1, sizes.opt_batch, sizes.max_batch)
    spec = bundle.spec
    shapes: Profile = {
        io_names.INPUT_IDS: [[b, n] for b, n in zip(batches, lengths, strict=True)],
        io_names.POSITIONS: [[b] for b in batches],
        io_names.SEQ_LENS: [[b] for b in batches],
    }
    for layer in range(spec.num_layers):
        shapes[io_names.past_state(layer)] = [[b, *spec.state_shape] for b in batches]
    return shapes


def _copy_files(bundle: Bundle, folder: Path) -> None:
    for name in bundle.files:
        if name not in (WEIGHTS, MANIFEST) and not name.endswith(".onnx"):
            shutil.copyfile(bundle.path / name, folder / name)


def _facts(
    bundle: Bundle, recipe: Recipe, tensorrt: TensorRT, facts: DeviceFacts, builds: list[dict[str, Any]]
) -> dict[str, Any]:
    plugin = tensorrt.plugin
    return {
        "created_by": {"dijiang-export": __version__, "python": sys.version.split()[0]},
        "source": {
            "name": bundle.name,
            "spec_sha256": bundle.identity.spec_sha256,
            "weights_sha256": bundle.identity.weights_sha256,
        },
        "spec": bundle.spec.to_json(),
        "dtype": bundle.dtype,
        "logits": bundle.logits,
        "layout": recipe.layout,
        "profiles": recipe.profiles.to_json(),
        "made_for": {
            "tensorrt": tensorrt.version,
            "gpu": facts.name,
            "compute_capability": facts.compute_capability,
            "plugin_sources": plugin.sources,
            "plugin_version": plugin.version,
        },
        "made_with": {
            "cuda_driver": facts.driver,
            "cuda_runtime": facts.runtime,
            "plugin_cuda": plugin.cuda,
            "plugin_tensorrt_headers": plugin.tensorrt,
            "strongly_typed": tensorrt.dialect.strongly_typed,
            "tf32": False,
            "recipe": {k: v for k, v in asdict(recipe).items() if k != "description"},
            "plans": builds,
        },
        "reference": None if bundle.cases is None else {"file": REFERENCE, "cases": bundle.cases},
        "validated": None,
    }


def _validate(folder: Path, device: int, progress: ProgressFactory) -> Any:
    from dijiang_engines.runners.tensorrt.runner import TensorRTRunner
    from dijiang_engines.validation.validate import validate

    engine = open_engine(folder)
    runner = TensorRTRunner(engine, device=device)
    report = validate(runner, engine.reference(), dtype=engine.dtype, progress=progress)
    report.raise_on_mismatch()
    return report


# -- the builder's process -----------------------------------------------------------------------------


@contextmanager
def _only_builder(output: Path) -> Iterator[None]:
    """Hold a lock beside the output, so that two processes do not both build it for minutes.

    Raises:
        OutputError: another process holds it.
    """
    import fcntl

    target = Path(os.path.abspath(output))
    path = target.parent / f".{target.name}.dijiang-lock"
    if not target.parent.is_dir():
        yield  # output_folder makes the parents; nobody else can be building there
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write beside {output}", got=error.strerror) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"another process is building {output}", hint="wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _run_worker(request: BuildRequest, folder: Path, progress: ProgressFactory, title: str) -> dict[str, Any]:
    """Run `build_worker` to its end; what its "done" says.

    Raises:
        RunnerError: it failed or died. Whatever else ends the wait also ends the process.
    """
    note = folder / "request.json"
    request.write(note)
    log_path = folder / "build.log"
    command = [sys.executable, "-m", "dijiang_engines.building.worker", str(note)]
    with log_path.open("w", encoding="utf-8") as log_file, progress(title, None, "items") as bar:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_file, text=True,
            start_new_session=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        with process:
            try:
                done = _follow(process, bar)
                status = process.wait()
            except BaseException:
                _end(process)
                raise
    text = log_path.read_text(encoding="utf-8", errors="replace")
    note.unlink()
    kept = _keep_log(log_path)
    if "error" in done:
        hint = "; ".join(part for part in (done["hint"], kept) if part)
        raise RunnerError(done["what"], got=done["got"], expected=done["expected"], hint=hint or None)
    if status != 0 or not done:
        raise _died(status, text, kept)
    return done


def _keep_log(log_path: Path) -> str | None:
    """Move the builder's log to where the next build replaces it; says where that is."""
    target = cache_folder().parent / "build-engine.log"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(log_path, target)
    except OSError:
        log_path.unlink(missing_ok=True)
        return None
    return f"the builder's log is {target}"


def _follow(process: subprocess.Popen[str], bar: Any) -> dict[str, Any]:
    assert process.stdout is not None
    last: dict[str, Any] = {}
    for line in process.stdout:
        with suppress(json.JSONDecodeError):
            event = json.loads(line)
            kind = event.pop("event", None)
            if kind == "error":
                last = event | {"error": True}
            elif kind == "done":
                last = event
            elif kind in ("step", "phase"):
                bar.advance()
    return last


def _died(status: int, log: str, kept: str | None) -> RunnerError:
    lines = [line.strip() for line in log.splitlines() if line.strip()][-3:]
    hint = kept
    if status == -signal.SIGKILL:
        hint = "host memory ran out: close other programs, add swap, or use a smaller --max-batch"
    return RunnerError(
        "the builder's process died",
        got=f"signal {-status}" if status < 0 else " | ".join(lines)[:500] or f"exit code {status}",
        hint=hint,
    )


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
            return
