"""One function measures a GPU's memory for every benchmark, from copies on a stream.

Fakes stand for the GPU: they show what is timed and who asks, not what a GPU's memory does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dijiang_engines.bench.bandwidth import Bandwidth, CudaCopy, measure_gpu_bandwidth
from dijiang_engines.errors import RunnerError
from dijiang_export.bench import memory_rate as bench_memory
from dijiang_export.bench.kernels import gpu as bench_kernels_cuda
from dijiang_export.bench.memory_rate import TorchCopy, memory_rate
from dijiang_export.bench.peers import run as bench_peers_run
from dijiang_export.bench.peers import tools as bench_peers_tools
from dijiang_export.bench.products.gpu import ProductsGpu

CPU = torch.device("cpu")
RATE = 3.21e12


class Copies:
    """Takes the times that it is given, one a copy."""

    size = 1 << 20

    def __init__(self, *milliseconds: float) -> None:
        self.times = list(milliseconds)

    def seconds(self) -> float:
        return self.times.pop(0) / 1e3


def test_the_best_copy_counts_and_the_first_does_not() -> None:
    copies = Copies(1, 5, 2, 4, 9)
    assert measure_gpu_bandwidth(copies, rounds=3) == Bandwidth(0, (2 << 20) / 2e-3, (2 << 20) / 2e-3)
    assert copies.times == [9]


# -- PyTorch's ------------------------------------------------------------------------------------------


class Stream:
    """torch.cuda's events, in the order in which they and copies come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.capturing = False
        log = self.log

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                log.append("event")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, end: object) -> float:
                return 2.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        copy = torch.Tensor.copy_

        def logged(target: Any, source: Any, *more: Any) -> Any:
            log.append(f"copy {source.nbytes}")
            return copy(target, source, *more)

        monkeypatch.setattr(torch.Tensor, "copy_", logged)


def test_pytorchs_copy_is_whole_alone_and_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    copy = TorchCopy(CPU, 4096)
    copy.target.zero_()
    assert copy.seconds() == 2e-3
    assert stream.log == ["event", "copy 4096", "event", "wait"]
    assert torch.equal(copy.target, copy.source)
    assert copy.target.data_ptr() != copy.source.data_ptr()


def test_a_copy_that_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)
    stream.capturing = True
    with pytest.raises(RunnerError, match="memory's rate") as error:
        measure_gpu_bandwidth(TorchCopy(CPU, 64))
    assert "CUDA graph" in str(error.value.got)
    assert stream.log == []


def test_both_adapters_copy_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured with and without PyTorch is the same copy."""
    made: list[int] = []
    cuda: Any = SimpleNamespace(
        buffer=lambda size: made.append(size) or SimpleNamespace(address=0),  # type: ignore[func-returns-value]
        stream=lambda: SimpleNamespace(fill=lambda *a: None),
        event=lambda timing: None,
    )
    monkeypatch.setattr(torch, "ones", lambda size, **_: made.append(size) or np.zeros(0))  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch, "empty_like", lambda source: source)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: None)
    CudaCopy(cuda)
    TorchCopy(CPU)
    assert made == [1 << 30] * 3


# -- who asks -------------------------------------------------------------------------------------------


@pytest.fixture
def fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with a rate of RATE; another way of measuring would not find it."""
    for module in (bench_memory, bench_kernels_cuda):
        monkeypatch.setattr(module, "TorchCopy", lambda device: SimpleNamespace(size=1 << 30, device=device))
        monkeypatch.setattr(module, "measure_gpu_bandwidth", lambda copy: Bandwidth(0, RATE, RATE))


@pytest.mark.usefixtures("fixed_rate")
def test_bench_kernels_takes_its_ceiling_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = object.__new__(bench_kernels_cuda.Gpu)
    gpu.dtype, gpu.device = "float32", CPU
    monkeypatch.setattr(bench_kernels_cuda, "MATRIX", 4)
    monkeypatch.setattr(bench_kernels_cuda, "_time_calls", lambda call: SimpleNamespace(median=1.0))
    assert gpu.ceilings()["copy"] == {"bytes": 2 << 30, "per_second": RATE}


@pytest.mark.usefixtures("fixed_rate")
def test_bench_peers_takes_its_rate_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    settings: Any = SimpleNamespace(
        threads=torch.get_num_threads(), device="cuda", decodes=list, prefills=list
    )
    monkeypatch.setattr(bench_peers_tools, "open_device", lambda name: torch.device(name))
    monkeypatch.setattr(bench_peers_tools, "describe_gpu", lambda device: {"name": "a GPU"})
    with pytest.raises(RuntimeError, match="enough"):
        bench_peers_run.measure("hf-eager", settings, lambda **what: said.append(what) or _stop(what))  # type: ignore[func-returns-value]
    assert {"threads": 0, "read": RATE, "copy": RATE} in [each.get("bandwidth") for each in said]


def _stop(what: dict[str, Any]) -> None:
    if what.get("begin") == "making the model":
        raise RuntimeError("enough")


@pytest.mark.usefixtures("fixed_rate")
def test_the_benchmarks_by_cells_take_their_floors_from_it() -> None:
    gpu: Any = object.__new__(ProductsGpu)
    gpu.device = torch.device("cuda")
    assert gpu.rate() == RATE


def test_a_cpu_is_measured_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "measure_bandwidth", lambda threads: Bandwidth(threads, 2.0, 1.0))
    assert memory_rate(CPU, 3) == Bandwidth(3, 2.0, 1.0)
