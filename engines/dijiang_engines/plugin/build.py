"""Compile the kernels and the TensorRT plugin, into the cache.

`build` takes what `requirements` found and compiles, unless the cache holds such a build. The cache's folder
appears whole or not at all; of two processes that want the same build, one makes it and the other waits for
it.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.errors import OutputError, PluginError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.machine import usable_cpus
from dijiang_engines.plugin.cache import (
    MANIFEST,
    BuiltPlugin,
    cache_folder,
    read_manifest,
    source_hash,
    write_manifest,
)
from dijiang_engines.plugin.compiling import Step, run_step
from dijiang_engines.plugin.elf import machine_of
from dijiang_engines.plugin.requirements import BuildRequirements
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.version import __version__


@dataclass(frozen=True)
class BuildResult:
    """What `build` made or found."""

    built: BuiltPlugin
    reused: bool
    """True: it was in the cache."""
    seconds: float


def build(
    needs: BuildRequirements,
    *,
    force: bool = False,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: ProgressFactory = silent,
    log: Callable[[str], None] = lambda line: None,
) -> BuildResult:
    """Make the libraries that `needs` describes, or take them from the cache.

    Args:
        needs: from `find_requirements`.
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
    entry, started = cache / needs.key, time.monotonic()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the cache {cache}",
            got=error.strerror,
            hint="set XDG_CACHE_HOME to a folder of yours",
        ) from error
    with _locked(cache / f".{needs.key}.lock", log) as waited:
        if (not force or waited) and (found := _intact(entry, needs)) is not None:
            return BuildResult(found, True, time.monotonic() - started)
        log_file = cache / f"{needs.key}.log"
        try:
            with output_folder(entry, force=True, markers=(MANIFEST,)) as temporary:
                _compile(needs, temporary, log_file, jobs, progress, log)
                write_manifest(temporary, _facts(needs, time.monotonic() - started), needs.libraries)
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


def _intact(entry: Path, needs: BuildRequirements) -> BuiltPlugin | None:
    try:
        built = read_manifest(entry)
        for name in needs.libraries:
            built.library(name)
    except PluginError:
        return None
    return built


def _compile(
    needs: BuildRequirements,
    folder: Path,
    log_file: Path,
    jobs: int | None,
    progress: ProgressFactory,
    log: Callable[[str], None],
) -> None:
    work = folder / "work"
    real = [f"{number}-real" for number in needs.architectures[:-1]]
    define = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": needs.make,
        **_compilers(needs),
        "CMAKE_CUDA_ARCHITECTURES": ";".join([*real, str(needs.architectures[-1])]),
        "TENSORRT_INCLUDE": needs.headers.folder.resolve() if needs.headers else "",
        "DIJIANG_VERSION": re.sub(r"[^0-9.].*", "", __version__),
    }
    configure: list[str | Path] = [needs.cmake.path, "-S", needs.sources, "-B", work, "-G", needs.generator]
    configure += [f"-D{name}={value}" for name, value in define.items()]
    count = jobs or usable_cpus()
    compile_: list[str | Path] = [needs.cmake.path, "--build", work, "--parallel", str(count)]
    what = f"the kernels{f' and the plugin for TensorRT {needs.headers}' if needs.headers else ''}"
    names = ", ".join(needs.architecture_names) + (f" on {needs.machine}" if needs.target else "")
    log(f"compiling {what} for {names} with CUDA {needs.nvcc.release}, {count} at a time")
    with log_file.open("w", encoding="utf-8") as sink, progress("Compiling", 100, "items") as bar:
        variables = {} if needs.target else needs.nvcc.environment
        step = Step("CMake could not configure the build", configure, variables)
        run_step(step, log_file, sink, lambda percent: None)
        run_step(Step("compiling failed", compile_, variables), log_file, sink, _percent(bar.advance))
    for name in needs.libraries:
        made = work / name
        if not made.is_file():
            raise PluginError(f"the build made no {name}", hint=f"the whole log is in {log_file}")
        if (machine := machine_of(made)) not in (None, needs.machine):
            raise PluginError(
                f"{needs.cxx.path} compiled for another kind of processor",
                got=machine,
                expected=needs.machine,
                hint=f"unset CXX and CUDAHOSTCXX, or --target {machine}; the whole log is in {log_file}",
            )
        shutil.move(made, folder / name)
    for name in _REPORTS:
        if (work / name).is_file():
            shutil.move(work / name, folder / name)
    shutil.rmtree(work)


def _compilers(needs: BuildRequirements) -> dict[str, str | Path]:
    """CMake's variables for them."""
    if needs.target is None:
        return {
            "CMAKE_CXX_COMPILER": needs.cxx.path,
            "CMAKE_CUDA_COMPILER": needs.nvcc.path,
            "CMAKE_CUDA_HOST_COMPILER": needs.cxx.path,
        }
    return {
        "CMAKE_TOOLCHAIN_FILE": needs.sources / f"cmake/{needs.machine}.cmake",
        "DIJIANG_CXX": needs.cxx.path,
        "DIJIANG_NVCC": needs.nvcc.path,
        "DIJIANG_CUDA_TARGET": needs.target.folder,
    }


def _percent(advance: Callable[[float], None]) -> Callable[[float], None]:
    shown = 0.0

    def show(percent: float) -> None:
        nonlocal shown
        if percent > shown:
            advance(percent - shown)
            shown = percent

    return show


def _facts(needs: BuildRequirements, seconds: float) -> dict[str, object]:
    return {
        "version": __version__,
        "sources": source_hash(needs.sources),
        "cuda": needs.nvcc.release,
        "nvcc": str(needs.nvcc.path),
        "host_compiler": needs.cxx.about,
        "cmake": needs.cmake.about,
        "architectures": needs.architecture_names,
        "tensorrt": str(needs.headers) if needs.headers else None,
        "tensorrt_include": str(needs.headers.folder) if needs.headers else None,
        "machine": needs.machine,
        "cuda_target": str(needs.target.folder) if needs.target else None,
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
