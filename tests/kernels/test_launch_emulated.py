"""How kernels are launched, with CUDA's rule for shared memory emulated: what is asked for, and how often."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from support.linear_emulator import compiled

SUCCESS, INVALID_VALUE = 0, 1
MOST = 227 * 1024


class Launches:
    """plugins/tests/emulator/launch.cpp: kernels that do nothing, with some static shared memory."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._kept: list[ctypes.c_int] = []

    def kernel(self, static: int) -> ctypes.c_int:
        self._kept.append(ctypes.c_int(static))
        return self._kept[-1]

    def launch(
        self, kernel: ctypes.c_int, dynamic: int, device: int = 0, cluster: int = 1, overlap: bool = False
    ) -> int:
        return int(
            self._library.emulated_launch(
                ctypes.byref(kernel), device, ctypes.c_int64(dynamic), cluster, int(overlap)
            )
        )

    @property
    def asked(self) -> int:
        return int(self._library.emulated_asked())

    @property
    def last(self) -> tuple[int, int]:
        """Blocks of the last launch's cluster, 0 without; whether it may overlap."""
        cluster, overlap = ctypes.c_int(), ctypes.c_int()
        self._library.emulated_last(ctypes.byref(cluster), ctypes.byref(overlap))
        return cluster.value, overlap.value


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    sources = ("tests/emulator/launch.cpp", "kernels/host/launch.cpp")
    return Launches(compiled(tmp_path_factory.mktemp("launch") / "launch.so", sources))


@pytest.mark.parametrize(
    ("static", "dynamic"),
    [(16688, 40960), (0, 48 * 1024), (0, 49 * 1024), (48 * 1024, 0), (30000, 200000), (0, MOST)],
)
def test_static_and_dynamic_memory_count_together(launches: Launches, static: int, dynamic: int) -> None:
    """The first is attention's step in float32 with heads of 80 and many rows."""
    assert launches.launch(launches.kernel(static), dynamic) == SUCCESS


def test_more_than_there_is(launches: Launches) -> None:
    assert launches.launch(launches.kernel(16688), MOST - 16688) == SUCCESS
    assert launches.launch(launches.kernel(16688), MOST - 16687) == INVALID_VALUE


def test_cuda_is_asked_once_for_a_kernel_and_a_device(launches: Launches) -> None:
    kernel, none = launches.kernel(16688), launches.kernel(1000)
    before = launches.asked
    for dynamic in (40960, 1000, 100000, 40960):
        assert launches.launch(kernel, dynamic) == SUCCESS
    assert launches.asked == before + 1
    assert launches.launch(kernel, 40960, device=1) == SUCCESS
    assert launches.launch(kernel, 40960, device=0) == SUCCESS
    assert launches.asked == before + 2
    assert launches.launch(none, 0) == SUCCESS
    assert launches.asked == before + 2


def test_clusters_and_overlap(launches: Launches) -> None:
    kernel = launches.kernel(0)
    for cluster, overlap, expected in ((1, False, 0), (1, True, 0), (8, False, 8), (2, True, 2)):
        assert launches.launch(kernel, 0, cluster=cluster, overlap=overlap) == SUCCESS
        assert launches.last == (expected, int(overlap))
