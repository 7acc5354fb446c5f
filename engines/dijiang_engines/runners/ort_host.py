"""What this process may use of its host: threads and memory, within the container's limits."""

from __future__ import annotations

import math
import os
from pathlib import Path


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
