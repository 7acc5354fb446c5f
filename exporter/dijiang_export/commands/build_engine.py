"""`dijiang-export build-engine`: a bundle and a recipe become a validated TensorRT engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from dijiang_export.commands.arguments import COUNT, FILE, PATH, BundleOrDefault, Dtype, one_of, takes
from dijiang_export.commands.common import Output

if TYPE_CHECKING:
    from dijiang_engines.building.build import BuildResult
    from dijiang_engines.building.recipes import Recipe
    from dijiang_engines.building.trtexec import TrtexecCommands

Layout = Literal["one", "two"]
RuntimeName = Literal["tensorrt", "tensorrt-rtx"]
Multiplier = Literal["plugin", "tensorrt"]
PrefillMultiplier = Literal["plugin", "tensorrt", "auto"]
Step = Literal["products", "one-launch", "auto"]


@dataclass(frozen=True)
class RecipeArguments:
    """Which recipe, and what it is to be changed to; None leaves the recipe's value."""

    recipe: Annotated[
        str | None,
        click.option(
            "--recipe",
            help="What to build for: jetson-orin, jetson-thor, rtx, rtx-portable, datacenter, or a .toml "
            "file. [default: datacenter; rtx for TensorRT for RTX]",
        ),
    ]  # fmt: skip
    precision: Annotated[
        Dtype | None,
        click.option(
            "--precision", type=one_of(Dtype),
            help="Insist on this type; it is fixed when a bundle is exported. Default: the bundle's.",
        ),
    ]  # fmt: skip
    max_batch: Annotated[int | None, click.option("--max-batch", type=COUNT, help="Sequences at once.")]
    max_length: Annotated[
        int | None,
        click.option("--max-length", type=COUNT, help="Prompt tokens of each in one call."),
    ]
    opt_batch: Annotated[
        int | None,
        click.option("--opt-batch", type=COUNT, help="Batch that the builder optimises for."),
    ]
    opt_length: Annotated[
        int | None,
        click.option("--opt-length", type=COUNT, help="Length that it optimises prefill for."),
    ]
    workspace_mb: Annotated[
        int | None,
        click.option("--workspace", "workspace_mb", type=COUNT, help="Scratch memory, in MiB."),
    ]
    optimization_level: Annotated[
        int | None,
        click.option(
            "--optimization-level", type=click.IntRange(0, 5), help="0: builds fast; 5: searches long."
        ),
    ]
    layout: Annotated[
        Layout | None,
        click.option(
            "--layout", type=one_of(Layout),
            help="one: a plan with two profiles, weights once in memory; two: a plan each for prefill and "
            "steps.",
        ),
    ]  # fmt: skip
    step_products: Annotated[
        Multiplier | None,
        click.option(
            "--step-products", type=one_of(Multiplier),
            help="Who multiplies matrices in the step plan of layout two.",
        ),
    ]  # fmt: skip
    prefill_products: Annotated[
        PrefillMultiplier | None,
        click.option(
            "--prefill-products", type=one_of(PrefillMultiplier),
            help="Likewise in the plan that reads prompts, and in that of layout one; auto: the plugin, "
            "where it can and finds cuBLASLt.",
        ),
    ]  # fmt: skip
    step: Annotated[
        Step | None,
        click.option(
            "--step", type=one_of(Step),
            help="A step of layout two: layer by layer, or all of it in one launch of the plugin's; auto: "
            "that where model and GPU allow it.",
        ),
    ]  # fmt: skip

    def read(self, runtime: str) -> Recipe:
        """The recipe with these changes, for a runtime; raises as `load_recipe`."""
        from dijiang_engines.building.recipes import DEFAULTS, load_recipe

        return load_recipe(self.recipe or DEFAULTS[runtime]).with_changes(
            max_batch=self.max_batch,
            max_length=self.max_length,
            opt_batch=self.opt_batch,
            opt_length=self.opt_length,
            workspace_mb=self.workspace_mb,
            optimization_level=self.optimization_level,
            layout=self.layout,
            step_products=self.step_products,
            prefill_products=self.prefill_products,
            step=self.step,
        )


@dataclass(frozen=True)
class BuildEngineArguments:
    """What `build-engine` is given."""

    bundle: BundleOrDefault
    engine: Annotated[
        Path | None,
        click.option(
            "-o", "--output", "engine", type=PATH,
            help="The engine folder. Default: the bundle's name with .engine.",
        ),
    ]  # fmt: skip
    runtime: Annotated[
        RuntimeName | None,
        click.option(
            "--runtime", type=one_of(RuntimeName),
            help="Who builds and runs the engine: TensorRT on this machine's GPU, or TensorRT for RTX, which "
            "builds without one. [default: what is installed, TensorRT first]",
        ),
    ]  # fmt: skip
    capabilities: Annotated[
        tuple[str, ...],
        click.option(
            "--compute-capability", "capabilities", multiple=True, metavar="X.Y",
            help="TensorRT for RTX: a GPU to build for, such as 8.6; may be repeated. [default: those of the "
            "recipe that the plugin holds]",
        ),
    ]  # fmt: skip
    no_plugin: Annotated[
        bool,
        click.option(
            "--no-plugin", is_flag=True,
            help="TensorRT for RTX: build from the standard graphs. It does so too if no plugin was built.",
        ),
    ]  # fmt: skip
    recipe: RecipeArguments
    timing_cache: Annotated[
        Path | None,
        click.option(
            "--timing-cache", type=FILE,
            help="TensorRT: kernel timings to start from and add to. Default: a file in the user's cache "
            "folder.",
        ),
    ]  # fmt: skip
    no_timing_cache: Annotated[
        bool, click.option("--no-timing-cache", is_flag=True, help="Measure every kernel anew.")
    ]
    device: Annotated[
        int,
        click.option(
            "--device", type=click.IntRange(min=0), default=0, show_default=True, help="Which GPU."
        ),
    ]  # fmt: skip
    no_validate: Annotated[
        bool,
        click.option(
            "--no-validate", is_flag=True, help="Do not replay the recorded cases on the new engine."
        ),
    ]
    ignore_memory: Annotated[
        bool, click.option("--ignore-memory", is_flag=True, help="Begin even if memory looks too small.")
    ]
    force: Annotated[bool, click.option("--force", is_flag=True, help="Replace an engine of that name.")]
    print_trtexec: Annotated[
        bool,
        click.option(
            "--print-trtexec", is_flag=True,
            help="Print what trtexec, or tensorrt_rtx with --runtime tensorrt-rtx, would have to be told to "
            "build the same plans, and build nothing. Needs neither TensorRT nor a GPU.",
        ),
    ]  # fmt: skip
    tensorrt: Annotated[
        str | None,
        click.option(
            "--tensorrt", metavar="VERSION",
            help="With --print-trtexec: which version's trtexec, such as 8.6, 10.3 or 11.1. Default: that of "
            "the plugin that was built here, else 10.3; for RTX 1.7.",
        ),
    ]  # fmt: skip

    def check(self) -> None:
        """Raise UsageError where options contradict each other."""
        from dijiang_engines.errors import UsageError

        if self.tensorrt is not None and not self.print_trtexec:
            raise UsageError(
                "--tensorrt goes with --print-trtexec", hint="engines are built with what is installed"
            )
        if self.no_timing_cache and self.timing_cache is not None:
            raise UsageError("--timing-cache and --no-timing-cache exclude each other")

    def target(self, suffix: str) -> Path:
        """The folder that was named, or the bundle's name with another suffix."""
        return self.engine or Path(str(self.bundle).removesuffix(".bundle") + suffix)


@click.command(
    "build-engine",
    epilog="Example: dijiang-export build-engine ./pythia.bundle -o ./pythia.engine --max-batch 4",
)
@takes(BuildEngineArguments)
def build_engine(output: Output, given: BuildEngineArguments) -> None:
    """Build a TensorRT engine from BUNDLE, and validate it on this machine's GPU.

    Needs TensorRT, the plugin (`build-plugin`) and an NVIDIA GPU. An engine runs on the kind of GPU and the
    TensorRT version that it was built with. Nothing is written unless everything worked: the engine's results
    are compared with those recorded from PyTorch first.

    With TensorRT for RTX neither a GPU nor the plugin is needed, and an engine is for several kinds of GPU.
    What was built without one of them is validated on the device, with `validate`.
    """
    given.check()
    if given.print_trtexec:
        commands = _commands(given)
        for note in commands.notes:
            output.log(f"note: {note}")
        output.print_result(commands, commands.script)
        return
    result = _build(given, output)
    target = given.target(".engine")
    output.print_result(
        {
            "engine": target,
            "seconds": result.seconds,
            "estimate": {"device_bytes": result.estimate.device, "host_bytes": result.estimate.host},
            "manifest": result.engine.manifest,
        },
        lambda: _describe(result, target),
    )


def _build(given: BuildEngineArguments, output: Output) -> BuildResult:
    from dijiang_engines.building.build import build_engine as build
    from dijiang_engines.building.target import choose_runtime
    from dijiang_engines.formats.bundle import open_bundle

    runtime = choose_runtime(given.runtime)
    recipe = given.recipe.read(runtime)
    return build(
        open_bundle(given.bundle),
        given.target(".engine"),
        recipe,
        precision=given.recipe.precision,
        device=given.device,
        force=given.force,
        timing_cache=given.timing_cache,
        use_timing_cache=not given.no_timing_cache,
        validate=not given.no_validate,
        check_estimate=not given.ignore_memory,
        runtime=runtime,
        capabilities=given.capabilities,
        use_plugin=False if given.no_plugin else None,
        progress=output.progress,
        log=output.log,
    )


def _commands(given: BuildEngineArguments) -> TrtexecCommands:
    from dijiang_engines.building.trtexec import rtx_commands, trtexec_commands
    from dijiang_engines.formats.bundle import open_bundle

    recipe = given.recipe.read(given.runtime or "tensorrt")
    if given.runtime == "tensorrt-rtx":
        return rtx_commands(
            open_bundle(given.bundle),
            given.target(".plans"),
            recipe,
            version=given.tensorrt,
            precision=given.recipe.precision,
            capabilities=given.capabilities,
        )
    return trtexec_commands(
        open_bundle(given.bundle),
        given.target(".plans"),
        recipe,
        version=given.tensorrt,
        precision=given.recipe.precision,
        device=given.device,
        timing_cache=given.timing_cache,
        use_timing_cache=not given.no_timing_cache,
    )


def _describe(result: BuildResult, target: Path) -> str:
    from dijiang_engines.nvidia.tensorrt_versions import RUNTIMES, capabilities_text

    made, where = result.engine, result.engine.made_for
    size = sum(made.files[name].bytes for name in made.plans)
    gpu = where.gpu or f"compute capability {capabilities_text(where.compute_capabilities)}"
    plugin = "" if where.graphs == "plugin" else ", without the plugin"
    checked = made.manifest["validated"]
    lines = [
        f"{target}: {made.name}, {made.dtype}, {size / 1e6:.1f} MB of plans, built in {result.seconds:.0f} s",
        f"for {gpu} and {RUNTIMES[where.runtime].title} {where.tensorrt}{plugin}; up to "
        f"{made.profiles.max_batch} sequences, {made.profiles.max_length} prompt tokens a call",
        f"validated: {checked['checks']} checks, largest logit error {checked['logits_error']:.1e} "
        "standard deviations"
        if checked is not None
        else "not validated"
        if where.gpu
        else "built, not validated: run `validate` on the device",
    ]
    on_the_device = where.gpu is None and checked is None
    command = f"validate {target}" if on_the_device else f"generate {target} --prompt TEXT"
    lines.append(f"next{', on the device' if on_the_device else ''}: dijiang-export {command}")
    return "\n".join(lines)
