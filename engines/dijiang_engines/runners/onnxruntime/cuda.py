"""What ONNX Runtime needs on CUDA beyond a session: its libraries, zeroed memory, turns, and whether steps
are CUDA graphs (state.py makes them)."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

CAPTURABLE = ("step_ort", "step_capture")
"""Graphs that the exporter lowers so that a CUDA graph can hold them."""
MAX_CAPTURES = 64
"""ONNX Runtime keeps a captured graph as long as its session; later states run without one."""

_LOADING = threading.Lock()
GPU_LOCK = threading.RLock()
"""ONNX Runtime captures in CUDA's global mode: while one thread captures, a copy or a wait in any other
thread of the process fails and spoils the capture (CUDA error 900). So runners call ONNX Runtime on CUDA one
at a time."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class TakesTurns(Protocol):
    """A runner that may have to wait for others."""

    @property
    def alone(self) -> AbstractContextManager[Any]:
        """Held by every call that touches the GPU."""
        ...


_R = TypeVar("_R", bound=TakesTurns)


def one_at_a_time(
    method: Callable[Concatenate[_R, _P], _T],
) -> Callable[Concatenate[_R, _P], _T]:
    """A method of a runner that no other thread's runner on CUDA runs beside."""

    @wraps(method)
    def alone(self: _R, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
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
        """Steps run without graphs from now on; says so in the log."""
        self.enabled, self.note = False, why
        logging.getLogger(__name__).warning("steps run without CUDA graphs: %s", why)


def choose_graphs(graph: str, *, on_cpu: bool, wanted: bool | None) -> CudaGraphs:
    """Whether steps can be CUDA graphs.

    Args:
        graph: the bundle's graph that steps run.
        on_cpu: there is no GPU.
        wanted: None: where they can be, and without a word in the log where they cannot.
    """
    if on_cpu or wanted is False:
        return CudaGraphs(enabled=False, note="the CPU has none" if on_cpu else "not wanted")
    if graph in CAPTURABLE:
        return CudaGraphs(enabled=True)
    why = "the standard step is not made to be one: export with `--variant ort` or `capture`"
    graphs = CudaGraphs(enabled=False, note=why)
    if wanted:
        graphs.turn_off(why)
    return graphs
