"""Building for another kind of processor: its compiler, and the folder that CUDA has for it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.errors import PluginError, UsageError
from dijiang_engines.formats.safe_files import LIMITS, open_regular
from dijiang_engines.machine import run_tool
from dijiang_engines.plugin import toolchain
from dijiang_engines.plugin.elf import machine_of

RUNTIME = "libcudart_static.a"


@dataclass(frozen=True)
class Processor:
    """A kind of processor to build for, and what others call it."""

    name: str
    """As `uname -m` says it."""
    triplet: str
    """GNU's: of compilers' names, and of Debian's folders."""
    folders: tuple[str, ...]
    """In a CUDA toolkit's `targets`. Of CUDA 12, `aarch64-linux` is for Jetsons and `sbsa-linux` for servers;
    CUDA 13 has the latter for both (the notes of JetPack 7.0)."""
    wheels: str
    """pip's platform."""


PROCESSORS = {
    "aarch64": Processor(
        "aarch64", "aarch64-linux-gnu", ("sbsa-linux", "aarch64-linux"), "manylinux2014_aarch64"
    )
}
"""There is a CMake toolchain file for each: plugins/cmake/<name>.cmake."""


@dataclass(frozen=True)
class CudaTarget:
    """CUDA for another kind of processor: what a toolkit has in `targets/<name>`, or pip's wheels in one."""

    processor: Processor
    folder: Path
    """With `include` and `lib`."""
    version: tuple[int, ...]
    """Such as (13, 0)."""

    @property
    def release(self) -> str:
        """Such as "13.0"."""
        return ".".join(map(str, self.version))


def find_target(text: str, nvccs: Sequence[toolchain.Nvcc]) -> CudaTarget | None:
    """What `--target` names; None: this machine's own kind of processor.

    Args:
        text: a kind of processor, such as "aarch64", whose CUDA is looked for in the toolkits of `nvccs` and
            in /usr/local/cuda*; or a folder with CUDA for it: a toolkit, its `targets/sbsa-linux`, or where
            pip put the wheels.
        nvccs: the compilers that were found here, the preferred one first.

    Raises:
        UsageError: it is neither.
        PluginError: CUDA for it is not there, or not whole.
    """
    here = platform.machine()
    if text == here:
        return None
    if processor := PROCESSORS.get(text):
        local = toolchain.SYSTEM / "usr/local"
        tops = [nvcc.root for nvcc in nvccs] + sorted(local.glob("cuda*"), reverse=True)
        places = [top / "targets" / name for top in tops for name in processor.folders]
    elif Path(text).is_dir():
        processor, places = None, list(_places(Path(text).absolute()))
    else:
        known = ", ".join(sorted({here, *PROCESSORS}))
        raise UsageError(
            "--target is neither a kind of processor nor a folder",
            got=text,
            expected=f"{known}, or the folder of a CUDA toolkit for such a one",
        )
    for place in places:
        if (target := _read(place)) and processor in (None, target.processor):
            return target
    wanted = processor or PROCESSORS["aarch64"]
    hint = get_target(wanted, nvccs[0].release if nvccs else None)
    if here == wanted.name:
        hint = f"for this machine itself leave --target out; CUDA_HOME={text} chooses a toolkit"
    there = ", ".join(f"{RUNTIME} for {found}" for place in places if (found := _runtime(place)[1]))
    raise PluginError(
        f"CUDA for {wanted.name} was not found" + ("" if processor else f" in {text}"),
        got=there or None,
        expected=f"include/ and lib/{RUNTIME} for {wanted.name}, in the folder itself or in "
        + " or ".join(f"targets/{name}" for name in wanted.folders),
        hint=hint,
    )


def check_whole(target: CudaTarget) -> None:
    """Refuse a folder in which parts are missing, which would show as a compiler's error.

    Raises:
        PluginError: names what is missing.
    """
    include = target.folder / "include"
    needed = {
        "crt/host_config.h": [include / "crt/host_config.h"],
        "fatbinary_section.h": [include / "fatbinary_section.h"],
        "nv/target": [include / "cccl/nv/target", include / "nv/target"],  # CUDA 13; 12
    }
    missing = [name for name, places in needed.items() if not any(place.is_file() for place in places)]
    if missing:
        raise PluginError(
            f"CUDA for {target.processor.name} is not whole in {target.folder}",
            got=f"no {' and no '.join(missing)} in include",
            hint=get_target(target.processor, target.release),
        )


def find_compiler(processor: Processor, environment: Mapping[str, str] = os.environ) -> toolchain.Tool:
    """The C++ compiler for it: $CUDAHOSTCXX or $CXX if they compile for it, else <triplet>-g++.

    Raises:
        PluginError: there is none.
    """
    for name in (environment.get("CUDAHOSTCXX"), environment.get("CXX"), f"{processor.triplet}-g++"):
        tool = toolchain.find_tool(name, environment) if name else None
        if tool and (run_tool(str(tool.path), "-dumpmachine") or "").startswith(f"{processor.name}-"):
            return tool
    raise PluginError(
        f"there is no C++ compiler for {processor.name}",
        expected=f"{processor.triplet}-g++",
        hint=f"apt-get install g++-{processor.triplet}, or set CUDAHOSTCXX",
    )


def choose_nvcc(nvccs: Sequence[toolchain.Nvcc], target: CudaTarget) -> list[toolchain.Nvcc]:
    """The compilers that may be used with it, of those here and that of its own toolkit: of its version.

    Raises:
        PluginError: there are compilers, but none of them is.
    """
    own = toolchain.read_nvcc(target.folder.parent.parent / "bin/nvcc")
    every = ([own] if own else []) + list(nvccs)
    fitting = [nvcc for nvcc in every if nvcc.version[:2] == target.version]
    if every and not fitting:
        raise PluginError(
            f"CUDA for {target.processor.name} is of another version than nvcc",
            got=f"{target.release} in {target.folder}; nvcc "
            + ", ".join(f"{nvcc.release} ({nvcc.path})" for nvcc in every),
            expected="the same version of both",
            hint=get_target(target.processor, every[0].release),
        )
    return fitting


def get_target(processor: Processor, release: str | None) -> str:
    """How to get CUDA for it, in words."""
    parts = ("runtime", "nvcc", "crt", "cccl")  # of nvcc's, a header
    wheels = " ".join(f"'nvidia-cuda-{part}=={release or '13.0'}.*'" for part in parts)
    return (
        f"pip install --target cuda-{processor.name} --no-deps --only-binary=:all: --platform "
        f"{processor.wheels} {wheels}, then --target cuda-{processor.name} (CUDA 13.0 and newer; up to 12: "
        f"on the device, or NVIDIA's cross-compilation packages)"
    )


def _places(top: Path) -> Iterator[Path]:
    """Where CUDA for another kind of processor may be in a folder that was named."""
    names = [name for processor in PROCESSORS.values() for name in processor.folders]
    yield from (top / "targets" / name for name in names)
    yield from sorted(top.glob("nvidia/cu[0-9]*"), reverse=True)
    yield top


def _read(folder: Path) -> CudaTarget | None:
    library, machine = _runtime(folder)
    version = _version(folder / "include/cuda_runtime_api.h")
    if library is None or machine not in PROCESSORS or machine == platform.machine() or version is None:
        return None
    return CudaTarget(PROCESSORS[machine], folder, version)


def _runtime(folder: Path) -> tuple[Path | None, str | None]:
    """CUDA's static runtime in the folder, and which kind of processor it is for."""
    for name in ("lib", "lib64"):
        if machine := machine_of(folder / name / RUNTIME):
            return folder / name / RUNTIME, machine
    return None, None


def _version(header: Path) -> tuple[int, ...] | None:
    """CUDA's version in cuda_runtime_api.h, where it is 1000 * major + 10 * minor."""
    try:
        with open_regular(header, most=LIMITS["config"], links=True, error=PluginError) as file:
            text = file.read().decode(errors="replace")
    except (OSError, PluginError):
        return None
    match = re.search(r"^#define\s+CUDART_VERSION\s+(\d{4,6})\b", text, re.MULTILINE)
    return (int(match[1]) // 1000, int(match[1]) % 1000 // 10) if match else None
