"""What peers that run in PyTorch share: what they run on, how far off they are, how a call is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dijiang_export.bench.memory_rate import memory_rate
from dijiang_export.bench.peers.figures import BLOCK, LeftOut, Prepared, deviations


class TorchPlace:
    """A device as PyTorch uses it.

    Args:
        name: of the device.
        threads: of operators on a CPU.

    Raises:
        LeftOut: PyTorch sees no such device.
    """

    packages: tuple[str, ...] = ("torch", "transformers", "triton", "numpy")

    def __init__(self, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self.device = open_device(name)
        self._cuda = self.device.type == "cuda"

    def gpu(self) -> dict[str, Any] | None:
        """Name and sizes, for the record."""
        return describe_gpu(self.device) if self._cuda else None

    def bandwidth(self, threads: int) -> dict[str, Any]:
        """Of the device, or of the CPU with so many threads."""
        return asdict(memory_rate(self.device, threads))

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Nothing is trained."""
        return torch.no_grad()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        """Count device memory anew."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Most bytes of device memory since."""
        return torch.cuda.max_memory_allocated(self.device) if self._cuda else None

    def clear(self) -> None:
        """What was compiled for one size only takes memory from the next."""
        torch._dynamo.reset()
        if self._cuda:
            torch.cuda.empty_cache()


def open_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        LeftOut: PyTorch sees no such device.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LeftOut("there is no CUDA device", got=f"PyTorch {torch.__version__}")
        device = torch.device("cuda", device.index or 0)  # some of PyTorch's calls need an index
        torch.cuda.set_device(device)
    return device


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name and sizes, for the record."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": int(found.L2_cache_size),
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
    }


def error_of(logits: Tensor, exact: Tensor) -> float:
    """Largest difference in standard deviations of `exact`; infinite if anything is not finite."""
    return deviations(logits.double().cpu().numpy(), exact.double().cpu().numpy())


def compiled(
    function: Callable[..., Any], mode: str, backend: str, device: torch.device
) -> Callable[..., Any]:
    """`function` as a peer runs it, for one set of shapes.

    Args:
        function: what is to be called.
        mode: "eager" or "static" (nothing is compiled), "compiled" or "graph".
        backend: of torch.compile.
        device: where.
    """
    if mode in ("eager", "static"):
        return function
    options: dict[str, Any] = {"dynamic": False, "backend": backend}
    if mode == "compiled" and device.type == "cuda" and backend == "inductor":
        options["mode"] = "reduce-overhead"

        made = torch.compile(function, **options)

        def step(*arguments: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return made(*arguments)

        return step
    return torch.compile(function, **options)


def block_decoder(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    token: Tensor,
    place: Tensor,
    reset: Callable[[], None],
    exact: Tensor,
    mode: str,
    device: torch.device,
) -> Prepared:
    """Decoding in place, BLOCK tokens a run, with what the model has read at fixed addresses.

    Args:
        step: token and place -> the next token, and logits; compiled already.
        token: what is read next; overwritten.
        place: its position; counted on.
        reset: back to the end of the prompt.
        exact: the logits that the first step should give.
        mode: "eager", "compiled" or "graph".
        device: where.
    """
    notes: list[str] = []
    reset()
    with counting_skips(mode, notes):
        error = error_of(step(token, place)[1], exact)

    def advance() -> None:
        token.copy_(step(token, place)[0])
        place.add_(1)

    if mode == "graph":
        reset()
        advance = captured(advance, device)

    def run() -> Tensor:
        for _ in range(BLOCK):
            advance()
        return token

    return Prepared(run, reset, error, notes)


@contextmanager
def counting_skips(mode: str, notes: list[str]) -> Iterator[None]:
    """Say so in `notes` if torch.compile gave up on CUDA graphs or broke the graph inside the block."""
    from torch._dynamo.utils import counters

    counters.clear()
    yield
    if mode == "compiled" and (skips := counters["inductor"]["cudagraph_skips"]):
        notes.append(f"torch.compile left out CUDA graphs {skips} times")
    if mode in ("compiled", "graph") and (breaks := sum(counters["graph_break"].values())):
        notes.append(f"torch.compile broke the graph {breaks} times")


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`call`, compiled and run before, as the replay of one CUDA graph; it must work in place."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
