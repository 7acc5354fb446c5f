"""What NVIDIA's trtexec, or tensorrt_rtx, has to be told to build the plans that `build.build_engine` builds.

They make plans, not engine folders: no manifest, no reference, nothing validated. trtexec's flags are those
that samples/common/sampleOptions.cpp of NVIDIA/TensorRT parses, at v8.6.1, v10.3.0, v10.13.3, v10.16 and
v11.1; those of tensorrt_rtx, whose source is not public, what the documentation of TensorRT for RTX 1.7 has.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.building.plans import check_fit, plans
from dijiang_engines.building.recipes import Recipe
from dijiang_engines.building.target import recipe_capabilities
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.nvidia.tensorrt_library import ENVIRONMENT
from dijiang_engines.nvidia.tensorrt_versions import (
    RUNTIMES,
    TENSORRT,
    TENSORRT_RTX,
    Dialect,
    dialect_of,
    parse_capability,
)
from dijiang_engines.plugin.cache import BuiltPlugin, built_plugins, read_manifest, tensorrt_name

DEFAULT_VERSION = "10.3"
RTX_TOOL, RTX_VERSION = "tensorrt_rtx", "1.7"
_SEVERAL_PROFILES = (10, 0)
"""From here on trtexec has --profile. v8.6.1 has one profile for each plan."""
_ALWAYS_STRONGLY_TYPED = (11, 0)
"""From here on --stronglyTyped is the default, and as a flag deprecated."""
_TACTIC_SOURCES = ("CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
"""All that trtexec v8.6.1 knows. It changes TensorRT's choice one by one, so each has to be named."""
_PREVIEW_FEATURES = (
    "PROFILE_SHARING_0806", "FASTER_DYNAMIC_SHAPES_0805", "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805",
)  # fmt: skip


@dataclass(frozen=True)
class TrtexecCommands:
    """What to run, in order."""

    tensorrt: str
    """Version of TensorRT that the flags are for."""
    commands: list[list[str]]
    """`mkdir`, then one trtexec for each plan."""
    notes: list[str]
    """What differs from `build-engine`, or has to be put in by hand."""

    def script(self) -> str:
        """The commands for a shell, one flag a line."""
        lines = []
        for command in self.commands:
            first, *rest = [shlex.quote(word) for word in command]
            if first in ("trtexec", RTX_TOOL):
                lines.append(" \\\n  ".join([first, *rest]))
            else:
                lines.append(" ".join([first, *rest]))
        return "\n".join(lines)


def trtexec_commands(
    bundle: Bundle,
    folder: Path,
    recipe: Recipe,
    *,
    version: str | None = None,
    precision: str | None = None,
    device: int = 0,
    timing_cache: Path | None = None,
    use_timing_cache: bool = True,
) -> TrtexecCommands:
    """The commands for a bundle and a recipe. Needs no TensorRT and no GPU.

    Args:
        bundle: what to build.
        folder: for the plans.
        recipe: for which sizes, and how.
        version: of TensorRT, such as "10.3"; default: of the newest plugin that was built here, else
            `DEFAULT_VERSION`.
        precision: must be the bundle's type if given.
        device: index of the GPU.
        timing_cache: file of kernel timings; default: trtexec keeps none.
        use_timing_cache: False measures everything anew.

    Raises:
        UsageError: the bundle does not fit the recipe, or trtexec of that version cannot build it.
        RunnerError: that version of TensorRT is not supported, or cannot run the bundle's type.
        PluginError: DIJIANG_PLUGIN names a folder without a build of the plugin.
    """
    check_fit(bundle, recipe, precision)
    numbers, dialect = _version(version or _built_version() or DEFAULT_VERSION)
    name = ".".join(map(str, numbers))
    _check_weights(bundle)
    _check_possible(bundle, recipe, dialect, numbers, name)
    library, notes = _plugin(numbers[0])
    options = [
        f"--dynamicPlugins={library}",
        *(["--stronglyTyped"] if dialect.strongly_typed and numbers < _ALWAYS_STRONGLY_TYPED else []),
        "--noTF32",
        f"--memPoolSize=workspace:{recipe.workspace_mb}",  # MiB without a suffix; 8.6 knows none
        f"--builderOptimizationLevel={recipe.optimization_level}",
        *_search_flags(dialect),
    ]
    if not use_timing_cache:
        options.append("--noBuilderCache")
    elif timing_cache is not None:
        options.append(f"--timingCacheFile={timing_cache}")
    if device:
        options.append(f"--device={device}")
    commands = [["mkdir", "-p", str(folder)]]
    for file, graph, profiles in plans(bundle, recipe):
        command = ["trtexec", f"--onnx={bundle.graph_path(graph)}", f"--saveEngine={folder / file}"]
        for index, shapes in enumerate(profiles):
            if len(profiles) > 1:
                command.append(f"--profile={index}")  # the shapes must stand right behind it
            command += _shape_flags(shapes)
        commands.append([*command, *options, "--skipInference"])
    notes.append(
        "trtexec makes plans without engine.json: `generate` and `validate` need `build-engine`'s folder"
    )
    if recipe.max_batch == 1:
        notes.append("trtexec keeps the batch dynamic although one size is allowed; `build-engine` fixes it")
    return TrtexecCommands(name, commands, notes)


def rtx_commands(
    bundle: Bundle,
    folder: Path,
    recipe: Recipe,
    *,
    version: str | None = None,
    precision: str | None = None,
    capabilities: Sequence[str] = (),
) -> TrtexecCommands:
    """The commands for tensorrt_rtx, the command line tool of TensorRT for RTX: standard graphs, two plans.

    Args:
        bundle: what to build.
        folder: for the plans.
        recipe: for which sizes.
        version: of TensorRT for RTX; default: `RTX_VERSION`.
        precision: must be the bundle's type if given.
        capabilities: such as "8.6"; default: those of the recipe that TensorRT for RTX has.

    Raises:
        UsageError: the bundle does not fit the recipe, or a capability or the layout is not possible.
        RunnerError: that version is not supported.
    """
    check_fit(bundle, recipe, precision)
    _check_weights(bundle)
    name = version or RTX_VERSION
    _, dialect = _version(name, TENSORRT_RTX)
    if recipe.layout == "one":
        raise UsageError(
            f"{RTX_TOOL} makes plans with one profile",
            got="layout one, which has two",
            hint="--layout two; `build-engine` itself can do both",
        )
    named = [parse_capability(text, dialect) for text in capabilities]
    numbers = sorted(set(named or recipe_capabilities(recipe, dialect)))
    commands = [["mkdir", "-p", str(folder)]]
    for file, graph, profiles in plans(bundle, recipe, standard=True):
        command = [RTX_TOOL, f"--onnx={bundle.graph_path(graph)}", f"--saveEngine={folder / file}"]
        command += _shape_flags(profiles[0])
        commands.append([*command, f"--computeCapabilities={','.join(map(str, numbers))}", "--skipInference"])
    notes = [
        f"{RTX_TOOL} makes plans without engine.json: `generate` and `validate` need `build-engine`'s folder",
        "it comes with the SDK of TensorRT for RTX, not with the Python packages",
        "standard graphs: how it loads a plugin is not documented",
    ]
    if bundle.dtype == "float32":
        notes.append("TensorFloat-32 stays on, which `build-engine` turns off")
    return TrtexecCommands(name, commands, notes)


def _version(text: str, runtime: str = TENSORRT) -> tuple[tuple[int, ...], Dialect]:
    numbers = tuple(int(part) for part in re.findall(r"\d+", text))
    if not re.fullmatch(r"\d+\.\d+(\.\d+)*", text):
        example = DEFAULT_VERSION if runtime == TENSORRT else RTX_VERSION
        raise UsageError(
            f"this is not a version of {RUNTIMES[runtime].title}",
            got=text,
            expected=f"two numbers or more, such as {example}",
        )
    return numbers, dialect_of(text, runtime)


def _built_version() -> str | None:
    """Of the headers that the newest usable plugin was compiled with."""
    for built in _builds():
        if built.tensorrt is not None and built.is_current():
            return built.tensorrt
    return None


def _builds() -> list[BuiltPlugin]:
    """The builds of the plugin that `build-engine` would look at."""
    folder = os.environ.get(ENVIRONMENT)
    return [read_manifest(Path(folder))] if folder else built_plugins()


def _check_weights(bundle: Bundle) -> None:
    """Quantised ones are packed, or made signed, by `build-engine`, between parsing and building."""
    if bundle.weight_format != "float":
        raise UsageError(
            "NVIDIA's command line tools do not build engines of quantised weights",
            got=f"{bundle.weight_format} weights",
            hint="`build-engine` does, without --print-trtexec",
        )


def _check_possible(
    bundle: Bundle, recipe: Recipe, dialect: Dialect, numbers: tuple[int, ...], name: str
) -> None:
    if bundle.dtype not in dialect.dtypes:
        raise RunnerError(
            f"TensorRT {name} has no {bundle.dtype}",
            expected=" or ".join(dialect.dtypes),
            hint="export the checkpoint again with `--dtype float16`",
        )
    if not dialect.strongly_typed and bundle.dtype == "float16":
        raise UsageError(
            f"trtexec of TensorRT {name} cannot be told the types of a float16 bundle",
            hint="normalisations must stay float32 layer by layer, which `build-engine` sees to: use that, "
            "or export with `--dtype float32`",
        )
    if recipe.layout == "one" and numbers < _SEVERAL_PROFILES:
        raise UsageError(
            f"trtexec of TensorRT {name} makes plans with one profile",
            got="layout one, which has two",
            hint="--layout two; `build-engine` itself can do both",
        )


def _plugin(major: int) -> tuple[str, list[str]]:
    """The plugin's library, and a note if there is none yet."""
    name = tensorrt_name(major)
    for built in _builds():
        if built.is_current() and name in built.libraries:
            return str(built.folder / name), []
    return f"./{name}", [
        f"the plugin for TensorRT {major} is not built here: {name} stands for where it will be; make it "
        "with `dijiang-export build-plugin --output .`"
    ]


def _search_flags(dialect: Dialect) -> list[str]:
    """Tactic sources and preview features, where this project does not leave them to TensorRT."""
    flags = []
    if dialect.tactic_sources is not None:
        signed = [("+" if name in dialect.tactic_sources else "-") + name for name in _TACTIC_SOURCES]
        flags.append("--tacticSources=" + ",".join(signed))
    if dialect.preview_features is not None:
        signed = [
            ("+" if name in dialect.preview_features else "-") + _camel(name) for name in _PREVIEW_FEATURES
        ]
        flags.append("--preview=" + ",".join(signed))
    return flags


def _camel(name: str) -> str:
    """As trtexec writes the names of preview features: PROFILE_SHARING_0806 is profileSharing0806."""
    first, *rest = name.lower().split("_")
    return first + "".join(part.capitalize() for part in rest)


def _shape_flags(shapes: dict[str, Any]) -> list[str]:
    """--minShapes, --optShapes and --maxShapes of one profile."""
    return [
        f"--{which}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, s[index]))}" for name, s in shapes.items())
        for index, which in enumerate(("min", "opt", "max"))
    ]
