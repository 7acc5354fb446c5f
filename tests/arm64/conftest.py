"""The arm64 machine and what is compiled for it; support/arm64.py says what decides."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest
from support.arm64 import COMPILER, CUDA, FOLDER, FORM, SYSTEM, Arm, need, one_at_a_time, python

from dijiang_engines.errors import PluginError
from dijiang_engines.plugin import toolchain
from dijiang_engines.plugin.cache import KERNELS, BuiltPlugin, read_manifest, source_hash

collect_ignore_glob = [] if FORM else ["test_*.py"]


@pytest.fixture(scope="session")
def emulator() -> Arm:
    """A kernel that starts qemu for arm64 programs."""
    if platform.machine() == "aarch64":
        pytest.skip("this machine is an arm64 itself: `make test` tests it")
    qemu = shutil.which("qemu-aarch64-static")
    need(None if qemu else "there is no qemu-aarch64-static: apt-get install qemu-user-static")
    arm = Arm(Path(str(qemu)))
    done = arm.start(Path("/"), "/", "true", limit=60)
    need(
        f"this kernel gives a user no binfmt_misc (Linux 6.7 and user namespaces do): {done.stderr.strip()}"
        if done.returncode
        else None
    )
    return arm


@pytest.fixture(scope="session")
def arm(emulator: Arm) -> Arm:
    """The arm64 system, with the package in it."""
    need(None if SYSTEM.is_dir() else f"there is no {SYSTEM}: .ci/fetch_arm64.py says why")
    return emulator


@pytest.fixture(scope="session")
def cross_tools() -> None:
    """What compiles for arm64."""
    if platform.machine() == "aarch64":
        pytest.skip("this machine is an arm64 itself: `make test` compiles for it")
    need(None if shutil.which(COMPILER) else f"there is no {COMPILER}: apt-get install g++-aarch64-linux-gnu")
    need(None if CUDA.is_dir() else f"there is no {CUDA}: .ci/fetch_arm64.py says why")
    need(None if toolchain.find_nvccs() else "there is no nvcc")


@pytest.fixture(scope="session")
def kernels(cross_tools: None) -> BuiltPlugin:
    """The kernels for a Jetson Orin, in the whole form for Thor too, of `build-plugin --target`."""
    folder = FOLDER / "kernels"
    command = ["-m", "dijiang_export", "build-plugin", "--kernels-only", "--architecture", "87"]
    command += ["--architecture", "110"] if FORM == "whole" else []
    with one_at_a_time("kernels"):
        if not is_made(folder):
            python(*command, "--target", str(CUDA), "--output", str(folder))
    return read_manifest(folder)


def is_made(folder: Path) -> bool:
    """True if the kernels are there, of these sources and for the wanted GPUs; others may be reading them."""
    try:
        built = read_manifest(folder)
        built.library(KERNELS)
    except PluginError:
        return False
    return built.sources == source_hash() and ("sm_110" in built.architectures) == (FORM == "whole")
