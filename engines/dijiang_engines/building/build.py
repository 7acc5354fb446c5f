"""Bundle + recipe -> engine folder: plans built, validated on this GPU, and put in place as a whole."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dijiang_engines.building.lock import only_builder
from dijiang_engines.building.memory import MemoryEstimate, check_memory, estimate_memory
from dijiang_engines.building.plans import PlanSource, check_fit, no_one_launch, plans, plugin_multiplies
from dijiang_engines.building.recipes import AUTO, ONE_LAUNCH, PLUGIN, PRODUCTS, Recipe
from dijiang_engines.building.request import BuildRequest
from dijiang_engines.building.run_worker import run_worker
from dijiang_engines.building.signed_blocks import write_signed
from dijiang_engines.building.target import Target, choose_target
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import (
    LAYOUTS,
    EngineFolder,
    open_engine,
    write_engine_manifest,
)  # fmt: skip
from dijiang_engines.formats.file_table import ENGINE_MANIFEST, GENAI_CONFIG, MANIFEST, REFERENCE
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.formats.quantised.manifest import KEY
from dijiang_engines.nvidia.cuda import Cuda, DeviceFacts
from dijiang_engines.nvidia.private_link import parser_environment
from dijiang_engines.plugin.cache import KERNELS, cache_folder
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.runners.tensorrt import cublaslt
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner
from dijiang_engines.validation.validate import Report, validate
from dijiang_engines.version import __version__

FAST_STEP = 90
"""The compute capability from which a GPU copies in bulk. On an H100 that copies as those before it must, a
step in one launch takes longer than three launches a layer (docs/performance.md)."""


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
    runtime: str | None = None,
    capabilities: Sequence[str] = (),
    use_plugin: bool | None = None,
    progress: ProgressFactory = silent,
    log: Callable[[str], None] = lambda text: None,
) -> BuildResult:
    """Build an engine: for this machine's GPU with TensorRT, for several GPUs with TensorRT for RTX.

    Args:
        bundle: what to build.
        output: the engine folder; appears only when everything is done, validated and complete.
        recipe: for which sizes, and how.
        precision: must be the bundle's type if given: it is fixed when a bundle is exported.
        device: index of the GPU that TensorRT builds for, and that validates.
        force: replace an engine that is there.
        timing_cache: file of kernel timings to start from and add to; default: one per TensorRT and GPU in
            the user's cache folder.
        use_timing_cache: False measures everything anew.
        validate: replay the recorded cases on the new engine, if this machine has a GPU for it; a difference
            means that there is no engine.
        check_estimate: refuse to begin if memory will not suffice.
        runtime: "tensorrt" or "tensorrt-rtx"; default: what is installed, TensorRT first.
        capabilities: TensorRT for RTX: the GPUs to build for, such as "8.6"; default: the recipe's.
        use_plugin: TensorRT for RTX: False builds from standard graphs, None does so if no plugin was built.
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
    target = choose_target(
        bundle, recipe, runtime=runtime, capabilities=capabilities, use_plugin=use_plugin, device=device,
        log=log,
    )  # fmt: skip
    estimate = estimate_memory(bundle, recipe, ahead_of_time=target.dialect.ahead_of_time)
    log(f"{target.about}; {estimate.text(target.gpu is not None)}")
    if check_estimate:
        check_memory(estimate, target.gpu)
    cache = _timing_cache(target, timing_cache, use_timing_cache)
    with (
        only_builder(output),
        output_folder(output, force=force, markers=(ENGINE_MANIFEST,)) as folder,
        bundle.opened.unchanged_by_name(*bundle.files),
    ):
        wanted = list(plans(bundle, recipe, standard=target.plugin is None))
        with _graphs(bundle, target, [plan.graph for plan in wanted], folder) as graphs:
            builds = [
                {"file": plan.file}
                | _build(
                    bundle, recipe, target, plan, graphs[plan.graph], folder, cache, device, progress, log
                )
                for plan in wanted
            ]
        _copy_files(bundle, folder)
        about = _facts(bundle, recipe, target, builds)
        write_engine_manifest(folder, about)
        report = None
        if validate and bundle.cases is not None and _runs_here(target, device):
            report = _validate(folder, device, progress)
            write_engine_manifest(folder, about | {"validated": validation_summary(report)})
    seconds = sum(float(b["seconds"]) for b in builds)
    return BuildResult(open_engine(output, verify=False), seconds, report, estimate)


@contextmanager
def _graphs(bundle: Bundle, target: Target, names: list[str], folder: Path) -> Iterator[dict[str, Path]]:
    """The files that the builder reads, by the bundle's names for the graphs: the bundle's own, or, of
    quantised weights for TensorRT for RTX, others that are there only while the block runs."""
    if bundle.quantised is None or not target.dialect.ahead_of_time:
        yield {name: bundle.graph_path(name) for name in names}
        return
    with TemporaryDirectory(dir=folder) as place:
        yield write_signed(bundle, names, Path(place))


def _build(
    bundle: Bundle,
    recipe: Recipe,
    target: Target,
    plan: PlanSource,
    onnx: Path,
    folder: Path,
    cache: Path | None,
    device: int,
    progress: ProgressFactory,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Build one plan in a process of its own; what that said of it."""
    is_step = plan.file == LAYOUTS["two"][1]
    step, left = _step(bundle, recipe, target) if is_step else (PRODUCTS, None)
    multiplies = not target.dialect.ahead_of_time and plugin_multiplies(bundle, recipe, step=is_step)
    if not is_step and not bundle.quantised:
        left_out = _not_the_plugin(bundle, recipe, target, multiplies)
        multiplies = multiplies and left_out is None
        if left_out is not None:
            log(f"{plan.file}: TensorRT multiplies, {left_out}")
    request = BuildRequest(
        onnx=onnx, plan=folder / plan.file,
        plugin=None if target.plugin is None else target.plugin[0], dtype=bundle.dtype,
        profiles=plan.profiles, workspace=recipe.workspace_mb << 20,
        optimization_level=recipe.optimization_level, timing_cache=cache, device=device,
        plugin_products=multiplies,
        step=step, spec=None if step == PRODUCTS else bundle.spec,
        matrices=None if step == PRODUCTS or bundle.quantisation is None else bundle.quantisation.formats,
        runtime=target.product.name, capabilities=() if target.gpu else target.capabilities,
    )  # fmt: skip
    log(f"building {plan.file}; this takes minutes for a large model")
    with parser_environment(target.dialect, target.version) as environment:
        done = run_worker(request, folder, progress, f"Building {plan.file}", environment)
    if left is not None:
        done["plugin_step"] = {"launches": 0, "left": left}
    if done["plugin_step"] is not None and "left" in done["plugin_step"]:
        log(f"{plan.file} is not one launch: {done['plugin_step']['left']}")
    return done


def _step(bundle: Bundle, recipe: Recipe, target: Target) -> tuple[str, str | None]:
    """What the builder is asked for, and why it is not asked for one launch, if somebody wants that.

    Raises:
        UsageError: the recipe insists on it.
    """
    if recipe.step == PRODUCTS:
        return PRODUCTS, None
    left = no_one_launch(bundle, recipe, ahead_of_time=target.dialect.ahead_of_time)
    if left is None and recipe.step == AUTO and min(target.capabilities) < FAST_STEP:
        left = "before compute capability 9.0 products are expected to be faster"
    if left is None:
        return recipe.step, None
    if recipe.step == ONE_LAUNCH:
        raise UsageError("a step in one launch is not possible", got=left, hint="--step auto takes what is")
    return PRODUCTS, left


def _not_the_plugin(bundle: Bundle, recipe: Recipe, target: Target, may: bool) -> str | None:
    """Why the plugin does not multiply where prompts are read, if the recipe asks for it; None: it does, or
    nobody asks. `auto` is silent about what cannot be helped.

    Args:
        bundle: of the model.
        recipe: says who multiplies.
        target: with which plugin.
        may: does it have such products?
    """
    if recipe.prefill_products == PLUGIN and not may:
        where = f"for {target.product.title}" if target.dialect.ahead_of_time else f"in {bundle.dtype}"
        return f"the plugin has no products {where}"
    if recipe.prefill_products != AUTO or not may or target.plugin is None:
        return None
    cublaslt.load_from_wheels()
    return cublaslt.not_found(target.plugin[1].library(KERNELS))


def _timing_cache(target: Target, given: Path | None, use: bool) -> Path | None:
    """The file to keep timings in; None: nothing is measured, or nothing shall be kept.

    Raises:
        UsageError: a file was named for a builder that measures nothing.
    """
    if target.gpu is None:
        if given is not None:
            raise UsageError(
                f"{target.product.title} measures nothing when it builds: it has no use for --timing-cache"
            )
        return None
    if not use:
        return None
    cache = given or timing_cache_path(target.version, target.gpu)
    cache.parent.mkdir(parents=True, exist_ok=True)
    return cache


def _runs_here(target: Target, device: int) -> bool:
    """Is the GPU that the engine is for, or one of them, in this machine, with a driver that runs it?"""
    if target.gpu is not None:
        return True
    try:
        facts = Cuda(device).facts()
    except RunnerError:  # no driver, no GPU, or no bindings of CUDA
        return False
    return facts.knows_cuda(target.dialect.cuda) and facts.compute_capability in target.capabilities


def timing_cache_path(version: str, facts: DeviceFacts) -> Path:
    """Where kernel timings are kept: they hold for one TensorRT and one kind of GPU."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", facts.name).strip("-")
    name = f"tensorrt-{version}-sm{facts.compute_capability}-{gpu}.cache"
    return cache_folder().parent / "timing" / name


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
        if name not in (WEIGHTS, MANIFEST, GENAI_CONFIG) and not name.endswith(".onnx"):
            shutil.copyfile(bundle.path / name, folder / name)


def _facts(bundle: Bundle, recipe: Recipe, target: Target, builds: list[dict[str, Any]]) -> dict[str, Any]:
    plugin = None if target.plugin is None else target.plugin[1]
    gpu = target.gpu
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
        "made_for": target.made_for().to_json(),
        "made_with": {
            "cuda_driver": gpu.driver if gpu else None,
            "cuda_runtime": gpu.runtime if gpu else None,
            "plugin_cuda": plugin.cuda if plugin else None,
            "plugin_tensorrt_headers": plugin.tensorrt if plugin else None,
            "strongly_typed": target.dialect.strongly_typed,
            "tf32": False,
            "recipe": {k: v for k, v in asdict(recipe).items() if k != "description"},
            "plans": builds,
        },
        "reference": None if bundle.cases is None else {"file": REFERENCE, "cases": bundle.cases},
        "validated": None,
    } | ({} if bundle.quantisation is None else {KEY: bundle.manifest[KEY]})


def _validate(folder: Path, device: int, progress: ProgressFactory) -> Report:
    engine = open_engine(folder)
    runner = TensorRTRunner(engine, device=device)
    report = validate(runner, engine.reference(), dtype=engine.dtype, progress=progress)
    report.raise_on_mismatch()
    return report
