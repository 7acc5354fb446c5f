"""The kernels, compiled once for all tests, into the folder that `make plugin` uses too.

DIJIANG_KERNELS             names a built libdijiang_kernels.so: nothing is compiled
DIJIANG_TEST_COMPILE        0: compile nothing, skip what needs it
DIJIANG_TEST_ARCHITECTURES  such as "80-real;90": compile for fewer GPUs, the last with PTX, into a folder of
                            their own; default: all
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT


def missing_tool() -> str | None:
    """Why nothing can be compiled here, or None."""
    from dijiang_engines.plugin import toolchain

    if os.environ.get("DIJIANG_TEST_COMPILE") == "0":
        return "DIJIANG_TEST_COMPILE is 0"
    if not toolchain.find_nvccs():
        return "no nvcc"
    cmake = toolchain.find_cmake()
    if cmake is None or cmake.version < toolchain.LEAST_CMAKE:
        return "no CMake of at least 3.22"
    if toolchain.find_cxx() is None or toolchain.find_make() is None:
        return "no C++ compiler, or no make"
    return None


needs_nvcc = pytest.mark.skipif(
    missing_tool() is not None, reason=f"cannot compile CUDA here: {missing_tool()}"
)


@cache
def build_folder() -> Path:
    """Compile what changed since the last time; the folder with the library and the resource report."""
    architectures = os.environ.get("DIJIANG_TEST_ARCHITECTURES", "")
    folder = ROOT / "build" / ("plugin" if not architectures else "plugin-" + architectures.replace(";", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["-S", ROOT / "plugins", "-B", folder, "-DDIJIANG_WARNINGS_AS_ERRORS=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", *configure)
        run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1))
    return folder


def run(program: str, *arguments: str | Path) -> str:
    """Output of a tool that must succeed."""
    path = shutil.which(program)
    assert path is not None, f"there is no {program}"
    done = subprocess.run(
        [path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def kernels() -> Path:
    """libdijiang_kernels.so; skips the test where it can neither be found nor compiled."""
    named = os.environ.get("DIJIANG_KERNELS")
    if named:
        return Path(named)
    reason = missing_tool()
    if reason is not None:
        pytest.skip(f"no compiled kernels (DIJIANG_KERNELS), and none can be compiled here: {reason}")
    return build_folder() / "libdijiang_kernels.so"
