"""Facts about this machine and its packages, and what this process may use of it.

For `doctor`, for the record beside each measurement, and for whoever shares out threads and memory: those
are counted within the container's limits. Reads files under /proc and /sys, package metadata, and what
nvidia-smi says. Imports no runtime.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dijiang_engines.errors import UsageError

# Instruction sets that decide how fast matrix kernels are, as /proc/cpuinfo spells them.
_NOTABLE_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd",
    "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip

TOOL_SECONDS = 20

Spinning = Literal["auto", "on", "off"]
SPINNING: tuple[Spinning, ...] = ("auto", "on", "off")
SPINNING_ENVIRONMENT = "DIJIANG_SPINNING"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver describes it."""

    name: str
    memory_bytes: int | None
    driver: str | None
    compute_capability: str | None
    """Such as "9.0"."""


@dataclass(frozen=True)
class Machine:
    """What measurements and advice depend on."""

    system: str
    architecture: str
    python: str
    cpu: str
    logical_cpus: int
    """Of the machine."""
    usable_cpus: int
    """That this process may run on, after affinity and container limits; at least 1."""
    cpu_features: tuple[str, ...]
    memory_bytes: int | None
    available_bytes: int | None
    """Of the machine; `available_memory` is what a container leaves of them."""
    gpus: tuple[Gpu, ...]
    board: str | None
    """The device tree's model name (a Jetson, for one)."""


def describe_machine() -> Machine:
    """Look at this machine; takes as long as nvidia-smi does."""
    name, flags = _cpu()
    memory = _meminfo()
    return Machine(
        system=_system(),
        architecture=platform.machine(),
        python=platform.python_version(),
        cpu=name,
        logical_cpus=os.cpu_count() or 1,
        usable_cpus=usable_cpus(),
        cpu_features=tuple(flag for flag in _NOTABLE_FLAGS if flag in flags),
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        gpus=find_gpus(),
        board=_board(),
    )


def usable_cpus() -> int:
    """CPUs that this process may keep busy: its affinity, and its container's quota rounded up."""
    return int(min(_cores(), _quota()))


def container_threads() -> int:
    """Threads that the container's CPU quota allows, or 0 (ONNX Runtime chooses) if it allows every core.

    ONNX Runtime counts cores and does not see quotas; more spinning threads than a quota allows make
    every step wait for the scheduler.
    """
    usable = usable_cpus()
    return usable if usable < _cores() else 0


def available_memory() -> float:
    """Bytes that can be had without swapping, within the container's limit; infinity if unknown."""
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    left = math.inf if limit is None or used is None else limit - used
    return min(_meminfo().get("MemAvailable", math.inf), left)


def spinning_choice(given: str | None) -> Spinning:
    """Whether ONNX Runtime's threads wait busily for work.

    Threads that spin are there at once when the next operator needs them, and take the cores from whatever
    else wants them meanwhile: other processes, or the other threads of a shared machine, which then also
    make every step wait.

    Args:
        given: "on", "off", or "auto", which leaves it to ONNX Runtime: it spins. None: what the environment
            variable DIJIANG_SPINNING says, else "auto".

    Raises:
        UsageError: another value.
    """
    value = os.environ.get(SPINNING_ENVIRONMENT) or "auto" if given is None else given
    if value not in SPINNING:
        where = f" in the environment variable {SPINNING_ENVIRONMENT}" if given is None else ""
        raise UsageError(
            f"unknown value for spinning{where}", got=repr(value)[:80], expected=", ".join(SPINNING)
        )
    return value


def find_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs, if nvidia-smi is there and answers."""
    fields = "name,memory.total,driver_version,compute_cap"
    answer = run_tool("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    gpus = []
    for line in (answer or "").splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 4:
            continue
        memory = int(cells[1]) << 20 if cells[1].isdigit() else None
        known = [None if not cell or cell.startswith("[") else cell for cell in cells]
        gpus.append(Gpu(cells[0], memory, known[2], known[3]))
    return tuple(gpus)


def run_tool(name: str, *arguments: str) -> str | None:
    """The standard output of a program, or None if it is absent, fails or hangs."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def package_version(distribution: str) -> str | None:
    """The installed version of a distribution, None if it is not installed; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those of `distributions` that are installed."""
    found = {name: package_version(name) for name in distributions}
    return {name: version for name, version in found.items() if version is not None}


def _system() -> str:
    try:
        pretty = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        pretty = ""
    kernel = f"{platform.system()} {platform.release()}"
    return f"{pretty}, {kernel}" if pretty else kernel


def _cpu() -> tuple[str, set[str]]:
    name, flags = "", set[str]()
    for line in _text("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key in ("model name", "hardware") and not name:
            name = value.strip()
        elif key in ("flags", "features") and not flags:
            flags = set(value.split())
    return name or platform.processor() or platform.machine(), flags


def _cores() -> int:
    """That this process may run on, whatever its container's quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float:
    """CPUs that the container may keep busy, rounded up; infinity if nothing (of cgroup v2) limits them."""
    match = re.match(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max"))
    if match is None or not int(match[2]):
        return math.inf
    return max(1, -(-int(match[1]) // int(match[2])))


def _meminfo() -> dict[str, int]:
    """MemTotal and MemAvailable in bytes, where the system says so."""
    lines = re.finditer(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return {line[1]: int(line[2]) << 10 for line in lines}


def _number(path: str) -> int | None:
    """A file that holds one number; None if it holds a word, such as "max", or is not there."""
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _board() -> str | None:
    return _text("/proc/device-tree/model").rstrip("\0\n") or None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
