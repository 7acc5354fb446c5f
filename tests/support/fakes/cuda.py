"""cuda.bindings.runtime on host memory: what `dijiang_engines.nvidia.cuda` calls, as strict as CUDA may be.

Work on a stream runs as late as it may: when somebody waits for it. So a host array that is changed or read
too early is seen, as is memory that was freed while something still needed it. New memory is full of NaNs.
Capture records work; waiting or allocating while recording is an error, as in CUDA.
It proves orchestration only.

Which GPU there is stands in the environment, FAKE_GPU, as JSON (tensorrt.FakeMachine writes it).
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, CAPTURE_UNSUPPORTED = 0, 1, 2, 900
_TEXTS = {INVALID_VALUE: "invalid argument", OUT_OF_MEMORY: "out of memory"}
POISON = 0xFF
ALIGNMENT = 256
"""Of memory that cudaMalloc gives (CUDA C++ Programming Guide, device memory accesses)."""

Work = Callable[[], None]


def settings() -> dict[str, Any]:
    """FAKE_GPU, over what an ordinary machine has."""
    usual = {
        "gpu": "NVIDIA Test", "capability": [9, 0], "gpus": 1, "free": 80 << 30, "total": 80 << 30,
        "integrated": False, "tensorrt": "8.6.0", "builder": "", "registers": True, "calls": None,
        "driver": 12080, "count_error": 0,
    }  # fmt: skip
    return usual | json.loads(os.environ.get("FAKE_GPU", "{}"))


class Stream:
    """Work that waits to be waited for."""

    def __init__(self) -> None:
        self.waiting: list[Work] = []
        self.recording: list[Work] | None = None

    def __int__(self) -> int:
        return id(self)

    def enqueue(self, work: Work) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Device:
    """One process's GPU: its memory and streams."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.limit: int | None = None
        """Bytes that may be allocated from now on; None: all."""

    def stream(self, handle: int) -> Stream:
        return self.streams[int(handle)]

    @property
    def recording(self) -> bool:
        return any(stream.recording is not None for stream in self.streams.values())

    def check(self, address: int, size: int) -> None:
        """Fail unless these bytes are in one piece of live device memory."""
        inside = any(at <= address and address + size <= at + len(b) for at, b in self.memory.items())
        assert inside, f"{size} bytes at {address:#x} are not in device memory"

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A copy of an array in device memory."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self.check(address, size)
        return np.frombuffer(ctypes.string_at(address, size), kind).reshape(shape).copy()

    def write(self, address: int, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array)
        self.check(address, data.nbytes)
        ctypes.memmove(address, data.ctypes.data, data.nbytes)


DEVICE = Device()


class _Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class _Mode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


def _allocate(size: int) -> tuple[int, int | None]:
    if DEVICE.recording:
        return CAPTURE_UNSUPPORTED, None
    taken = sum(len(buffer) for buffer in DEVICE.memory.values())
    room = settings()["free"] if DEVICE.limit is None else DEVICE.limit
    if taken + size > room:
        return OUT_OF_MEMORY, None
    whole = (ctypes.c_uint8 * (size + ALIGNMENT))()
    buffer = (ctypes.c_uint8 * size).from_buffer(whole, -ctypes.addressof(whole) % ALIGNMENT)
    ctypes.memset(buffer, POISON, size)
    DEVICE.memory[ctypes.addressof(buffer)] = buffer
    return SUCCESS, ctypes.addressof(buffer)


_PINNED: dict[int, Any] = {}


def _pinned(size: int) -> tuple[int, int]:
    buffer = (ctypes.c_uint8 * size)()
    _PINNED[ctypes.addressof(buffer)] = buffer
    return SUCCESS, ctypes.addressof(buffer)


def _copy(target: int, source: int, size: int, kind: _Kind, stream: Stream) -> tuple[int]:
    def work() -> None:
        if kind != _Kind.cudaMemcpyDeviceToHost:
            DEVICE.check(target, size)
        if kind != _Kind.cudaMemcpyHostToDevice:
            DEVICE.check(source, size)
        ctypes.memmove(target, source, size)

    stream.enqueue(work)
    return (SUCCESS,)


def _fill(target: int, pitch: int, value: int, width: int, rows: int, stream: Stream) -> tuple[int]:
    def work() -> None:
        for row in range(rows):
            DEVICE.check(target + row * pitch, width)
            ctypes.memset(target + row * pitch, value, width)

    stream.enqueue(work)
    return (SUCCESS,)


def _new_stream(flags: int) -> tuple[int, Stream]:
    assert flags == 1
    stream = Stream()
    DEVICE.streams[int(stream)] = stream
    return SUCCESS, stream


def _wait(stream: Stream) -> tuple[int]:
    if stream.recording is not None:
        return (CAPTURE_UNSUPPORTED,)
    stream.run()
    return (SUCCESS,)


def _begin(stream: Stream, mode: _Mode) -> tuple[int]:
    assert mode == _Mode.cudaStreamCaptureModeThreadLocal and stream.recording is None
    stream.recording = []
    return (SUCCESS,)


def _end(stream: Stream) -> tuple[int, Any]:
    if stream.recording is None:
        return INVALID_VALUE, None
    work, stream.recording = stream.recording, None
    return SUCCESS, SimpleNamespace(work=work)


def _launch(graph: Any, stream: Stream) -> tuple[int]:
    for work in graph.work:
        stream.enqueue(work)
    return (SUCCESS,)


def _record(event: Any, stream: Stream) -> tuple[int]:
    event.stream = stream
    event.done = False
    stream.enqueue(lambda: setattr(event, "done", True))
    return (SUCCESS,)


def _wait_event(event: Any) -> tuple[int]:
    while not event.done:  # no further than needed
        event.stream.waiting.pop(0)()
    return (SUCCESS,)


def _properties(device: int) -> tuple[int, Any]:
    now = settings()
    major, minor = now["capability"]
    return SUCCESS, SimpleNamespace(
        name=now["gpu"].encode() + b"\0", major=major, minor=minor, integrated=int(now["integrated"])
    )


def _count(now: dict[str, Any]) -> tuple[int, int | None]:
    error = now["count_error"] or (SUCCESS if now["gpus"] else 100)
    return error, None if error else now["gpus"]


def runtime_module() -> ModuleType:
    """What `import cuda.bindings.runtime` gives."""
    module = ModuleType("cuda.bindings.runtime")
    now = settings()
    functions = {
        "cudaGetDeviceCount": lambda: _count(now),
        "cudaSetDevice": lambda device: (SUCCESS,),
        "cudaGetErrorString": lambda error: (SUCCESS, _TEXTS.get(int(error), "unknown error").encode()),
        "cudaGetLastError": lambda: (SUCCESS,),
        "cudaGetDeviceProperties": _properties,
        "cudaDriverGetVersion": lambda: (SUCCESS, settings()["driver"]),
        "cudaRuntimeGetVersion": lambda: (SUCCESS, 12060),
        "cudaMemGetInfo": lambda: (SUCCESS, settings()["free"], settings()["total"]),
        "cudaMalloc": _allocate,
        "cudaFree": lambda address: (SUCCESS, DEVICE.memory.pop(address))[:1],
        "cudaMallocHost": _pinned,
        "cudaFreeHost": lambda address: (SUCCESS, _PINNED.pop(address))[:1],
        "cudaStreamCreateWithFlags": _new_stream,
        "cudaStreamDestroy": lambda stream: (SUCCESS, DEVICE.streams.pop(int(stream)))[:1],
        "cudaMemcpyAsync": _copy,
        "cudaMemsetAsync": lambda at, value, size, stream: _fill(at, size, value, size, 1, stream),
        "cudaMemset2DAsync": _fill,
        "cudaStreamSynchronize": _wait,
        "cudaStreamBeginCapture": _begin,
        "cudaStreamEndCapture": _end,
        "cudaGraphInstantiate": lambda graph, flags: (SUCCESS, SimpleNamespace(work=graph.work)),
        "cudaGraphGetNodes": lambda graph, count: (SUCCESS, [], len(graph.work)),
        "cudaGraphDestroy": lambda graph: (SUCCESS,),
        "cudaGraphExecDestroy": lambda graph: (SUCCESS,),
        "cudaGraphLaunch": _launch,
        "cudaEventCreateWithFlags": lambda flags: (SUCCESS, SimpleNamespace(done=True, stream=None)),
        "cudaEventDestroy": lambda event: (SUCCESS,),
        "cudaEventRecord": _record,
        "cudaEventSynchronize": _wait_event,
    }
    for name, value in functions.items():
        setattr(module, name, value)
    module.cudaMemcpyKind, module.cudaStreamCaptureMode = _Kind, _Mode  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = module.cudaEventDefault = 1  # type: ignore[attr-defined]
    module.cudaEventDisableTiming = 2  # type: ignore[attr-defined]
    return module
