"""What the tests for arm64 share; tests/arm64. `make test-arm64` fetches what they need into build/arm64.

DIJIANG_ARM64             whole, short (what CI takes the time for); not set: nothing here is collected
DIJIANG_TENSORRT_INCLUDE  folders with TensorRT's headers, with colons between: for the plugin

What is missing skips a test: not every machine has a cross compiler, an emulator, or packages for arm64.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.makers.plugin_builds import run
from support.paths import ROOT, TESTS

FORM = os.environ.get("DIJIANG_ARM64", "")
FOLDER = ROOT / "build/arm64"
CUDA = FOLDER / "cuda"
SYSTEM = FOLDER / "root"
HEADERS = [Path(folder) for folder in os.environ.get("DIJIANG_TENSORRT_INCLUDE", "").split(":") if folder]
ENTER = TESTS / "arm64/enter.sh"
CPU = "cortex-a76"
"""What qemu 7.2 has that is nearest to an Orin's Cortex-A78AE: Armv8.2, half precision, dot products."""
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = COMPILER.removesuffix("g++")
CEILINGS = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12,)}
"""Ubuntu 22.04's, which is JetPack 6's: glibc 2.35, libstdc++ of GCC 12 (the table of symbol versions in the
"ABI Policy and Guidelines" of libstdc++'s manual)."""
SYSROOT = Path("/usr/aarch64-linux-gnu")
"""Where Debian's cross compiler has its libraries."""

whole = pytest.mark.skipif(FORM != "whole", reason="in the whole form alone: make test-arm64")


def need(reason: str | None) -> None:
    """Skip the test, if there is a reason to."""
    if reason is not None:
        pytest.skip(reason)


def check_symbols(library: Path) -> None:
    """No symbol is newer than Ubuntu 22.04, and no library is needed that it does not have."""
    out = run(f"{TOOLS}objdump", "--dynamic-syms", library)
    asked = {
        (name, tuple(int(part) for part in version.split(".")))
        for name, version in re.findall(r"\*UND\*.*?\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\b", out)
    }
    assert {name for name, _ in asked} >= {"GLIBC", "GLIBCXX"}
    assert [(name, version) for name, version in sorted(asked) if version > CEILINGS[name]] == []
    needed = re.findall(r"NEEDED.*\[(.*?)\]", run(f"{TOOLS}readelf", "--dynamic", library))
    allowed = r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux[\w-]*)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Several processes run the tests; one of them makes what all use."""
    with (FOLDER / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Arm:
    """Runs programs for arm64."""

    qemu: Path

    def run(self, *command: str | Path, folder: str = "/", limit: float = 900, **variables: str) -> str:
        """Standard output of a command in the arm64 system, which must succeed."""
        given = [f"{name}={value}" for name, value in variables.items()]
        done = self.start(SYSTEM, folder, "env", *given, *command, limit=limit)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def start(
        self, root: Path, folder: str | Path, *command: str | Path, limit: float, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """enter.sh says what happens."""
        environment = os.environ | {
            "QEMU": str(self.qemu), "QEMU_CPU": CPU, "CPUINFO": str(ENTER.with_name("cpuinfo")),
            "CHECKOUT": str(ROOT),
        }  # fmt: skip
        return subprocess.run(
            [ENTER, root, folder, *command], env=environment | variables, text=True, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=limit,
        )  # fmt: skip


def python(*arguments: str) -> str:
    """Standard output of this machine's Python with the checkout's packages. Its cache is in build/arm64."""
    environment = os.environ | {"XDG_CACHE_HOME": str(FOLDER / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, text=True, check=False, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
