"""What compiles the plugin (nvcc, a C++ compiler, CMake, make, TensorRT's headers), and the GPU it is for.

Only looks; requirements.py decides and says what is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.machine import Gpu, find_gpus, package_version, run_tool

LEAST_CUDA = (12, 0)
LEAST_CMAKE = (3, 22)
LEAST_ARCHITECTURE = 80  # bfloat16 arithmetic and cp.async came with it
TUNED_ARCHITECTURES = (80, 87, 89, 90, 100, 110, 120)
"""As plugins/cmake/Architectures.cmake."""

# What TensorRT the shells are written for: IPluginV2DynamicExt in 8.6, IPluginV3 from 10.3.
TENSORRT_RANGES = "8.6, or 10.3 and newer"

# The CUDA toolkit that first knew an architecture, for hints.
FIRST_CUDA = {80: "11.0", 86: "11.1", 87: "11.4", 89: "11.8", 90: "11.8", 100: "12.8", 103: "12.9",
              110: "13.0", 120: "12.8", 121: "12.9"}  # fmt: skip

SYSTEM = Path("/")
"""Where system folders are looked for; tests have one of their own."""

# The GPU inside, where no driver can be asked (in a container, say): device tree's model -> architecture.
_JETSONS = {"Orin": 87, "Thor": 110}


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler."""

    path: Path
    version: tuple[int, ...]
    """Such as (13, 0)."""
    architectures: tuple[int, ...]
    """Compute capabilities that it knows, as 10 * major + minor, rising."""

    @property
    def root(self) -> Path:
        """The toolkit's folder, the one to set CUDA_HOME to."""
        return self.path.parent.parent

    @property
    def environment(self) -> dict[str, str]:
        """Variables that it needs: pip's packages have libraries where nvcc does not tell the linker."""
        library = self.path.resolve().parent.parent / "lib"
        if (library / "libcudart_static.a").exists() and not library.with_name("lib64").exists():
            others = os.environ.get("LIBRARY_PATH", "")
            return {"LIBRARY_PATH": f"{library}{os.pathsep}{others}".rstrip(os.pathsep)}
        return {}

    @property
    def release(self) -> str:
        """Such as "13.0"."""
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Tool:
    """Another program."""

    path: Path
    version: tuple[int, ...]
    about: str
    """The first line of what `--version` says."""


@dataclass(frozen=True)
class Headers:
    """A folder with NvInfer.h."""

    folder: Path
    version: tuple[int, int, int]

    @property
    def usable(self) -> bool:
        """The plugin can be compiled against it."""
        return self.version[:2] == (8, 6) or self.version >= (10, 3)

    @property
    def renumbered(self) -> bool:
        """They say 8.6.0 and are not, or the other way round: IPluginRegistry declares `deregisterCreator`
        after `loadLibrary` in 8.6.0 (NvInferRuntimeCommon.h at v8.6.0), before it from 8.6.1 on."""
        if self.version[:2] != (8, 6):
            return False
        try:
            text = (self.folder / "NvInferRuntimeCommon.h").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        places = [text.find(f" {name}(") for name in ("deregisterCreator", "loadLibrary")]
        return min(places) >= 0 and (places[0] > places[1]) != (self.version[2] == 0)

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def find_nvccs(environment: Mapping[str, str] = os.environ) -> list[Nvcc]:
    """Every nvcc that answers, the preferred one first.

    Looked for, in this order: $CUDACXX; $CUDA_HOME, $CUDA_PATH; $PATH; /usr/local/cuda, /usr/local/cuda-*,
    newest first; and what pip's nvidia-cuda-nvcc brings, if the runtime's headers are beside it.
    """
    found: dict[Path, Nvcc] = {}
    for path in _nvcc_places(environment):
        resolved = path.resolve()
        if resolved not in found and (nvcc := read_nvcc(path)) is not None:
            found[resolved] = nvcc
    return list(found.values())


def read_nvcc(path: Path) -> Nvcc | None:
    """Ask the nvcc at `path` what it is; None if it does not answer."""
    match = re.search(r"release (\d+(?:\.\d+)*)", run_tool(str(path), "--version") or "")
    if match is None:
        return None
    codes = re.findall(r"\bsm_(\d+)\b", run_tool(str(path), "--list-gpu-code") or "")
    return Nvcc(path, _numbers(match[1]), tuple(sorted({int(code) for code in codes})))


def find_cxx(environment: Mapping[str, str] = os.environ) -> Tool | None:
    """The C++ compiler: $CUDAHOSTCXX, $CXX, else c++, g++ or clang++."""
    for name in (environment.get("CUDAHOSTCXX"), environment.get("CXX"), "c++", "g++", "clang++"):
        if name and (tool := find_tool(name, environment)) is not None:
            return tool
    return None


def find_cmake(environment: Mapping[str, str] = os.environ) -> Tool | None:
    """The newest of the system's CMake and the one that pip installed beside this Python."""
    here = Path(sys.executable).parent / "cmake"
    found = [tool for name in ("cmake", str(here)) if (tool := find_tool(name, environment)) is not None]
    return max(found, key=lambda tool: tool.version >= LEAST_CMAKE, default=None)


def find_make(environment: Mapping[str, str] = os.environ) -> tuple[str, Path] | None:
    """(CMake's name of the generator, the program): make if it is there, else ninja."""
    here = str(Path(sys.executable).parent / "ninja")
    for generator, name in (("Unix Makefiles", "make"), ("Ninja", "ninja"), ("Ninja", here)):
        if path := shutil.which(name, path=environment.get("PATH")):
            return generator, Path(path)
    return None


def find_tool(name: str, environment: Mapping[str, str] = os.environ) -> Tool | None:
    """A program by its name or path; None if it is not there, or does not say its version."""
    path = shutil.which(name, path=environment.get("PATH"))
    said = run_tool(path, "--version") if path else None
    if path is None or not said:
        return None
    first = said.strip().splitlines()[0]
    match = re.search(r"\d+(?:\.\d+)+", re.sub(r"\(.*?\)", "", first))
    return Tool(Path(path), _numbers(match[0]) if match else (), first)


def find_headers(environment: Mapping[str, str] = os.environ, triplet: str | None = None) -> list[Headers]:
    """TensorRT's headers, the preferred first; none twice.

    Looked for, in this order: $TENSORRT_ROOT, /usr/include/<triplet> (Debian packages and JetPack; default:
    this machine's), /usr/include, /usr/local/tensorrt and similar.
    """
    found: dict[Path, Headers] = {}
    for folder in _header_places(environment, triplet):
        headers = read_headers(folder)
        if headers is not None:
            found.setdefault(headers.folder.resolve(), headers)
    return list(found.values())


def read_headers(folder: Path) -> Headers | None:
    """TensorRT's headers in `folder` or in its `include`; None if they are not there."""
    for place in (folder, folder / "include"):
        try:
            text = (place / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # From 10.x on the macros are defined as other macros, which are numbers.
        defined: dict[str, str] = dict(re.findall(r"^#define (\w+) (\w+)", text, re.MULTILINE))
        values: list[str] = []
        for part in ("MAJOR", "MINOR", "PATCH"):
            value = defined.get(f"NV_TENSORRT_{part}", "")
            values.append(defined.get(value, value))
        if all(value.isdigit() for value in values) and (place / "NvInfer.h").is_file():
            return Headers(place, (int(values[0]), int(values[1]), int(values[2])))
    return None


def installed_tensorrt() -> str | None:
    """Version of pip's `tensorrt` package, which has no headers; None if it is not installed."""
    return package_version("tensorrt")


def find_architectures(gpus: tuple[Gpu, ...] | None = None, board: str | None = None) -> tuple[int, ...]:
    """Compute capabilities of this machine's GPUs, as 10 * major + minor; empty if none is found.

    Asks nvidia-smi, then the driver itself (in a process of its own: a broken driver may crash or hang), then
    the name of the board.
    """
    gpus = find_gpus() if gpus is None else gpus
    known = {_capability(gpu.compute_capability) for gpu in gpus} - {None}
    if not known:
        known = set(_ask_driver())
    if not known:
        board = _board() if board is None else board
        known = {number for name, number in _JETSONS.items() if name in board}
    return tuple(sorted(number for number in known if number is not None))


def _ask_driver() -> list[int]:
    command = command_for("dijiang_engines.plugin.capabilities")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) for line in done.stdout.split() if line.isdigit()]


def _board() -> str:
    try:
        return (SYSTEM / "proc/device-tree/model").read_text(errors="replace")
    except OSError:
        return ""


def _capability(text: str | None) -> int | None:
    match = re.fullmatch(r"(\d+)\.(\d)", text or "")
    return 10 * int(match[1]) + int(match[2]) if match else None


def _nvcc_places(environment: Mapping[str, str]) -> Iterator[Path]:
    if compiler := environment.get("CUDACXX"):
        yield Path(compiler)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if root := environment.get(name):
            yield Path(root) / "bin/nvcc"
    if path := shutil.which("nvcc", path=environment.get("PATH")):
        yield Path(path)
    local = SYSTEM / "usr/local"
    yield local / "cuda/bin/nvcc"
    versions = sorted(local.glob("cuda-*"), key=lambda p: _numbers(p.name.partition("-")[2]), reverse=True)
    yield from (folder / "bin/nvcc" for folder in versions)
    for top in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for nvcc in sorted(Path(top).glob("nvidia/cu*/bin/nvcc"), reverse=True):
            if (nvcc.parents[1] / "include/cuda_runtime.h").is_file():
                yield nvcc


def _header_places(environment: Mapping[str, str], triplet: str | None) -> Iterator[Path]:
    if root := environment.get("TENSORRT_ROOT"):
        yield Path(root)
    triplet = triplet or sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    yield SYSTEM / "usr/include" / triplet
    yield SYSTEM / "usr/include"
    for top in ("usr/local", "opt"):
        yield from sorted((SYSTEM / top).glob("[Tt]ensor[Rr][Tt]*"), reverse=True)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
