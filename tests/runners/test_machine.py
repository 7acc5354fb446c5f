"""What a process may use of its host: one reading of each file, whoever asks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest

from dijiang_engines import machine

CPU, MEMORY = "/sys/fs/cgroup/cpu.max", "/proc/meminfo"
LIMIT, USED = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"

Host = Callable[..., Counter[str]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """host({path: text}, cores=8): a machine that holds these files; returns how often each was read."""

    def make(files: dict[str, str], cores: int = 8) -> Counter[str]:
        read: Counter[str] = Counter()

        def text(path: str) -> str:
            read[path] += 1
            return files.get(path, "")

        monkeypatch.setattr(machine, "_text", text)
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        return read

    return make


@pytest.mark.parametrize(
    ("quota", "usable", "threads"),
    [
        ("", 8, 0),  # no cgroup v2
        ("max 100000\n", 8, 0),
        ("200000 100000\n", 2, 2),
        ("150000 100000\n", 2, 2),  # rounded up
        ("10000 100000\n", 1, 1),
        ("800000 100000\n", 8, 0),  # as many as there are: ONNX Runtime counts them itself
        ("9900000 100000\n", 8, 0),
        ("200000 0\n", 8, 0),  # no sense: no quota
        ("nonsense\n", 8, 0),
    ],
)
def test_cpus_and_threads_are_counted_alike(host: Host, quota: str, usable: int, threads: int) -> None:
    host({CPU: quota})
    assert (machine.usable_cpus(), machine.container_threads()) == (usable, threads)


def test_one_core_needs_no_limit(host: Host) -> None:
    host({CPU: "50000 100000\n"}, cores=1)
    assert (machine.usable_cpus(), machine.container_threads()) == (1, 0)


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, math.inf),
        ({MEMORY: "MemTotal:  100 kB\nMemAvailable:  50 kB\n"}, 50 << 10),
        ({MEMORY: "MemAvailable:  50 kB\n", LIMIT: "max\n", USED: "5\n"}, 50 << 10),
        ({MEMORY: "MemAvailable:  50 kB\n", LIMIT: "30000\n", USED: "20000\n"}, 10000),
        ({MEMORY: "MemAvailable:  50 kB\n", LIMIT: "99999999\n", USED: "20000\n"}, 50 << 10),
        ({MEMORY: "MemAvailable:  50 kB\n", LIMIT: "30000\n"}, 50 << 10),
        ({LIMIT: "30000\n", USED: "20000\n"}, 10000),
    ],
)
def test_memory_is_what_the_container_leaves(host: Host, files: dict[str, str], available: float) -> None:
    host(files)
    assert machine.available_memory() == available


def test_each_file_is_read_in_one_way(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks: `_text` reads, so what `doctor` shows is what runners go by."""
    read = host({CPU: "200000 100000\n", MEMORY: "MemTotal:  100 kB\nMemAvailable:  50 kB\n"})
    monkeypatch.setattr(machine, "find_gpus", lambda: ())
    found = machine.describe_machine()
    assert (found.usable_cpus, found.memory_bytes, found.available_bytes) == (2, 100 << 10, 50 << 10)
    assert read[CPU] == read[MEMORY] == 1
    assert machine.container_threads() == found.usable_cpus
    assert machine.available_memory() == found.available_bytes
    assert read[CPU] == read[MEMORY] == 2


def test_this_machine_s_numbers_make_sense() -> None:
    assert machine.usable_cpus() >= 1 and machine.container_threads() >= 0
    assert machine.available_memory() > 1 << 20
