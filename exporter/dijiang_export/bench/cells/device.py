"""The current CUDA device with our library, and how everybody at one size is measured on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_engines.kernels.attention import load_kernels
from dijiang_engines.plugin.cache import library_hash
from dijiang_export.bench.cells.measure import C
from dijiang_export.bench.kernels.gpu import time_graph
from dijiang_export.bench.kernels.peers import Prepared, in_short, quiet
from dijiang_export.bench.memory_rate import memory_rate

Contestant = Callable[[], dict[str, Any]]
"""Gets ready, is compared with a reference, and measured: `error`, `right`, `timing` and more."""


class KernelsGpu(ABC, Generic[C]):
    """The current CUDA device.

    Args:
        command: that needs it, for the message where there is none.
        settings: of all cells, for the record.
        library: of our kernels; None for the built ones.

    Attributes:
        attention: the library, opened; `path` is its file.

    Raises:
        RunnerError: there is no GPU.
        PluginError: no library was built.
        KernelError: it cannot be loaded.
    """

    OURS: ClassVar[frozenset[str]] = frozenset({"ours"})
    """Contestants whose errors are not hidden."""

    def __init__(self, command: str, settings: Mapping[str, Any], library: Path | None = None) -> None:
        if not torch.cuda.is_available():
            raise RunnerError(
                f"{command} needs an NVIDIA GPU",
                got=f"PyTorch {torch.__version__} that sees none",
                hint="`dijiang-export doctor` shows what is there",
            )
        self.settings = settings
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.attention = load_kernels(library)
        self.path = self.attention.path

    @abstractmethod
    def contestants(self, cell: C, seconds: float) -> Mapping[str, Contestant]:
        """Who is measured at a size, in order.

        Args:
            cell: the size.
            seconds: about how long to replay for each figure.
        """

    def describe(self) -> dict[str, Any]:
        """The GPU, and our library."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": {
                "name": found.name,
                "multiprocessors": found.multi_processor_count,
                "cuda": torch.version.cuda,
            },
            "library": {"sha256": library_hash(self.path), "version": self.attention.version},
        }

    def rate(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        return memory_rate(self.device, 0).copy

    def measure(self, cell: C, seconds: float) -> dict[str, Any]:
        """All contestants at one cell; by name what was measured, or why it was not.

        Args:
            cell: the size.
            seconds: about how long to replay for each figure.
        """
        found = {}
        with torch.no_grad():
            for name, contestant in self.contestants(cell, seconds).items():
                found[name] = result_of(contestant, ours=name in self.OURS)
                torch.cuda.empty_cache()
        return found


def result_of(contestant: Contestant, *, ours: bool = True) -> dict[str, Any]:
    """What was measured, or why it was not: the other figures still count.

    Args:
        contestant: who.
        ours: False: whatever is wrong with another's code is a reason, and it runs without warnings and logs.
    """
    try:
        with nullcontext() if ours else quiet():
            return contestant()
    except DijiangError as error:
        return {"skipped": error.sentence()}
    except torch.OutOfMemoryError:
        return {"skipped": "the GPU's memory is too small for it"}
    except Exception as error:
        if ours:
            raise
        return {"skipped": f"failed: {in_short(error)}"}


def timed(run: Callable[[], object], seconds: float, calls: int = 1) -> Timing:
    """Seconds of one call, from replays of a CUDA graph.

    Args:
        run: enqueues one call.
        seconds: about how long to replay.
        calls: in a graph; several where one is so short that the two events count.
    """
    return time_graph(Prepared(lambda _: run(), dict), [0] * calls, seconds, keep=1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The difference's norm over the expected one's; infinite where something is not finite."""
    got = got.double().to(expected.device)
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).norm() / expected.norm())
