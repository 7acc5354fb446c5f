"""The GPU side of `bench kernels`: CUDA graphs, their timing, and the two ceilings.

Every contestant is timed the same way: a CUDA graph of many calls is replayed between two events, and the
time of one call is the replay's over the number of calls. Two figures each:

    rotated   the calls go round several sets of tensors, together three times the L2 cache, as the layers
              of a model do: what a call reads is in device memory
    single    all calls use one set: whatever fits the cache stays there
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from dijiang_engines.bench.bandwidth import measure_gpu_bandwidth
from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_export.bench.kernels.cells import Cell, Dtype, Shape, buffer_sets, cell_bytes
from dijiang_export.bench.kernels.inputs import Call, Layer, make_calls, make_layer, within
from dijiang_export.bench.kernels.peers import Contestant, Prepared, in_short
from dijiang_export.bench.memory_rate import TorchCopy
from dijiang_export.reference.model import DTYPES

WARM_UPS = 3
LEAST_SAMPLES = 7
DECODE_CALLS, PREFILL_CALLS = 128, 16
"""Least calls in a graph: enough that the two events do not count."""
MATRIX = 8192
CEILING_SAMPLES = 30


@dataclass(frozen=True)
class Measured:
    """One contestant at one cell. `rotated` and `single` are absent where its results were wrong."""

    errors: dict[str, float]
    right: bool
    rotated: Timing | None = None
    single: Timing | None = None
    sets: int = 0
    calls: int = 0
    note: str | None = None


class Gpu:
    """The current CUDA device.

    Raises:
        RunnerError: there is none.
    """

    def __init__(self, dtype: Dtype) -> None:
        if not torch.cuda.is_available():
            raise RunnerError(
                "bench kernels needs an NVIDIA GPU",
                got=f"PyTorch {torch.__version__} that sees none",
                hint="`dijiang-export doctor` shows what is there; --from FILE draws a record without a GPU",
            )
        self.dtype = dtype
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._layers: dict[Shape, Layer] = {}

    def describe(self) -> dict[str, Any]:
        """Name and sizes, for the record."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
        }

    @property
    def l2_bytes(self) -> int:
        """Size of the last cache before device memory."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def ceilings(self) -> dict[str, Any]:
        """Rates of a large copy (bytes read and written) and of a large matrix product, per second."""
        copy = TorchCopy(self.device)
        rate = measure_gpu_bandwidth(copy).copy
        a, b = (torch.randn(MATRIX, MATRIX, device=self.device).to(DTYPES[self.dtype]) for _ in "ab")
        product = _time_calls(lambda: a @ b)
        return {
            "copy": {"bytes": 2 * copy.size, "per_second": rate},
            "matmul": {"size": MATRIX, "timing": product, "per_second": 2 * MATRIX**3 / product.median},
        }

    def measure(
        self, cell: Cell, contestants: Sequence[Contestant], seconds: float
    ) -> dict[str, Measured | str]:
        """All contestants at one cell, on the same inputs, one after the other.

        Args:
            cell: the size.
            contestants: who; they get ready here.
            seconds: for each contestant's figure.

        Returns:
            By name, what was measured, or the reason why it was not.
        """
        layer = self._layers.setdefault(cell.shape, make_layer(cell.shape, self.device))
        sets = buffer_sets(cell_bytes(cell, self.dtype).op, self.l2_bytes)
        calls = make_calls(cell, DTYPES[self.dtype], self.device, sets)
        found: dict[str, Measured | str] = {}
        with torch.no_grad():
            for contestant in contestants:
                try:
                    found[contestant.name] = self._one(contestant, cell, layer, calls, seconds)
                except DijiangError as error:
                    found[contestant.name] = "; ".join(x for x in (error.what, error.got) if x)
                except Exception as error:  # noqa: BLE001 - others' code; the other figures still count
                    found[contestant.name] = f"failed: {in_short(error)}"
                torch.cuda.empty_cache()
        return found

    def _one(
        self, contestant: Contestant, cell: Cell, layer: Layer, calls: Sequence[Call], seconds: float
    ) -> Measured:
        prepared = contestant.prepare(cell, layer, calls)
        errors = prepared.check()
        if not within(errors, self.dtype):
            return Measured(errors, right=False, note=prepared.note)
        least = DECODE_CALLS if cell.phase == "decode" else PREFILL_CALLS
        rounds = -(-least // len(calls))
        rotated = time_graph(prepared, list(range(len(calls))) * rounds, seconds, keep=len(calls))
        single = time_graph(prepared, [0] * least, seconds, keep=1)
        return Measured(
            errors, True, rotated, single, sets=len(calls), calls=rounds * len(calls), note=prepared.note
        )


def time_graph(prepared: Prepared, order: Sequence[int], seconds: float, *, keep: int) -> Timing:
    """Seconds of one call, from replays of a graph of calls on the sets in `order`.

    Args:
        prepared: whose calls.
        order: which set each call of the graph uses.
        seconds: about how long to replay.
        keep: how many calls' results stay allocated at a time, so that a contestant which allocates its
            results writes to as many different places as it reads from.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UPS):
            prepared.run(order[i % len(order)])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []
    with torch.cuda.graph(graph):
        for index, i in enumerate(order):
            if index >= keep:
                kept[index - keep] = None
            kept.append(prepared.run(i))
    samples = [s / len(order) for s in _samples(graph.replay, seconds)]
    del graph, kept
    return Timing.of(samples)


def _samples(call: Callable[[], Any], seconds: float) -> Iterator[float]:
    """Seconds of single calls by CUDA's events, after warm-ups."""
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    until, count = time.perf_counter() + seconds, 0
    while count < LEAST_SAMPLES or time.perf_counter() < until:
        start.record()
        call()
        stop.record()
        stop.synchronize()
        yield cast(float, start.elapsed_time(stop)) / 1e3
        count += 1


def _time_calls(call: Callable[[], Any]) -> Timing:
    samples = _samples(call, 0.15)
    return Timing.of([s for s, _ in zip(samples, range(CEILING_SAMPLES), strict=False)])


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products stay float32 for the length of the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
