"""dijiang_step compiled for the host: the kernel, its packing, its checks (tests/kernels/step_emulation)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from support.paths import ROOT
from support.step_models import EmulatedKernels

from dijiang_engines.plugin import toolchain


def cuda_include() -> Path | None:
    """CUDA's headers."""
    for nvcc in toolchain.find_nvccs():
        for include in (nvcc.root / "include", *nvcc.root.glob("targets/*/include")):
            if (include / "cuda_fp16.h").exists():
                return include
    return None


def missing() -> str | None:
    """Why it cannot be compiled here."""
    if os.environ.get("DIJIANG_TEST_COMPILE") != "0" and shutil.which("g++") and cuda_include():
        return None
    return "no C++ compiler, or no headers of CUDA"


def compile_emulated(folder: Path) -> EmulatedKernels:
    """Compile and load it.

    Args:
        folder: for the library.
    """
    target, include = folder / "libstep_emulated.so", cuda_include()
    kernels, here = ROOT / "plugins/kernels", ROOT / "tests/kernels/step_emulation"
    sources = [here / "library.cpp", kernels / "step/plan.cpp", kernels / "step/api.cpp"]
    sources += [kernels / "host" / name for name in ("errors.cpp", "arguments.cpp", "api.cpp")]
    done = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-DDIJIANG_EMULATED",
         *(f"-I{path}" for path in (here, ROOT / "plugins/include", kernels, include)), *sources,
         "-o", target],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return EmulatedKernels(target)
