"""`dijiang-export build-engine`: a bundle and a recipe become a validated TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, output_options


@click.command(
    "build-engine",
    epilog="Example: dijiang-export build-engine ./pythia.bundle -o ./pythia.engine --max-batch 4",
)
@click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
@click.option(
    "-o", "--output", "engine", type=click.Path(path_type=Path),
    help="The engine folder. Default: the bundle's name with .engine.",
)  # fmt: skip
@click.option(
    "--recipe", default="datacenter", show_default=True,
    help="What to build for: jetson-orin, jetson-thor, rtx, datacenter, or a .toml file.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Insist on this type; it is fixed when a bundle is exported. Default: the bundle's.",
)  # fmt: skip
@click.option("--max-batch", type=click.IntRange(min=1), help="Sequences at once.")
@click.option("--max-length", type=click.IntRange(min=1), help="Prompt tokens of each in one call.")
@click.option("--opt-batch", type=click.IntRange(min=1), help="Batch that the builder optimises for.")
@click.option("--opt-length", type=click.IntRange(min=1), help="Length that it optimises prefill for.")
@click.option("--workspace", "workspace_mb", type=click.IntRange(min=1), help="Scratch memory, in MiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0: builds fast; 5: searches long.")
@click.option(
    "--layout", type=click.Choice(["one", "two"]),
    help="one: a plan with two profiles, weights once in memory; two: a plan each for prefill and steps.",
)  # fmt: skip
@click.option(
    "--step-products", type=click.Choice(["plugin", "tensorrt"]),
    help="Who multiplies matrices in the step plan of layout two.",
)  # fmt: skip
@click.option(
    "--timing-cache", type=click.Path(dir_okay=False, path_type=Path),
    help="Kernel timings to start from and add to. Default: a file in the user's cache folder.",
)  # fmt: skip
@click.option("--no-timing-cache", is_flag=True, help="Measure every kernel anew.")
@click.option("--device", type=click.IntRange(min=0), default=0, show_default=True, help="Which GPU.")
@click.option("--no-validate", is_flag=True, help="Do not replay the recorded cases on the new engine.")
@click.option("--ignore-memory", is_flag=True, help="Begin even if memory looks too small.")
@click.option("--force", is_flag=True, help="Replace an engine of that name.")
@click.option(
    "--print-trtexec", is_flag=True,
    help="Print what trtexec would have to be told to build the same plans, and build nothing. Needs neither "
    "TensorRT nor a GPU.",
)  # fmt: skip
@click.option(
    "--tensorrt", metavar="VERSION",
    help="With --print-trtexec: which version's trtexec, such as 8.6, 10.3 or 11.1. Default: that of the "
    "plugin that was built here, else 10.3.",
)  # fmt: skip
@output_options
def build_engine(output: Output, bundle: Path, engine: Path | None, **given: Any) -> None:
    """Build a TensorRT engine from BUNDLE for this machine's GPU, and validate it there.

    Needs TensorRT, the plugin (`build-plugin`) and an NVIDIA GPU. An engine runs on the kind of GPU and the
    TensorRT version that it was built with. Nothing is written unless everything worked: the engine's results
    are compared with those recorded from PyTorch first.
    """
    from dijiang_engines.building.build import build_engine as build
    from dijiang_engines.building.recipes import load_recipe
    from dijiang_engines.errors import UsageError
    from dijiang_engines.formats.bundle import open_bundle

    if given["tensorrt"] is not None and not given["print_trtexec"]:
        raise UsageError(
            "--tensorrt goes with --print-trtexec", hint="engines are built with what is installed"
        )
    if given["no_timing_cache"] and given["timing_cache"] is not None:
        raise UsageError("--timing-cache and --no-timing-cache exclude each other")
    changes = (
        "max_batch", "max_length", "opt_batch", "opt_length", "workspace_mb", "optimization_level", "layout",
        "step_products",
    )  # fmt: skip
    recipe = load_recipe(given["recipe"]).with_changes(**{name: given[name] for name in changes})
    opened = open_bundle(bundle)
    stem = str(bundle).removesuffix(".bundle")
    if given["print_trtexec"]:
        _print_trtexec(output, opened, recipe, engine or Path(stem + ".plans"), given)
        return
    target = engine if engine is not None else Path(stem + ".engine")
    result = build(
        opened, target, recipe,
        precision=given["precision"], device=given["device"], force=given["force"],
        timing_cache=given["timing_cache"], use_timing_cache=not given["no_timing_cache"],
        validate=not given["no_validate"], check_estimate=not given["ignore_memory"],
        progress=output.progress, log=output.log,
    )  # fmt: skip
    made = result.engine

    def describe() -> str:
        size = sum(made.files[name].bytes for name in made.plans)
        lines = [
            f"{target}: {made.name}, {made.dtype}, {size / 1e6:.1f} MB of plans, "
            f"built in {result.seconds:.0f} s",
            f"for {made.made_for.gpu} and TensorRT {made.made_for.tensorrt}; up to {made.profiles.max_batch} "
            f"sequences, {made.profiles.max_length} prompt tokens a call",
        ]
        checked = made.manifest["validated"]
        lines.append(
            "not validated"
            if checked is None
            else f"validated: {checked['checks']} checks, largest logit error {checked['logits_error']:.1e} "
            "standard deviations"
        )
        lines.append(f"next: dijiang-export generate {target} --prompt TEXT")
        return "\n".join(lines)

    output.print_result(
        {
            "engine": target,
            "seconds": result.seconds,
            "estimate": {"device_bytes": result.estimate.device, "host_bytes": result.estimate.host},
            "manifest": made.manifest,
        },
        describe,
    )


def _print_trtexec(output: Output, bundle: Any, recipe: Any, folder: Path, given: dict[str, Any]) -> None:
    from dijiang_engines.building.trtexec import trtexec_commands

    made = trtexec_commands(
        bundle, folder, recipe,
        version=given["tensorrt"], precision=given["precision"], device=given["device"],
        timing_cache=given["timing_cache"], use_timing_cache=not given["no_timing_cache"],
    )  # fmt: skip
    for note in made.notes:
        output.log(f"note: {note}")
    output.print_result(made, made.script)
