"""What an engine is built for: the runtime, the GPUs, and the plugin or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.building.recipes import Recipe
from dijiang_engines.errors import PluginError, RunnerError, UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import MadeFor
from dijiang_engines.nvidia.cuda import Cuda, DeviceFacts
from dijiang_engines.nvidia.tensorrt_library import (
    ENVIRONMENT,
    TensorRT,
    find_plugin,
    installed_runtimes,
    tensorrt_module,
    tensorrt_version,
)
from dijiang_engines.nvidia.tensorrt_versions import (
    RUNTIMES,
    TENSORRT,
    Dialect,
    Runtime,
    capabilities_text,
    dialect_of,
    parse_capability,
)
from dijiang_engines.plugin.cache import BuiltPlugin, built_plugins, runs_on, tensorrt_name

Plugin = tuple[Path, BuiltPlugin]
_PLUGIN_GRAPH = "prefill_trt"
"""In a bundle's list of graphs; absent where the plugin has no products for its types."""


@dataclass(frozen=True)
class Target:
    """What was decided, before anything is built."""

    product: Runtime
    version: str
    """Of the runtime's library."""
    dialect: Dialect
    gpu: DeviceFacts | None
    """The GPU that the plans are for; None: they are for any of `capabilities`."""
    capabilities: tuple[int, ...]
    """As 10 * major + minor; one if there is a GPU."""
    plugin: Plugin | None
    """The library and the build that it belongs to; None: standard graphs."""

    @property
    def title(self) -> str:
        """The runtime, for people."""
        return f"{self.product.title} {self.version}"

    @property
    def about(self) -> str:
        """The runtime and what the plans will run on, for people."""
        where = self.gpu.name if self.gpu else f"compute capability {capabilities_text(self.capabilities)}"
        return f"{self.title}, {where}" + ("" if self.plugin else ", without the plugin")

    def made_for(self) -> MadeFor:
        """As the engine's manifest says it."""
        built = None if self.plugin is None else self.plugin[1]
        return MadeFor(
            self.product.name,
            self.version,
            self.gpu.name if self.gpu else None,
            self.capabilities,
            built.sources if built else None,
            built.version if built else None,
        )


def choose_runtime(wanted: str | None) -> str:
    """A key of RUNTIMES: what was asked for, else the first that is installed, else TensorRT.

    Raises:
        UsageError: there is no such runtime.
    """
    if wanted is not None and wanted not in RUNTIMES:
        raise UsageError(f"there is no runtime {wanted!r}", expected=" or ".join(RUNTIMES))
    return wanted or next(iter(installed_runtimes()), TENSORRT)


def choose_target(
    bundle: Bundle,
    recipe: Recipe,
    *,
    runtime: str | None = None,
    capabilities: Sequence[str] = (),
    use_plugin: bool | None = None,
    device: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> Target:
    """Look at what is installed and what was asked for.

    Args:
        bundle: what is to be built.
        recipe: how.
        runtime: a key of RUNTIMES; None: `choose_runtime`.
        capabilities: such as "8.6"; none: the recipe's, as far as runtime and plugin have them.
        use_plugin: False: build from standard graphs. None: where that is possible, only if no plugin was
            built.
        device: index of the GPU, where the builder needs one.
        log: takes lines for people.

    Raises:
        UsageError: bundle, recipe, runtime and capabilities do not fit each other.
        RunnerError: the runtime or the GPU is missing.
        PluginError: the plugin is missing, or not for these GPUs.
    """
    name = choose_runtime(runtime)
    product = RUNTIMES[name]
    if name == TENSORRT:
        if capabilities or use_plugin is False:
            option = "--compute-capability" if capabilities else "--no-plugin"
            raise UsageError(
                f"{option} goes with --runtime tensorrt-rtx",
                hint="TensorRT builds for the GPU that is here, with the plugin",
            )
        return _on_a_gpu(bundle, recipe, product, device)
    version = tensorrt_version(tensorrt_module(name), name)
    dialect = dialect_of(version, name)
    _check_dtype(bundle, f"{product.title} {version}", dialect)
    named = tuple(dict.fromkeys(parse_capability(text, dialect) for text in capabilities))
    wanted = named or recipe_capabilities(recipe, dialect)
    plugin = None
    major = dialect.plugin_major(version)
    if use_plugin is None:
        use_plugin = _any_build(major) and _PLUGIN_GRAPH in bundle.graphs
        if not use_plugin:
            reason = f"no plugin for {product.title} was built"
            if _PLUGIN_GRAPH not in bundle.graphs:
                reason = f"{bundle.weight_format} weights with {bundle.dtype} activations"
            log(f"{reason}: standard graphs")
    if use_plugin:
        plugin, wanted = _held(major, wanted, exactly=bool(named), log=log)
    return Target(product, version, dialect, None, tuple(sorted(wanted)), plugin)


def _on_a_gpu(bundle: Bundle, recipe: Recipe, product: Runtime, device: int) -> Target:
    facts = Cuda(device).facts()
    tensorrt = TensorRT(facts.compute_capability)
    _check_dtype(bundle, tensorrt.title, tensorrt.dialect)
    if recipe.architectures and facts.compute_capability not in recipe.architectures:
        raise UsageError(
            f"the recipe {recipe.name} is for other GPUs",
            got=f"{facts.name}, sm_{facts.compute_capability}",
            expected=", ".join(f"sm_{number}" for number in recipe.architectures),
            hint="choose another with --recipe; engines are built on the GPU that runs them",
        )
    assert tensorrt.plugin_library is not None and tensorrt.plugin is not None
    return Target(
        product, tensorrt.version, tensorrt.dialect, facts, (facts.compute_capability,),
        (tensorrt.plugin_library, tensorrt.plugin),
    )  # fmt: skip


def _check_dtype(bundle: Bundle, title: str, dialect: Dialect) -> None:
    if bundle.dtype not in dialect.dtypes:
        raise RunnerError(
            f"{title} has no {bundle.dtype}",
            expected=" or ".join(dialect.dtypes),
            hint="export the checkpoint again with `--dtype float16`",
        )


def recipe_capabilities(recipe: Recipe, dialect: Dialect) -> tuple[int, ...]:
    """A recipe's GPUs, as far as the runtime has them; all of the runtime's if it names none.

    Raises:
        UsageError: it has none of them.
    """
    every = dialect.capabilities or ()
    found = tuple(number for number in recipe.architectures or every if number in every)
    if not found:
        raise UsageError(
            f"the recipe {recipe.name} is for other GPUs than {RUNTIMES[dialect.runtime].title} is",
            got=", ".join(f"sm_{number}" for number in recipe.architectures),
            expected=", ".join(f"sm_{number}" for number in every),
            hint="--recipe rtx or rtx-portable, or another --runtime",
        )
    return found


def _any_build(major: int) -> bool:
    """Was a plugin for this TensorRT and this kind of processor built here, whatever state it is in?"""
    return bool(os.environ.get(ENVIRONMENT)) or any(
        tensorrt_name(major) in b.libraries and not b.is_foreign for b in built_plugins()
    )


def _held(
    major: int, wanted: tuple[int, ...], *, exactly: bool, log: Callable[[str], None]
) -> tuple[Plugin, tuple[int, ...]]:
    """The plugin, and those of `wanted` that it has code for: all, if `exactly`."""
    try:
        return find_plugin(major, wanted), wanted
    except PluginError as error:
        if exactly:
            error.hint = f"{error.hint or 'dijiang-export build-plugin'}; or --no-plugin: standard graphs"
            raise
    plugin = find_plugin(major, ())
    held = tuple(number for number in wanted if runs_on(plugin[1].architectures, number))
    if not held:
        raise PluginError(
            "the plugin was built for none of the recipe's GPUs",
            got=", ".join(plugin[1].architectures),
            expected=", ".join(f"sm_{number}" for number in wanted),
            hint="dijiang-export build-plugin"
            + "".join(f" --architecture {number}" for number in wanted)
            + "; or --no-plugin: standard graphs",
        )
    log(
        f"the plugin has code for compute capability {capabilities_text(held)} of the recipe's "
        f"{capabilities_text(wanted)}: the engine is for those alone"
    )
    return plugin, held
