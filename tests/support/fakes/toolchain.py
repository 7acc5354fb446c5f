"""A CUDA toolkit, CMake and compilers that compile nothing: to test what `build-plugin` does around them.

It proves orchestration only; that the sources compile is plugin_builds.py's to show.
FAKE_CMAKE in the environment makes cmake misbehave: "configure-fails", "compile-fails", "makes-nothing",
"other-processor" (a library that starts as FAKE_LIBRARY says), or "hangs" (until it is killed). Every call is
one line in calls.txt.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

TENSORRT = (10, 13, 3)
_PYTHON = sys.executable  # tests make it name another

_CMAKE = """#!{python}
import os, pathlib, re, sys, time
here = pathlib.Path(__file__).parent
mode = os.environ.get("FAKE_CMAKE", "")
arguments = sys.argv[1:]
with open(here / "calls.txt", "a") as calls:
    calls.write(" ".join(arguments) + "\\n")
if arguments == ["--version"]:
    print("cmake version {cmake}")
elif "-S" in arguments:
    if mode == "configure-fails":
        print("CMake Error at CMakeLists.txt:7 (message):\\n  there is no TensorRT here\\n")
        sys.exit(1)
    work = pathlib.Path(arguments[arguments.index("-B") + 1])
    work.mkdir(parents=True)
    (work / "defines.txt").write_text("\\n".join(a for a in arguments if a.startswith("-D")))
else:
    work = pathlib.Path(arguments[1])
    defines = dict(line[2:].split("=", 1) for line in (work / "defines.txt").read_text().splitlines())
    print("[ 50%] Building CUDA object kernels.cu.o", flush=True)
    if mode == "compile-fails":
        print("/src/decode.cu(12): error: identifier \\"foo\\" is undefined")
        print("/src/decode.cu(40): error: expected a \\";\\"")
        print("make[2]: *** [decode.cu.o] Error 1")
        sys.exit(2)
    if mode == "hangs":
        (here / "hanging").write_text(str(os.getpid()))
        time.sleep(600)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if mode != "makes-nothing":
        code = os.urandom(16).hex()  # two builds differ
        (work / "libdijiang_kernels.so").write_text(f"kernels {{code}}")
        if mode == "other-processor":
            (work / "libdijiang_kernels.so").write_bytes(bytes.fromhex(os.environ["FAKE_LIBRARY"]))
        include = defines["TENSORRT_INCLUDE"]
        if include:
            text = pathlib.Path(include, "NvInferVersion.h").read_text()
            major = re.search(r"MAJOR\\w* (\\d+)", text)[1]
            (work / f"libdijiang_tensorrt_{{major}}.so").write_text(f"plugin {{code}}")
        (work / "resource-report.txt").write_text("none\\n")
    print("[100%] Built target dijiang_kernels")
"""

_NVCC = """#!/bin/sh
case "$1" in
--version) echo 'Cuda compilation tools, release {version}, V{version}.99' ;;
--list-gpu-code) printf 'sm_%s\\n' {architectures} ;;
*) exit 1 ;;
esac
"""


class FakeToolchain:
    """Programs under `folder`/bin, and an otherwise empty system."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.system = folder / "system"
        self.cache = folder / "cache"
        self.variables: dict[str, str] = {}
        self.bin.mkdir(parents=True)
        self.system.mkdir()
        self.nvcc()
        self.cmake()
        for name in ("c++", "make"):
            self.program(name, f"#!/bin/sh\necho '{name} (Test) 12.2.0'\n")

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it: nothing else of this machine's toolchain is in it."""
        programs = {"CUDACXX": str(self.bin / "nvcc"), "CXX": str(self.bin / "c++")}
        return {"PATH": str(self.bin), "XDG_CACHE_HOME": str(self.cache), **programs, **self.variables}

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def nvcc(self, version: str = "12.6", architectures: str = "80 87 89 90") -> None:
        self.program("nvcc", _NVCC.format(version=version, architectures=architectures))

    def cmake(self, version: str = "3.25.1") -> None:
        self.program("cmake", _CMAKE.format(python=_PYTHON, cmake=version))

    def cross_compiler(self, name: str = "aarch64-linux-gnu-g++", triplet: str = "aarch64-linux-gnu") -> Path:
        """A C++ compiler for another kind of processor."""
        return self.program(
            name,
            f"#!/bin/sh\n[ \"$1\" = -dumpmachine ] && echo {triplet} || echo '{name} (Test) 12.2.0'\n",
        )

    def headers(self, version: tuple[int, int, int] = TENSORRT, folder: Path | None = None) -> Path:
        folder = folder or self.system / "opt/TensorRT/include"
        write_headers(folder, version)
        return folder

    def gpu(self, capability: str = "8.7") -> None:
        self.program("nvidia-smi", f"#!/bin/sh\necho 'NVIDIA Test, 16000, 555.1, {capability}'\n")

    @property
    def compiled(self) -> int:
        """How many times something was compiled."""
        calls = self.bin / "calls.txt"
        return calls.read_text().count("--build") if calls.exists() else 0

    def leftovers(self) -> list[str]:
        """What is in the cache that is no build."""
        plugin = self.cache / "dijiang-export/plugin"
        if not plugin.exists():
            return []
        return sorted(p.name for p in plugin.iterdir() if not (p / "plugin.json").exists())


def write_headers(folder: Path, version: tuple[int, int, int]) -> None:
    """The two files that say which TensorRT a folder is of, written as that version writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for part, number in zip(("MAJOR", "MINOR", "PATCH"), version, strict=True):
        if version < (10, 8):
            lines.append(f"#define NV_TENSORRT_{part} {number} //!< TensorRT {part.lower()} version.")
        else:
            lines.append(f"#define TRT_{part}_ENTERPRISE {number}")
            lines.append(f"#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< TensorRT version.")
    (folder / "NvInferVersion.h").write_text("\n".join(lines) + "\n")
    (folder / "NvInfer.h").write_text('#include "NvInferVersion.h"\n')


def without_tools() -> dict[str, str]:
    """This environment without the variables that name compilers."""
    names = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "CXX", "TENSORRT_ROOT")
    return {k: v for k, v in os.environ.items() if k not in names}
