"""Bundle + recipe -> engine folder: plans built, validated on this GPU, and put in place as a whole."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.building.lock import only_builder
from dijiang_engines.building.memory import MemoryEstimate, check_memory, estimate_memory
from dijiang_engines.building.plans import check_fit, plans, plugin_multiplies
from dijiang_engines.building.recipes import Recipe
from dijiang_engines.building.request import BuildRequest
from dijiang_engines.building.run_worker import run_worker
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import (
    LAYOUTS,
    EngineFolder,
    open_engine,
    write_engine_manifest,
)  # fmt: skip
from dijiang_engines.formats.file_table import ENGINE_MANIFEST, MANIFEST, REFERENCE
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.nvidia.cuda import Cuda, DeviceFacts
from dijiang_engines.nvidia.tensorrt_library import TensorRT
from dijiang_engines.plugin.cache import cache_folder
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner
from dijiang_engines.validation.validate import Report, validate
from dijiang_engines.version import __version__


@dataclass(frozen=True)
class BuildResult:
    """What `build_engine` made."""

    engine: EngineFolder
    seconds: float
    """In the builder, all plans together."""
    report: Report | None
    """None if nothing was validated."""
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
        only_builder(output),
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
            builds.append({"file": file} | run_worker(request, folder, progress, f"Building {file}"))
        _copy_files(bundle, folder)
        about = _facts(bundle, recipe, tensorrt, facts, builds)
        write_engine_manifest(folder, about)
        report = None
        if validate and bundle.cases is not None:
            report = _validate(folder, device, progress)
            write_engine_manifest(folder, about | {"validated": validation_summary(report)})
    seconds = sum(float(b["seconds"]) for b in builds)
    return BuildResult(open_engine(output, verify=False), seconds, report, estimate)


def timing_cache_path(version: str, facts: DeviceFacts) -> Path:
    """Where kernel timings are kept: they hold for one TensorRT and one kind of GPU."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", facts.name).strip("-")
    name = f"tensorrt-{version}-sm{facts.compute_capability}-{gpu}.cache"
    return cache_folder().parent / "timing" / name


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


def validation_summary(report: Report) -> dict[str, Any]:
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


def _validate(folder: Path, device: int, progress: ProgressFactory) -> Report:
    engine = open_engine(folder)
    runner = TensorRTRunner(engine, device=device)
    report = validate(runner, engine.reference(), dtype=engine.dtype, progress=progress)
    report.raise_on_mismatch()
    return report
