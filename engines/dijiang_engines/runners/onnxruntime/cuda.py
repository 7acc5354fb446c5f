"""What ONNX Runtime needs on CUDA beyond a session: its libraries, zeroed memory, and steps as CUDA graphs.

ONNX Runtime captures a graph per `gpu_graph_id`: the first run with an id runs the step two or three times
(to allocate, then to capture) and once more as a graph; later runs only launch the graph, on the addresses
that it saw. So whatever a step reads or writes has one address for good, and past and present are two
buffers: a first run that updated one in place would advance the state several times.

A captured copy from host memory reads that memory again at each launch, and ONNX Runtime gives it to
others meanwhile (microsoft/onnxruntime#32121), so only graphs that are lowered without such copies are
captured (`CAPTURABLE`). And no graph is trusted unseen: before a binding is used, the graph must do on two
different inputs and pasts what a plain run did, or steps go on without graphs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError

if TYPE_CHECKING:
    from dijiang_engines.runners.onnxruntime.runner import OrtRunner
    from dijiang_engines.runners.onnxruntime.state import Slot, Step

CAPTURABLE = ("step_ort", "step_capture")
"""Graphs that the exporter lowers so that a CUDA graph can hold them."""
MAX_CAPTURES = 64
"""ONNX Runtime keeps a captured graph as long as its session; later states run without one."""
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"

_SMALL_STATE = 64 << 20
"""Bytes up to which every layer's state is compared; of larger ones the first, middle and last layer's."""
_SAME = 0.01
"""Largest difference between a graph and a plain run, in units of the largest value: kernels that are
chosen anew may round differently; a graph with a stale address is off by the size of the values."""


_LOADING = threading.Lock()
GPU_LOCK = threading.RLock()
"""ONNX Runtime captures in CUDA's global mode: while one thread captures, a copy or a wait in any other
thread of the process fails and spoils the capture (CUDA error 900). So runners call ONNX Runtime on CUDA one
at a time."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def one_at_a_time(
    method: Callable[Concatenate[OrtRunner, _P], _T],
) -> Callable[Concatenate[OrtRunner, _P], _T]:
    """A method of a runner that no other thread's runner on CUDA runs beside."""

    @wraps(method)
    def alone(self: OrtRunner, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self.alone:
            return method(self, *args, **kwargs)

    return alone


def find_cuda_libraries(ort: Any) -> None:
    """Load the CUDA and cuDNN libraries that pip installed, which no library path names; keep quiet.

    What is missing all the same is reported when a session cannot be made. ONNX Runtime from 1.30 on
    warns at each CUDA session that no plugin provides CUDA, which it has built in.
    """
    ort.set_default_logger_severity(3)
    preload = getattr(ort, "preload_dlls", None)  # since 1.21
    if preload is None:
        return
    with _LOADING:
        # It prints what it misses. Only that module is kept quiet: another thread may be printing.
        ort.print = _say_nothing
        try:
            with suppress(Exception):
                preload()
        finally:
            del ort.print


def _say_nothing(*_: object, **__: object) -> None:
    pass


def zero_device_memory(spans: list[tuple[int, int]], device: int) -> bool:
    """Zero (address, bytes) spans of a GPU's memory and wait for it.

    Returns:
        False if CUDA's driver did not do it; some spans may be zeroed by then.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        context, handle = ctypes.c_void_p(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
            return False
        if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle):  # the one that ONNX Runtime uses
            return False
        try:
            if driver.cuCtxPushCurrent_v2(context):
                return False
            try:
                failed = any(
                    driver.cuMemsetD8_v2(ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(size))
                    for address, size in spans
                )
                return not failed and driver.cuCtxSynchronize() == 0
            finally:
                driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        finally:
            driver.cuDevicePrimaryCtxRelease_v2(handle)
    except (OSError, AttributeError):
        return False


@dataclass
class CudaGraphs:
    """Whether a runner's steps are CUDA graphs, and why not.

    Attributes:
        enabled: sessions are made for graphs and bindings are captured.
        note: why steps are not graphs, None while they are.
        captured: how many bindings have a graph.
    """

    enabled: bool
    note: str | None = None
    captured: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take_id(self) -> int | None:
        """A graph id that no other binding has, or None if there are enough."""
        with self._lock:
            if not self.enabled or self.captured >= MAX_CAPTURES:
                return None
            self.captured += 1
            return self.captured

    def turn_off(self, why: str) -> None:
        """Steps run without graphs from now on."""
        self.enabled, self.note = False, why


def capture(
    step: Step,
    slot: Slot,
    front: int,
    graph_id: int,
    run: Callable[[str], None],
    limit: int | None,
) -> None:
    """Capture the binding that reads set `front`, and check the graph against plain runs.

    The current state, set `front`, is as before afterwards; the other set is scratch.

    Args:
        step: the bindings, of a session made for graphs.
        slot: the buffers.
        front: which set holds the current state.
        graph_id: a new one.
        run: runs the binding under a graph id, NO_GRAPH for none.
        limit: positions that the model knows, None for any.

    Raises:
        RunnerError: ONNX Runtime cannot capture, or graph and plain runs differ.
    """
    past, present = slot.sets[front], slot.sets[1 - front]
    layers = list(range(len(past)))
    if sum(value.tensor_size_in_bytes() for value in past) > _SMALL_STATE:
        layers = sorted({0, len(past) // 2, len(past) - 1})
    saved = {layer: np.array(past[layer].numpy()) for layer in layers}
    probes = _probes(step, 2 if limit is None else min(2, limit - 1))

    def set_up(probe: int) -> None:
        step.fill(probes[probe])
        for layer in layers:
            past[layer].update_inplace(np.full(saved[layer].shape, (0.5, -1.25)[probe], np.float32))

    def results() -> list[npt.NDArray[np.float32]]:
        return [np.array(value.numpy()) for value in (step.logits, *(present[layer] for layer in layers))]

    try:
        expected = []
        for probe in range(2):
            set_up(probe)
            run(NO_GRAPH)
            expected.append(results())
        for probe in range(2):
            set_up(probe)
            run(str(graph_id))
            _compare(results(), expected[probe])
    finally:
        for layer, array in saved.items():
            past[layer].update_inplace(array)


def _probes(step: Step, position: int) -> list[list[npt.NDArray[np.int64]]]:
    """Two inputs that differ in tokens, positions and, with several rows, in who has a token."""
    rows = np.arange(step.batch)
    some = np.ones(step.batch, np.int64)
    fewer = some.copy()
    fewer[1:2] = 0
    tokens = (rows % step.vocab_size, (rows + 1 + step.vocab_size // 2) % step.vocab_size)
    return [
        [tokens[0][:, None], np.zeros(step.batch, np.int64), some],
        [tokens[1][:, None], np.full(step.batch, position), fewer],
    ]


def _compare(got: list[npt.NDArray[np.float32]], expected: list[npt.NDArray[np.float32]]) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        scale = float(np.abs(other).max())
        difference = float(np.abs(one - other).max())
        if not difference <= _SAME * scale:  # also if either is not a number
            what = "logits" if index == 0 else "state"
            raise RunnerError(
                f"the captured step's {what} differ from a plain run's",
                got=f"{difference:.2g} of {scale:.2g}",
            )
