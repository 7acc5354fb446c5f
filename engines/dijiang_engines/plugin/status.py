"""What `doctor` says about the plugin: the tools to compile it, TensorRT's headers, what is built already."""

from __future__ import annotations

from dataclasses import dataclass

from dijiang_engines.errors import PluginError
from dijiang_engines.machine import Machine
from dijiang_engines.plugin import toolchain
from dijiang_engines.plugin.cache import built_plugins, runs_on, source_hash
from dijiang_engines.plugin.requirements import GET_CUDA
from dijiang_engines.version import __version__

SHORT_HEADERS = "JetPack or TensorRT's development package, or build-plugin --tensorrt-include FOLDER"


@dataclass(frozen=True)
class PackageStatus:
    """One package or tool that a part of the program needs."""

    name: str
    version: str | None
    """None: not installed."""
    enough: bool
    """Installed, and at least the least version known to work."""
    least: str | None
    hint: str | None


@dataclass(frozen=True)
class BuiltStatus:
    """One build in the cache."""

    folder: str
    state: str
    """"current", "foreign" (for another kind of processor), "stale" (made from other sources), or "damaged"
    (a library is not what was built)."""
    architectures: tuple[str, ...]
    machine: str
    """The kind of processor that it is for, such as "aarch64"."""
    cuda: str
    tensorrt: str | None
    """Version of the headers; None: kernels alone."""
    detail: str | None
    """What is damaged."""


@dataclass(frozen=True)
class PluginStatus:
    """What there is of the kernels and the plugin."""

    nvcc: str | None
    """Path of the preferred CUDA compiler."""
    known_architectures: tuple[int, ...]
    """What it can compile for, as 10 * major + minor."""
    gpu_architectures: tuple[int, ...]
    """Of this machine's GPUs."""
    headers: tuple[tuple[str, str], ...]
    """(version, folder) of every TensorRT whose headers were found."""
    built: tuple[BuiltStatus, ...]
    """Newest first."""
    hint: str | None
    """What to do next; None if there is nothing to do, or no GPU to do it for."""


def plugin_needs() -> tuple[PackageStatus, ...]:
    """The tools that `build-plugin` needs, and TensorRT's headers."""
    nvccs, cmake = toolchain.find_nvccs(), toolchain.find_cmake()
    cxx, make = toolchain.find_cxx(), toolchain.find_make()
    usable = [headers for headers in toolchain.find_headers() if headers.usable]
    nvcc = next((n for n in nvccs if n.version >= toolchain.LEAST_CUDA), nvccs[0] if nvccs else None)
    needs = (
        _need("nvcc", nvcc.version if nvcc else None, toolchain.LEAST_CUDA, GET_CUDA),
        _need("C++ compiler", cxx.version if cxx else None, (), "apt-get install g++"),
        _need("cmake", cmake.version if cmake else None, toolchain.LEAST_CMAKE, "pip install cmake"),
        _need("make or ninja", () if make else None, (), "apt-get install make"),
        _need("TensorRT headers", usable[0].version if usable else None, (8, 6), SHORT_HEADERS),
    )
    return needs


def plugin_status(machine: Machine) -> PluginStatus:
    """Look at the compiler, the headers and the cache; compiles and loads nothing.

    Args:
        machine: whose GPUs to think of.
    """
    nvccs = toolchain.find_nvccs()
    gpus = toolchain.find_architectures(machine.gpus, machine.board or "")
    built = tuple(_look_at_builds())
    current = [b for b in built if b.state == "current"]
    hint = None
    if gpus and not any(all(runs_on(b.architectures, gpu) for gpu in gpus) for b in current):
        hint = "dijiang-export build-plugin"
        if not any(headers.usable for headers in toolchain.find_headers()):
            hint += " --kernels-only"
    return PluginStatus(
        nvcc=str(nvccs[0].path) if nvccs else None,
        known_architectures=nvccs[0].architectures if nvccs else (),
        gpu_architectures=gpus,
        headers=tuple((str(h), str(h.folder)) for h in toolchain.find_headers()),
        built=built,
        hint=hint,
    )


def _look_at_builds() -> list[BuiltStatus]:
    found = []
    try:
        digest = source_hash()
    except PluginError:  # an installation without sources: what it has cannot be compared
        digest = ""
    for built in built_plugins():
        state, detail = "foreign" if built.is_foreign else "current", None
        if (built.sources, built.version) != (digest, __version__):
            state = "stale"
        try:
            for name in built.libraries:
                built.library(name)
        except PluginError as error:
            state, detail = "damaged", error.what
        folder = str(built.folder)
        found.append(
            BuiltStatus(folder, state, built.architectures, built.machine, built.cuda, built.tensorrt, detail)
        )
    return found


def _need(name: str, version: tuple[int, ...] | None, least: tuple[int, ...], hint: str) -> PackageStatus:
    enough = version is not None and version >= least
    shown = None if version is None else ".".join(map(str, version)) or "found"
    return PackageStatus(name, shown, enough, ".".join(map(str, least)) or None, None if enough else hint)
