"""Compile the kernels and the TensorRT plugin for this machine, into the cache.

`plan_build` finds everything that is needed, or says what is missing; `build` compiles, unless the cache
holds what the plan asks for. The cache's folder appears whole or not at all; of two processes that want the
same build, one makes it and the other waits for it.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines import __version__, toolchain
from dijiang_engines.atomic import output_folder
from dijiang_engines.compiling import Step, run_step
from dijiang_engines.errors import OutputError, PluginError, UsageError
from dijiang_engines.machine import usable_cpus
from dijiang_engines.plugin import (
    KERNELS,
    MANIFEST,
    BuiltPlugin,
    cache_folder,
    plugin_sources,
    read_manifest,
    source_hash,
    tensorrt_name,
    write_manifest,
)
from dijiang_engines.progress import ProgressFactory, silent

GET_HEADERS = (
    "install TensorRT's development package (JetPack's, or NVIDIA's .deb or .tar: they have the headers), or "
    "take the folder include/ of github.com/NVIDIA/TensorRT at the tag of your version; then "
    "--tensorrt-include FOLDER. For the kernels alone: --kernels-only"
)
GET_CUDA = (
    "install the CUDA toolkit (on a Jetson: apt-get install nvidia-jetpack), or set CUDA_HOME to where it is"
)


@dataclass(frozen=True)
class BuildPlan:
    """Everything that decides what a build makes."""

    sources: Path
    nvcc: toolchain.Nvcc
    cxx: toolchain.Tool
    cmake: toolchain.Tool
    generator: str
    make: Path
    architectures: tuple[int, ...]
    """As 10 * major + minor, rising; the last one also as PTX."""
    headers: toolchain.Headers | None
    """TensorRT's; None: kernels alone."""

    @property
    def architecture_names(self) -> tuple[str, ...]:
        """Such as ("sm_80", "sm_90", "compute_90")."""
        return (*(f"sm_{number}" for number in self.architectures), f"compute_{self.architectures[-1]}")

    @property
    def libraries(self) -> list[str]:
        """File names of what is made."""
        return [KERNELS] + ([tensorrt_name(self.headers.version[0])] if self.headers else [])

    @property
    def key(self) -> str:
        """The cache's name for this build, 16 hexadecimal digits."""
        decisive = [
            __version__, source_hash(self.sources), self.nvcc.release, self.cxx.about, self.architectures,
            str(self.headers), platform.machine(),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BuildResult:
    """What `build` made or found."""

    built: BuiltPlugin
    reused: bool
    """True: it was in the cache."""
    seconds: float


# -- what to build -------------------------------------------------------------------------------------


def plan_build(
    *,
    architectures: Sequence[str] = (),
    kernels_only: bool = False,
    tensorrt_include: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> BuildPlan:
    """Find what a build needs.

    Args:
        architectures: such as "87", "sm_87", "8.7" or "all" (every tuned one that the compiler knows); empty:
            those of this machine's GPUs.
        kernels_only: build no TensorRT plugin.
        tensorrt_include: TensorRT's headers; default: looked for.
        environment: variables that name tools and folders.

    Raises:
        UsageError: an argument makes no sense.
        PluginError: something is missing or too old; the message says what was found and how to get it.
    """
    if kernels_only and tensorrt_include is not None:
        raise UsageError("--kernels-only and --tensorrt-include exclude each other")
    wanted = _wanted_architectures(architectures)
    nvcc = _choose_nvcc(toolchain.find_nvccs(environment), wanted)
    numbers = wanted or tuple(n for n in toolchain.TUNED_ARCHITECTURES if n in nvcc.architectures)
    if not numbers:
        raise PluginError(
            f"{nvcc.path} knows no GPU that the kernels are for",
            got=_names(nvcc.architectures),
            expected=f"one of {_names(toolchain.TUNED_ARCHITECTURES)}",
            hint=GET_CUDA,
        )
    cxx = toolchain.find_cxx(environment)
    if cxx is None:
        raise PluginError(
            "there is no C++ compiler",
            expected="g++ or clang++",
            hint="apt-get install g++, or set CUDAHOSTCXX",
        )
    generator, make = _need_make(environment)
    return BuildPlan(
        sources=plugin_sources(),
        nvcc=nvcc,
        cxx=cxx,
        cmake=_need_cmake(environment),
        generator=generator,
        make=make,
        architectures=numbers,
        headers=None if kernels_only else _need_headers(tensorrt_include, environment),
    )


def parse_architecture(text: str) -> int:
    """ "87", "sm_87" or "8.7" as 87.

    Raises:
        UsageError: it is none of these, or of a GPU that the kernels do not support.
    """
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})|(\d{1,2})\.(\d)", text.strip().lower())
    if match is None:
        raise UsageError("--architecture is not one", got=text, expected="such as 87, sm_87, 8.7, or all")
    number = int(match[1]) if match[1] else 10 * int(match[2]) + int(match[3])
    if number < toolchain.LEAST_ARCHITECTURE:
        raise UsageError(
            "the kernels do not support this architecture", got=f"sm_{number}",
            expected=f"sm_{toolchain.LEAST_ARCHITECTURE} or newer",
        )  # fmt: skip
    return number


def _wanted_architectures(texts: Sequence[str]) -> tuple[int, ...]:
    """Rising; empty for all that the compiler knows."""
    if "all" in texts:
        if len(texts) > 1:
            raise UsageError("--architecture all stands alone", got=", ".join(texts))
        return ()
    if texts:
        return tuple(sorted({parse_architecture(text) for text in texts}))
    found = toolchain.find_architectures()
    supported = tuple(number for number in found if number >= toolchain.LEAST_ARCHITECTURE)
    if not supported:
        raise PluginError(
            "the architecture to compile for is not known",
            got=f"GPUs of {_names(found)}" if found else "no NVIDIA GPU (nvidia-smi, libcuda)",
            expected=f"a GPU of sm_{toolchain.LEAST_ARCHITECTURE} or newer",
            hint="name it: --architecture 87 (Jetson Orin), 89 (RTX 40), 90 (H100); or --architecture all",
        )
    return supported


def _choose_nvcc(nvccs: list[toolchain.Nvcc], wanted: tuple[int, ...]) -> toolchain.Nvcc:
    """The first that is new enough and knows all of `wanted`."""
    least = ".".join(map(str, toolchain.LEAST_CUDA))
    if not nvccs:
        raise PluginError(
            "the CUDA compiler nvcc was not found",
            got="none in $CUDACXX, $CUDA_HOME, $PATH, /usr/local/cuda*",
            expected=f"CUDA {least} or newer",
            hint=GET_CUDA,
        )
    recent = [nvcc for nvcc in nvccs if nvcc.version >= toolchain.LEAST_CUDA]
    if not recent:
        found = ", ".join(f"CUDA {nvcc.release} ({nvcc.path})" for nvcc in nvccs)
        raise PluginError("nvcc is too old", got=found, expected=f"CUDA {least} or newer", hint=GET_CUDA)
    for nvcc in recent:
        if set(wanted) <= set(nvcc.architectures):
            return nvcc
    nvcc = recent[0]
    missing = [number for number in wanted if number not in nvcc.architectures]
    first = toolchain.FIRST_CUDA.get(missing[0])
    hint = f"CUDA {first} or newer knows sm_{missing[0]}" if first else None
    if missing[0] == 101:
        hint = "Jetson Thor is sm_110 in CUDA 13"
    raise PluginError(
        f"nvcc does not know the architecture {_names(missing)}",
        got=f"CUDA {nvcc.release} ({nvcc.path}), which knows {_names(nvcc.architectures)}",
        expected=f"an nvcc that knows {_names(wanted)}",
        hint=hint,
    )


def _need_cmake(environment: Mapping[str, str]) -> toolchain.Tool:
    cmake, least = toolchain.find_cmake(environment), ".".join(map(str, toolchain.LEAST_CMAKE))
    if cmake is None or cmake.version < toolchain.LEAST_CMAKE:
        raise PluginError(
            "CMake was not found" if cmake is None else "CMake is too old",
            got=None if cmake is None else f"{cmake.about} ({cmake.path})",
            expected=f"{least} or newer",
            hint="pip install cmake, or apt-get install cmake",
        )
    return cmake


def _need_make(environment: Mapping[str, str]) -> tuple[str, Path]:
    found = toolchain.find_make(environment)
    if found is None:
        raise PluginError(
            "neither make nor ninja was found", hint="apt-get install make, or pip install ninja"
        )
    return found


def _need_headers(given: Path | None, environment: Mapping[str, str]) -> toolchain.Headers:
    if given is not None:
        headers = toolchain.read_headers(given)
        if headers is None:
            raise PluginError(
                "--tensorrt-include holds no TensorRT headers",
                got=str(given) if given.is_dir() else f"{given}, which is not a folder",
                expected="a folder with NvInfer.h and NvInferVersion.h",
                hint=GET_HEADERS,
            )
        candidates = [headers]
    else:
        candidates = toolchain.find_headers(environment)
    usable = [headers for headers in candidates if headers.usable]
    if usable:
        return usable[0]
    if candidates:
        found = ", ".join(f"TensorRT {headers} in {headers.folder}" for headers in candidates)
        raise PluginError(
            "the plugin is not for this TensorRT",
            got=found,
            expected=toolchain.TENSORRT_RANGES,
            hint=GET_HEADERS,
        )
    package = toolchain.installed_tensorrt()
    raise PluginError(
        "TensorRT's headers were not found",
        got=f"pip's tensorrt {package}, which brings libraries but no headers" if package else None,
        expected=f"NvInfer.h of TensorRT {toolchain.TENSORRT_RANGES}",
        hint=GET_HEADERS,
    )


def _names(architectures: Sequence[int]) -> str:
    return ", ".join(f"sm_{number}" for number in architectures) or "none"


# -- building ------------------------------------------------------------------------------------------


def build(
    plan: BuildPlan,
    *,
    force: bool = False,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: ProgressFactory = silent,
    log: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make what `plan` says, or take it from the cache.

    Args:
        plan: from `plan_build`.
        force: compile even if the cache holds it; the old build is replaced when the new one is complete.
        jobs: compilers at a time; default: one per usable CPU.
        cache: default: `cache_folder()`.
        progress: draws a bar in percent.
        log: called with a line for people, now and then.

    Raises:
        PluginError: the compiler failed; the message has its first errors and names the log with all.
        OutputError: the cache cannot be written to.
    """
    cache = cache or cache_folder()
    entry, started = cache / plan.key, time.monotonic()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the cache {cache}",
            got=error.strerror,
            hint="set XDG_CACHE_HOME to a folder of yours",
        ) from error
    with _locked(cache / f".{plan.key}.lock", log) as waited:
        if (not force or waited) and (found := _intact(entry, plan)) is not None:
            return BuildResult(found, True, time.monotonic() - started)
        log_file = cache / f"{plan.key}.log"
        try:
            with output_folder(entry, force=True, markers=(MANIFEST,)) as temporary:
                _compile(plan, temporary, log_file, jobs, progress, log)
                write_manifest(temporary, _facts(plan, time.monotonic() - started), plan.libraries)
        except PluginError:  # its message names the log
            raise
        except BaseException:
            log_file.unlink(missing_ok=True)
            raise
        log_file.unlink(missing_ok=True)
    return BuildResult(read_manifest(entry), False, time.monotonic() - started)


def copy_build(built: BuiltPlugin, output: Path) -> None:
    """Copy a build's files to a folder of the user's choice, whole or not at all; replaces an earlier copy.

    Raises:
        OutputError: the folder holds something else, or cannot be written to.
        PluginError: the build is damaged.
    """
    libraries = [built.library(name) for name in built.libraries]
    with output_folder(output, force=True, markers=(MANIFEST,)) as temporary:
        for path in (*libraries, *(built.folder / name for name in (MANIFEST, *_REPORTS))):
            if path.exists():
                shutil.copy(path, temporary / path.name)


_REPORTS = ("resource-report.txt", "resource-report.json")


def _intact(entry: Path, plan: BuildPlan) -> BuiltPlugin | None:
    try:
        built = read_manifest(entry)
        for name in plan.libraries:
            built.library(name)
    except PluginError:
        return None
    return built


def _compile(
    plan: BuildPlan,
    folder: Path,
    log_file: Path,
    jobs: int | None,
    progress: ProgressFactory,
    log: Callable[[str], None],
) -> None:
    work = folder / "work"
    real = [f"{number}-real" for number in plan.architectures[:-1]]
    define = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": plan.make,
        "CMAKE_CXX_COMPILER": plan.cxx.path,
        "CMAKE_CUDA_COMPILER": plan.nvcc.path,
        "CMAKE_CUDA_HOST_COMPILER": plan.cxx.path,
        "CMAKE_CUDA_ARCHITECTURES": ";".join([*real, str(plan.architectures[-1])]),
        "TENSORRT_INCLUDE": plan.headers.folder.resolve() if plan.headers else "",
        "DIJIANG_VERSION": re.sub(r"[^0-9.].*", "", __version__),
    }
    configure: list[str | Path] = [plan.cmake.path, "-S", plan.sources, "-B", work, "-G", plan.generator]
    configure += [f"-D{name}={value}" for name, value in define.items()]
    count = jobs or usable_cpus()
    compile_: list[str | Path] = [plan.cmake.path, "--build", work, "--parallel", str(count)]
    what = f"the kernels{f' and the plugin for TensorRT {plan.headers}' if plan.headers else ''}"
    names = ", ".join(plan.architecture_names)
    log(f"compiling {what} for {names} with CUDA {plan.nvcc.release}, {count} at a time")
    with log_file.open("w", encoding="utf-8") as sink, progress("Compiling", 100, "items") as bar:
        run_step(Step("CMake could not configure the build", configure), log_file, sink, lambda percent: None)
        run_step(Step("compiling failed", compile_), log_file, sink, _percent(bar.advance))
    for name in plan.libraries:
        made = work / name
        if not made.is_file():
            raise PluginError(f"the build made no {name}", hint=f"the whole log is in {log_file}")
        shutil.move(made, folder / name)
    for name in _REPORTS:
        if (work / name).is_file():
            shutil.move(work / name, folder / name)
    shutil.rmtree(work)


def _percent(advance: Callable[[float], None]) -> Callable[[float], None]:
    shown = 0.0

    def show(percent: float) -> None:
        nonlocal shown
        if percent > shown:
            advance(percent - shown)
            shown = percent

    return show


def _facts(plan: BuildPlan, seconds: float) -> dict[str, object]:
    return {
        "version": __version__,
        "sources": source_hash(plan.sources),
        "cuda": plan.nvcc.release,
        "nvcc": str(plan.nvcc.path),
        "host_compiler": plan.cxx.about,
        "cmake": plan.cmake.about,
        "architectures": plan.architecture_names,
        "tensorrt": str(plan.headers) if plan.headers else None,
        "tensorrt_include": str(plan.headers.folder) if plan.headers else None,
        "machine": platform.machine(),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
        "seconds": round(seconds, 1),
    }


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file `path` for the length of the block, and remove it. Yields whether another had it."""
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    log("another process is building the same; waiting for it")
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever held it removed the file: then this is a lock on nothing, and others lock a new one.
            try:
                same = os.path.samestat(os.fstat(descriptor), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                try:
                    yield waited
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)
