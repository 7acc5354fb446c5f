"""What this process may use of its host: threads, idle cores, and memory, within the container's limits."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

from dijiang_engines.errors import UsageError

Spinning = Literal["auto", "on", "off"]
SPINNING: tuple[Spinning, ...] = ("auto", "on", "off")
SPINNING_ENVIRONMENT = "DIJIANG_SPINNING"


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


def container_threads() -> int:
    """Threads that the container's CPU quota allows, or 0 (ONNX Runtime chooses) if there is no quota.

    ONNX Runtime counts cores and does not see quotas; more spinning threads than a quota allows make
    every step wait for the scheduler.
    """
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed) if allowed < cores else 0


def available_memory() -> float:
    """Bytes that can be had without swapping, within the container's limit; infinity if unknown."""
    amounts = [math.inf]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        amounts.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(amounts)
