"""CUDA through cuda-bindings: memory, streams, events and graphs that belong to an object and go with it.

Nothing here knows about TensorRT. Sizes are bytes, addresses plain ints. Every failure is a `RunnerError`.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""
OLD_DRIVER = 35
"""cudaErrorInsufficientDriver."""


def cuda_runtime() -> Any:
    """The module cuda.bindings.runtime.

    Raises:
        RunnerError: cuda-bindings is not installed, or does not load.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise RunnerError(
            "the Python package cuda-bindings is not installed, or does not load",
            got=str(error),
            hint="pip install 'dijiang-export[tensorrt]'; its major version must be that of your CUDA",
        ) from error


@dataclass(frozen=True)
class DeviceFacts:
    """One GPU."""

    index: int
    name: str
    compute_capability: int
    """10 * major + minor."""
    memory_bytes: int
    free_bytes: int
    driver: str
    """Newest CUDA that the driver knows, such as "13.0"."""
    runtime: str
    """CUDA's runtime library, such as "12.6"."""
    integrated: bool
    """It shares its memory with the CPU, as on a Jetson."""

    def knows_cuda(self, major: int | None) -> bool:
        """Whether the driver runs what was made with CUDA of this major version; None: of whichever."""
        return major is None or int(self.driver.split(".")[0]) >= major


class Cuda:
    """One GPU of this process.

    Args:
        device: its index.

    Raises:
        RunnerError: there is no driver, it is too old, or there is no such GPU.
    """

    def __init__(self, device: int = 0) -> None:
        self.runtime = cuda_runtime()
        self.device = device
        count = self._count()
        if not 0 <= device < count:
            raise RunnerError(
                "there is no such GPU" if count else "there is no NVIDIA GPU here, or its driver is missing",
                got=f"GPU {device} of {count}" if count else None,
                hint="`dijiang-export doctor` says what is missing; bundles also run with --runner cpu",
            )
        self.check(self.runtime.cudaSetDevice(device))

    def _count(self) -> int:
        error, count = self.runtime.cudaGetDeviceCount()
        driver = self.check(self.runtime.cudaDriverGetVersion()) if int(error) == OLD_DRIVER else 0
        if int(driver):  # without any driver the error is the same, and its version 0
            runtime = _version(self.check(self.runtime.cudaRuntimeGetVersion()))
            raise RunnerError(
                "NVIDIA's driver is too old for this CUDA",
                got=f"a driver for CUDA {_version(driver)}",
                expected=f"CUDA {runtime} or newer, as cuda-bindings is",
                hint="update the driver, or install the cuda-bindings of its CUDA: `nvidia-smi` shows which",
            )
        return int(count) if int(error) == 0 else 0

    def check(self, result: tuple[Any, ...]) -> Any:
        """The value of a cuda-bindings call.

        Raises:
            RunnerError: it failed.
        """
        error, *values = result
        if int(error) != 0:
            self._raise(error)
        return values[0] if len(values) == 1 else values

    def _raise(self, error: Any) -> None:
        _, text = self.runtime.cudaGetErrorString(error)
        words = text.decode() if isinstance(text, bytes) else str(text)
        if int(error) == OUT_OF_MEMORY:
            with suppress(Exception):  # the error would stick to the next call
                self.runtime.cudaGetLastError()
            raise RunnerError(
                "the GPU is out of memory",
                got=words,
                hint="use fewer sequences at once, an engine built with a smaller --max-batch or "
                "--max-length, or stop other programs on this GPU",
            )
        raise RunnerError(
            "CUDA failed",
            got=f"{words} ({int(error)})",
            hint="the cause may be earlier work on this GPU; `dijiang-export doctor` looks at the driver",
        )

    def facts(self) -> DeviceFacts:
        """What this GPU is, and how much of its memory is free now."""
        properties = self.check(self.runtime.cudaGetDeviceProperties(self.device))
        free, total = self.memory()
        name = properties.name
        return DeviceFacts(
            self.device,
            (name.decode() if isinstance(name, bytes) else str(name)).strip("\0"),
            10 * int(properties.major) + int(properties.minor),
            total,
            free,
            _version(self.check(self.runtime.cudaDriverGetVersion())),
            _version(self.check(self.runtime.cudaRuntimeGetVersion())),
            bool(properties.integrated),
        )

    def memory(self) -> tuple[int, int]:
        """Free and all bytes."""
        free, total = self.check(self.runtime.cudaMemGetInfo())
        return int(free), int(total)

    def activate(self) -> None:
        """Make this GPU the calling thread's."""
        self.check(self.runtime.cudaSetDevice(self.device))

    def stream(self) -> Stream:
        """A stream of its own, which does not wait for the default one."""
        return Stream(self)

    def buffer(self, size: int) -> Buffer:
        """Device memory, not initialised."""
        return Buffer(self, size)

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Pinned:
        """A host array that the GPU copies from and to without waiting."""
        return Pinned(self, shape, np.dtype(dtype))

    def event(self, *, timing: bool = False) -> Event:
        """An event; without timing it is cheaper."""
        return Event(self, timing)


def _version(number: Any) -> str:
    return f"{int(number) // 1000}.{int(number) % 1000 // 10}"


class Buffer:
    """Device memory that is freed with the object. Make one with `Cuda.buffer`."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.size = size
        self.address = int(cuda.check(cuda.runtime.cudaMalloc(max(size, 256))))

    def __del__(self) -> None:
        address, self.address = getattr(self, "address", 0), 0
        if address:
            with suppress(Exception):  # at interpreter exit nothing is left to report to
                self._cuda.runtime.cudaFree(address)


class Pinned:
    """Page-locked host memory as a NumPy array, `array`. Make one with `Cuda.pinned`."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        import ctypes

        self._cuda = cuda
        self.size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.address = int(cuda.check(cuda.runtime.cudaMallocHost(max(self.size, 64))))
        memory = (ctypes.c_uint8 * self.size).from_address(self.address)
        self.array: npt.NDArray[Any] = np.frombuffer(memoryview(memory), dtype=dtype).reshape(shape)
        self.array[...] = 0

    def __del__(self) -> None:
        address, self.address = getattr(self, "address", 0), 0
        if address:
            with suppress(Exception):
                self._cuda.runtime.cudaFreeHost(address)


class Stream:
    """An ordered queue of work. Make one with `Cuda.stream`."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        runtime = self._runtime = cuda.runtime
        self._stream = cuda.check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.handle = int(self._stream)
        kinds = runtime.cudaMemcpyKind
        self._up, self._down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._across = kinds.cudaMemcpyDeviceToDevice

    def __del__(self) -> None:
        stream = getattr(self, "_stream", None)
        if stream is not None:
            with suppress(Exception):
                self._runtime.cudaStreamDestroy(stream)

    def upload(self, target: int, source: int, size: int) -> None:
        """Host to device; `source` must stay as it is until the copy is done, if it is pinned."""
        self.cuda.check(self._runtime.cudaMemcpyAsync(target, source, size, self._up, self._stream))

    def download(self, target: int, source: int, size: int) -> None:
        """Device to host."""
        self.cuda.check(self._runtime.cudaMemcpyAsync(target, source, size, self._down, self._stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """Device to device."""
        self.cuda.check(self._runtime.cudaMemcpyAsync(target, source, size, self._across, self._stream))

    def fill(self, target: int, value: int, size: int) -> None:
        """Set bytes."""
        self.cuda.check(self._runtime.cudaMemsetAsync(target, value, size, self._stream))

    def fill_rows(self, target: int, pitch: int, value: int, width: int, rows: int) -> None:
        """Set `width` bytes in each of `rows` rows that begin `pitch` bytes apart."""
        self.cuda.check(self._runtime.cudaMemset2DAsync(target, pitch, value, width, rows, self._stream))

    def synchronize(self) -> None:
        """Wait until all work is done."""
        self.cuda.check(self._runtime.cudaStreamSynchronize(self._stream))

    def begin_capture(self) -> None:
        """From here on, record work instead of doing it; other threads are not concerned."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.cuda.check(self._runtime.cudaStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> Graph:
        """What was recorded, ready to be launched.

        Raises:
            RunnerError: something in it cannot be recorded.
        """
        graph = self.cuda.check(self._runtime.cudaStreamEndCapture(self._stream))
        return Graph(self.cuda, graph)

    def abandon_capture(self) -> None:
        """End a capture that went wrong; does nothing if there is none."""
        with suppress(Exception):
            _, graph = self._runtime.cudaStreamEndCapture(self._stream)
            if graph is not None and int(graph):
                self._runtime.cudaGraphDestroy(graph)
        with suppress(Exception):
            self._runtime.cudaGetLastError()

    def launch(self, graph: Graph) -> None:
        """Enqueue a recorded graph."""
        self.cuda.check(self._runtime.cudaGraphLaunch(graph.executable, self._stream))

    def record(self, event: Event) -> None:
        """Let `event` happen when everything that was enqueued before it is done."""
        self.cuda.check(self._runtime.cudaEventRecord(event.event, self._stream))


class Event:
    """A point in a stream. Make one with `Cuda.event`."""

    def __init__(self, cuda: Cuda, timing: bool) -> None:
        runtime = cuda.runtime
        flags = runtime.cudaEventDefault if timing else runtime.cudaEventDisableTiming
        self._cuda = cuda
        self.event = cuda.check(runtime.cudaEventCreateWithFlags(flags))

    def __del__(self) -> None:
        event = getattr(self, "event", None)
        if event is not None:
            with suppress(Exception):
                self._cuda.runtime.cudaEventDestroy(event)

    def wait(self) -> None:
        """Wait on the host until it has happened."""
        self._cuda.check(self._cuda.runtime.cudaEventSynchronize(self.event))

    def seconds_since(self, earlier: Event) -> float:
        """GPU time between two events that have happened."""
        milliseconds = self._cuda.check(self._cuda.runtime.cudaEventElapsedTime(earlier.event, self.event))
        return float(milliseconds) / 1e3


class Graph:
    """Recorded work. Made by `Stream.end_capture`."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        self._cuda = cuda
        try:
            self.executable = cuda.check(cuda.runtime.cudaGraphInstantiate(graph, 0))
            nodes = cuda.check(cuda.runtime.cudaGraphGetNodes(graph, 0))
            self.nodes = int(nodes[-1]) if isinstance(nodes, (list, tuple)) else int(nodes)
            """How many pieces of work are in it."""
        finally:
            cuda.runtime.cudaGraphDestroy(graph)

    def __del__(self) -> None:
        executable = getattr(self, "executable", None)
        if executable is not None:
            with suppress(Exception):
                self._cuda.runtime.cudaGraphExecDestroy(executable)
