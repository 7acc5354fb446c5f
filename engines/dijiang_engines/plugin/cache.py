"""The compiled kernels and TensorRT plugins in the user's cache: what is there, and whether it may be loaded.

`build-plugin` fills the cache (build.py), one folder per set of sources, compiler, architectures and
TensorRT version. Each holds libdijiang_kernels.so, at most one libdijiang_tensorrt_<major>.so, and
plugin.json, which says what they were made from and their hashes. A library whose hash differs is never
loaded; neither is one in a folder that another user may write to. Hashes find damage, permissions keep
others out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.errors import PluginError
from dijiang_engines.formats.safe_files import (
    LIMITS,
    is_plain_name,
    open_regular,
    parse_json,
    read_bounded,
    sha256_of,
)
from dijiang_engines.version import __version__

MANIFEST = "plugin.json"
FORMAT = 1
KERNELS = "libdijiang_kernels.so"
REBUILD = "dijiang-export build-plugin"

# What decides about the libraries; tests do not.
_SOURCE_PARTS = ("CMakeLists.txt", "cmake", "exports", "include", "kernels", "tensorrt")
_SOURCE_SUFFIXES = {".txt", ".cmake", ".sh", ".py", ".map", ".h", ".cuh", ".cu", ".cpp"}


@dataclass(frozen=True)
class BuiltPlugin:
    """One folder of the cache, as its manifest describes it."""

    folder: Path
    sources: str
    """`source_hash` of what it was made from."""
    version: str
    """Of dijiang-export."""
    cuda: str
    """Version of the compiler, such as "13.0"."""
    architectures: tuple[str, ...]
    """Such as ("sm_87", "compute_87")."""
    tensorrt: str | None
    """Version of the headers; None: kernels alone."""
    machine: str
    """Such as "aarch64"."""
    libraries: dict[str, str]
    """File name -> SHA-256, hexadecimal."""
    made: str
    """When, UTC, ISO 8601."""

    @property
    def tensorrt_major(self) -> int | None:
        """Of `tensorrt`."""
        return None if self.tensorrt is None else int(self.tensorrt.split(".")[0])

    @property
    def is_foreign(self) -> bool:
        """True if it is for another kind of processor: made for it here, or in a cache that several share."""
        return self.machine != platform.machine()

    def is_current(self) -> bool:
        """True if it was made from these sources, by this version, for this kind of processor."""
        return (self.sources, self.version) == (source_hash(), __version__) and not self.is_foreign

    def library(self, name: str) -> Path:
        """The path of library `name` in it, after checking hash and permissions.

        Raises:
            PluginError: it is not there, is not what was built, or others can write to it.
        """
        path, expected = self.folder / name, self.libraries.get(name)
        if expected is None:
            raise PluginError(f"{self.folder} holds no {name}", hint=REBUILD)
        _check_permissions(self.folder)
        try:
            got = library_hash(path)
        except PluginError as error:
            error.hint = f"{REBUILD} --force"
            raise
        if got != expected:
            raise PluginError(
                f"{path} is not the library that was built: it will not be loaded",
                got=f"SHA-256 {got}",
                expected=f"SHA-256 {expected}",
                hint=f"{REBUILD} --force",
            )
        return path


def find_kernels_library(architecture: int | None = None, cache: Path | None = None) -> Path:
    """The kernels' library in the cache that was made from these sources.

    Args:
        architecture: of the GPU, as 10 * major + minor: only a library that runs there will do, and one with
            machine code for it comes first. Otherwise, and among equals, the newest.
        cache: default: `cache_folder()`.

    Raises:
        PluginError: there is none, or it is stale or damaged.
    """
    return _find(KERNELS, None, () if architecture is None else (architecture,), cache)


def find_tensorrt_library(major: int, architectures: Sequence[int] = (), cache: Path | None = None) -> Path:
    """The plugin for TensorRT `major` in the cache, for all of these GPUs; else as `find_kernels_library`."""
    return _find(tensorrt_name(major), major, architectures, cache)


def tensorrt_name(major: int) -> str:
    """File name of the plugin for TensorRT `major`."""
    return f"libdijiang_tensorrt_{major}.so"


def runs_on(architectures: tuple[str, ...], architecture: int) -> bool:
    """True if code made for `architectures` runs on a GPU of compute capability `architecture`.

    Machine code runs on its own compute capability (across minor versions it may, but not between a Jetson
    and other GPUs: that is not counted on); PTX on every one from its own upwards.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        if kind == "sm" and number == str(architecture):
            return True
        if kind == "compute" and number.isdigit() and int(number) <= architecture:
            return True
    return False


def cache_folder() -> Path:
    """Where builds are kept: $XDG_CACHE_HOME/dijiang-export/plugin, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"  # the specification: ignore others
    return root / "dijiang-export" / "plugin"


def built_plugins(cache: Path | None = None) -> list[BuiltPlugin]:
    """Everything in the cache that has a readable manifest, newest first."""
    found = []
    try:
        entries = sorted((cache or cache_folder()).iterdir())
    except OSError:
        return []
    for entry in entries:
        try:
            if not entry.name.startswith(".") and entry.is_dir():
                found.append(read_manifest(entry))
        except (PluginError, OSError):
            continue
    return sorted(found, key=lambda built: built.made, reverse=True)


def read_manifest(folder: Path) -> BuiltPlugin:
    """Read a build's plugin.json.

    Raises:
        PluginError: it is absent, of another format, or malformed.
    """
    path = folder / MANIFEST
    try:
        content = read_bounded(path, LIMITS["plugin record"], links=True, error=PluginError)
        data = parse_json(content, MANIFEST, error=PluginError)
    except PluginError as error:
        raise _no_record(path, error.what) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _no_record(path, f"format {data.get('format')!r}" if isinstance(data, dict) else "no object")
    libraries = data.get("libraries")
    if not isinstance(libraries, dict) or not all(map(_is_library, libraries.items())):
        raise _no_record(path, "libraries that are no names with a SHA-256 each")
    architectures = data.get("architectures")
    if not isinstance(architectures, list) or not all(map(_is_architecture, architectures)):
        raise _no_record(path, "architectures such as sm_90")
    names = ("sources", "version", "cuda", "machine", "made")
    texts: dict[str, Any] = {name: data.get(name) for name in names}
    if wrong := [name for name, value in texts.items() if not _is_text(value)]:
        raise _no_record(path, f"{wrong[0]} that is no text")
    tensorrt = data.get("tensorrt")
    if tensorrt is not None and not (_is_text(tensorrt) and _VERSION.match(tensorrt)):
        raise _no_record(path, "tensorrt that is no version")
    return BuiltPlugin(
        folder=folder,
        architectures=tuple(architectures),
        tensorrt=tensorrt,
        libraries={name: entry["sha256"] for name, entry in libraries.items()},
        **texts,
    )


_ARCHITECTURE = re.compile(r"(sm|compute)_[0-9]{2,4}[a-z]?")
_VERSION = re.compile(r"[0-9]{1,4}(\.|$)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _is_architecture(value: Any) -> bool:
    return isinstance(value, str) and _ARCHITECTURE.fullmatch(value) is not None


def _is_library(item: tuple[str, Any]) -> bool:
    name, entry = item
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    return is_plain_name(name) and isinstance(digest, str) and _SHA256.fullmatch(digest) is not None


def _no_record(path: Path, got: str) -> PluginError:
    what = f"{path} does not describe a build of the plugin"
    return PluginError(what, got=got, expected=f"format {FORMAT}", hint=REBUILD)


def plugin_sources() -> Path:
    """The folder with the plugin's CMakeLists.txt: in the installed package, or in the checkout around it.

    Raises:
        PluginError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "plugin_sources", package.parents[1] / "plugins"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise PluginError(
        "the sources of the plugin are missing from this installation",
        got=f"nothing in {package / 'plugin_sources'}",
        hint="pip install --force-reinstall --no-deps dijiang-export",
    )


def source_files(sources: Path | None = None) -> Iterator[Path]:
    """The files that decide what is built, in a fixed order."""
    sources = sources or plugin_sources()
    for part in _SOURCE_PARTS:
        top = sources / part
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and path.suffix in _SOURCE_SUFFIXES:
                yield path


def source_hash(sources: Path | None = None) -> str:
    """SHA-256, hexadecimal, over the names and contents of `source_files`."""
    sources = sources or plugin_sources()
    digest = hashlib.sha256()
    for path in source_files(sources):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(sources).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def library_hash(path: Path) -> str:
    """SHA-256 of a library, hexadecimal.

    Raises:
        PluginError: it is missing, unreadable, no ordinary file or too large.
    """
    with open_regular(path, most=LIMITS["library"], links=True, error=PluginError) as file:
        try:
            return sha256_of(file)
        except OSError as error:
            raise PluginError(f"cannot read {path}", got=error.strerror) from error


def write_manifest(folder: Path, facts: dict[str, Any], libraries: list[str]) -> None:
    """Write plugin.json beside freshly built libraries.

    Args:
        folder: where they are.
        facts: every field of `BuiltPlugin` but folder and libraries; more are kept for people to read.
        libraries: file names.
    """
    hashes = {
        name: {"sha256": library_hash(folder / name), "bytes": (folder / name).stat().st_size}
        for name in libraries
    }
    data = {"format": FORMAT, **facts, "libraries": hashes}
    (folder / MANIFEST).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _find(name: str, major: int | None, architectures: Sequence[int], cache: Path | None) -> Path:
    every = built_plugins(cache)
    having = [built for built in every if name in built.libraries and not built.is_foreign]
    command = REBUILD + (" --kernels-only" if major is None else "")
    what = "the CUDA kernels are" if major is None else f"the plugin for TensorRT {major} is"
    if not having:
        raise PluginError(
            f"{what} not built",
            got=_others(every, name),
            expected=f"{name} in {cache or cache_folder()}",
            hint=command,
        )
    digest = source_hash()
    current = [built for built in having if (built.sources, built.version) == (digest, __version__)]
    if not current:
        raise PluginError(
            f"{what} stale: they were made from other sources" if major is None else f"{what} stale",
            got=f"a build of version {having[0].version}, sources {having[0].sources[:12]}",
            expected=f"version {__version__}, sources {digest[:12]}",
            hint=command,
        )
    if architectures:
        fitting = [b for b in current if all(runs_on(b.architectures, number) for number in architectures)]
        if not fitting:
            raise PluginError(
                f"{what} not built for this GPU"
                if len(architectures) == 1
                else f"{what} not built for all of these GPUs",
                got=", ".join(current[0].architectures),
                expected=", ".join(f"sm_{number}" for number in architectures),
                hint=command + "".join(f" --architecture {number}" for number in architectures),
            )
        # Machine code before PTX, which the driver would have to compile first.
        current = sorted(
            fitting, key=lambda built: sum(f"sm_{n}" not in built.architectures for n in architectures)
        )
    return current[0].library(name)


def _others(builds: list[BuiltPlugin], name: str) -> str | None:
    """What there is instead of library `name` for this machine, in words."""
    machines = {built.machine for built in builds if built.is_foreign and name in built.libraries}
    found = [f"{name} for {machine}, not for {platform.machine()}" for machine in sorted(machines)]
    versions = {built.tensorrt for built in builds if built.tensorrt is not None and not built.is_foreign}
    if name != KERNELS and versions:
        found.append(f"builds for {', '.join(f'TensorRT {version}' for version in sorted(versions))}")
    return "; ".join(found) or None


def _check_permissions(folder: Path) -> None:
    """Nobody but this user and root may be able to change what is about to be loaded."""
    for path in (folder, folder.parent):
        try:
            status = path.stat()
        except OSError as error:
            raise PluginError(f"cannot read {path}", got=error.strerror, hint=f"{REBUILD} --force") from error
        if status.st_uid not in (os.getuid(), 0):
            raise PluginError(
                f"{path} belongs to another user: nothing is loaded from it",
                got=f"user id {status.st_uid}",
                expected=f"user id {os.getuid()}",
                hint=f"remove it, or set XDG_CACHE_HOME, and run {REBUILD}",
            )
        if status.st_mode & stat.S_IWOTH:
            raise PluginError(
                f"everybody may write to {path}: nothing is loaded from it",
                got=stat.filemode(status.st_mode),
                hint=f"chmod o-w {path}",
            )
