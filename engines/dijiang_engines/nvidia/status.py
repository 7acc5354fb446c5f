"""What `doctor` says about NVIDIA's runtimes on this machine, and which engines here fit it. Loads none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.errors import DijiangError, PluginError, RunnerError
from dijiang_engines.formats.engine import EngineFolder, open_engine
from dijiang_engines.formats.file_table import ENGINE_MANIFEST
from dijiang_engines.machine import Machine, package_version
from dijiang_engines.nvidia.tensorrt_library import check_wheels, find_plugin
from dijiang_engines.nvidia.tensorrt_versions import (
    RUNTIMES,
    TENSORRT,
    TENSORRT_RTX,
    Dialect,
    Runtime,
    capabilities_of,
    capabilities_text,
    capability_text,
    dialect_of,
)
from dijiang_engines.plugin.cache import source_hash

LEAST_DRIVER = {13: 580}
"""NVIDIA's driver for Linux by the major version of CUDA that it first knew (CUDA's release notes)."""
MOST_ENGINES = 50
"""Folders beside each other that are looked into."""


@dataclass(frozen=True)
class RuntimeStatus:
    """One of RUNTIMES."""

    name: str
    """As for `build-engine --runtime`."""
    title: str
    version: str | None
    """None: not installed."""
    runs: bool
    """Installed, and for the GPU and the driver that are here."""
    builds: bool
    """Engines can be built here."""
    detail: str
    hint: str | None
    """What to do if it is wanted; None if nothing is to be done, or cannot be."""
    broken: bool = False
    """It is installed, and wrong whatever the GPU."""


@dataclass(frozen=True)
class EngineStatus:
    """An engine folder, by its manifest."""

    folder: str
    made_for: str
    fits: bool
    detail: str
    """What differs, or that nothing does."""
    hint: str | None


def runtime_status(machine: Machine) -> tuple[RuntimeStatus, ...]:
    """Look at packages, GPU and driver.

    Args:
        machine: whose GPUs and driver to think of.
    """
    return tuple(_runtime(runtime, machine) for runtime in RUNTIMES.values())


def _runtime(runtime: Runtime, machine: Machine) -> RuntimeStatus:
    name, title = runtime.name, runtime.title
    version = _installed(runtime)
    gpus = _capabilities(machine)
    if version is None:
        wanted = _wanted(name, machine, gpus)
        return RuntimeStatus(
            name, title, None, False, False, "not installed", _install(name) if wanted else None
        )
    try:
        check_wheels(runtime)
        dialect = dialect_of(version, name)
    except RunnerError as error:
        detail = error.what + (f": {error.got}" if error.got else "")
        return RuntimeStatus(name, title, version, False, False, detail, error.hint, broken=True)
    builds = dialect.ahead_of_time or bool(gpus or machine.board)
    refused = _refused(dialect, machine, gpus)
    if refused is not None:
        return RuntimeStatus(name, title, version, False, builds, *refused)
    return RuntimeStatus(name, title, version, True, builds, "installed; not tried", None)


def _refused(dialect: Dialect, machine: Machine, gpus: Sequence[int]) -> tuple[str, str | None] | None:
    """Why it does not run here, and what to do."""
    if not gpus and not machine.board:
        return ("builds engines, and runs none: there is no GPU" if dialect.ahead_of_time else "no GPU"), None
    known = dialect.capabilities
    if known is not None and not set(gpus) & set(known):
        here = capabilities_text(gpus) or "unknown"
        return (
            f"builds engines; not for this GPU: compute capability {here} of {capabilities_text(known)}",
            None,
        )
    driver = next((gpu.driver for gpu in machine.gpus if gpu.driver), None)
    least = LEAST_DRIVER.get(dialect.cuda or 0)
    found = re.match(r"\d+", driver or "")
    if least is not None and found is not None and int(found[0]) < least:
        hint = f"update NVIDIA's driver to {least} or newer"
        return f"the driver {driver} is too old for CUDA {dialect.cuda}", hint
    return None


def _installed(runtime: Runtime) -> str | None:
    """The bindings' version."""
    for package in runtime.packages[:1] or runtime.modules[:1]:
        if (version := package_version(package)) is not None:
            return version
    return None


def _install(name: str) -> str:
    return f"pip install 'dijiang-export[{'rtx' if name == TENSORRT_RTX else 'tensorrt'}]'"


def _wanted(name: str, machine: Machine, gpus: Sequence[int]) -> bool:
    """Would it run on this machine's GPU?"""
    if name == TENSORRT:
        return bool(machine.gpus or machine.board)
    return bool(set(gpus) & capabilities_of(TENSORRT_RTX))


def _capabilities(machine: Machine) -> list[int]:
    texts = [re.fullmatch(r"(\d+)\.(\d)", gpu.compute_capability or "") for gpu in machine.gpus]
    return [10 * int(text[1]) + int(text[2]) for text in texts if text is not None]


# -- engines -------------------------------------------------------------------------------------------


def engine_status(
    machine: Machine, runtimes: Sequence[RuntimeStatus], folder: Path = Path()
) -> tuple[EngineStatus, ...]:
    """The engines in a folder, and whether each would run here; reads their manifests alone.

    Args:
        machine: whose GPUs to think of.
        runtimes: `runtime_status` of it.
        folder: where to look; default: the current one.
    """
    try:
        folders = sorted(path.parent for path in folder.glob(f"*/{ENGINE_MANIFEST}"))[:MOST_ENGINES]
    except OSError:
        return ()
    return tuple(_engine(path, machine, {status.name: status for status in runtimes}) for path in folders)


def _engine(folder: Path, machine: Machine, runtimes: dict[str, RuntimeStatus]) -> EngineStatus:
    try:
        engine = open_engine(folder, verify=False)
    except DijiangError as error:
        return EngineStatus(str(folder), "?", False, error.what, error.hint)
    made = engine.made_for
    numbers = capabilities_text(made.compute_capabilities)
    plugin = "" if made.graphs == "plugin" else ", without the plugin"
    where = f"{made.gpu or 'compute capability'} {numbers}{plugin}"
    about = f"{RUNTIMES[made.runtime].title} {made.tensorrt}, {where}"
    detail, hint = _difference(engine, machine, runtimes[made.runtime])
    return EngineStatus(str(folder), about, detail is None, detail or "fits this machine", hint)


def _difference(
    engine: EngineFolder, machine: Machine, runtime: RuntimeStatus
) -> tuple[str | None, str | None]:
    """What keeps an engine from running here, and what to do; None if nothing is known."""
    made, gpus = engine.made_for, _capabilities(machine)
    again = f"dijiang-export build-engine BUNDLE -o {engine.path} --force"
    fitting = set(gpus) & set(made.compute_capabilities)
    if not gpus:
        return "there is no GPU here", None
    if not fitting or (made.gpu is not None and made.gpu not in [gpu.name for gpu in machine.gpus]):
        here = ", ".join(f"{gpu.name} {gpu.compute_capability or ''}".strip() for gpu in machine.gpus)
        return f"is for another GPU than {here}", again
    if runtime.version is None:
        return f"{runtime.title} is not installed", runtime.hint
    if not runtime.runs:
        return runtime.detail, runtime.hint
    if runtime.version.split(".")[:3] != made.tensorrt.split(".")[:3]:
        return f"{runtime.title} is {runtime.version} here", again
    if made.plugin_sources is None:
        return None, None
    if made.plugin_sources != _source_hash():
        return "was built with another version's plugin", again
    needed = min(fitting)
    try:
        find_plugin(dialect_of(made.tensorrt, made.runtime).plugin_major(made.tensorrt), (needed,))
    except PluginError:
        command = f"dijiang-export build-plugin --architecture {needed}"
        return f"the plugin is not built for compute capability {capability_text(needed)}", command
    return None, None


def _source_hash() -> str:
    try:
        return source_hash()
    except PluginError:  # an installation without sources
        return ""


def missing_command(
    machine: Machine, runtimes: Sequence[RuntimeStatus], engines: Sequence[EngineStatus], plugin: str | None
) -> str | None:
    """The one command that is missing before an engine runs here; None if one does, or none can.

    Args:
        machine: this one.
        runtimes: `runtime_status` of it.
        engines: `engine_status` of it.
        plugin: what `plugin_status` would do next.
    """
    if (not machine.gpus and not machine.board) or any(engine.fits for engine in engines):
        return None
    for runtime in runtimes:
        if runtime.broken:
            return runtime.hint
    running = [runtime for runtime in runtimes if runtime.runs]
    if not running:
        hints = [runtime.hint for runtime in reversed(runtimes) if runtime.hint]  # RTX's is the smaller one
        return hints[0] if hints else None
    if running[0].name == TENSORRT and plugin is not None:
        return plugin
    hints = [engine.hint for engine in engines if engine.hint]
    return hints[0] if hints else f"dijiang-export build-engine BUNDLE --runtime {running[0].name}"
