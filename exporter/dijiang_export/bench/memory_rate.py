"""The rate of a device's memory: dijiang_engines.bench.bandwidth with PyTorch's tensors and events."""

from __future__ import annotations

import torch

from dijiang_engines.bench.bandwidth import (
    GPU_COPY_BYTES,
    Bandwidth,
    measure_bandwidth,
    measure_gpu_bandwidth,
)
from dijiang_engines.errors import RunnerError


class TorchCopy:
    """A copy on the current stream, as `dijiang_engines.bench.bandwidth.GpuCopy` wants it.

    Args:
        device: a CUDA device.
        size: bytes of the source, and again of the target.
    """

    def __init__(self, device: torch.device, size: int = GPU_COPY_BYTES) -> None:
        self.size = size
        self.source = torch.ones(size, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self._begin, self._end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def seconds(self) -> float:
        """See `GpuCopy`.

        Raises:
            RunnerError: the stream is being captured.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RunnerError(
                "the memory's rate is that of a copy on a stream",
                got="a stream that is being captured in a CUDA graph",
                hint="measure it outside of the graph: captured copies can be a third slower",
            )
        self._begin.record()
        self.target.copy_(self.source)
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


def memory_rate(device: torch.device, threads: int) -> Bandwidth:
    """Of a GPU, or of the CPU with so many threads.

    Args:
        device: whose memory.
        threads: of the CPU; a GPU has no use for them.
    """
    return measure_gpu_bandwidth(TorchCopy(device)) if device.type == "cuda" else measure_bandwidth(threads)
