"""What peers share: what they hand over to be timed, how far off they are, and how a call is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dijiang_engines.errors import DijiangError
from dijiang_engines.validation.tolerances import tolerance

BLOCK = 16
"""Tokens that a decoder makes in one timed call."""
ROUNDINGS = 4


class LeftOut(DijiangError):
    """A figure that a peer does not have, and why."""


@dataclass
class Prepared:
    """One figure, ready to be timed."""

    run: Callable[[], Any]
    """One call; a decoder's is a block."""
    reset: Callable[[], None]
    """To be called before each run."""
    error: float
    """Of its logits against the eager whole, in their standard deviations."""
    notes: list[str] = field(default_factory=list)


class Peer(Protocol):
    """A way to run a model."""

    forms: tuple[str, ...]
    """Of prefills; "" if there is one."""

    def prefill(self, form: str, batch: int, length: int) -> Prepared:
        """Get ready to read `length` tokens of each of `batch` rows."""
        ...

    def decode(self, batch: int, context: int) -> Prepared:
        """Get ready to decode BLOCK tokens of each row after `context`."""
        ...


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def error_of(logits: Tensor, exact: Tensor) -> float:
    """Largest difference in standard deviations of `exact`; infinite if anything is not finite."""
    found, want = logits.double().flatten(), exact.double().flatten()
    if not (torch.isfinite(found).all() and torch.isfinite(want).all()):
        return float("inf")
    return float((found - want).abs().max() / want.std())


def compiled(
    function: Callable[..., Any], mode: str, backend: str, device: torch.device
) -> Callable[..., Any]:
    """`function` as a peer runs it, for one set of shapes.

    Args:
        function: what is to be called.
        mode: "eager", "compiled" or "graph".
        backend: of torch.compile.
        device: where.
    """
    if mode == "eager":
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


def wrong(error: float, dtype: str) -> bool:
    """Whether logits that are `error` standard deviations off are another model's.

    The bound is that of a bundle times ROUNDINGS: here both sides are rounded, through dozens of random
    layers. A cache that is one token off, or stale, is off by several standard deviations.
    """
    return not (math.isfinite(error) and error <= ROUNDINGS * tolerance(dtype, "logits").max_error)


@contextmanager
def counting_skips(mode: str, notes: list[str]) -> Iterator[None]:
    """Say so in `notes` if torch.compile gave up on CUDA graphs or broke the graph inside the block."""
    from torch._dynamo.utils import counters

    counters.clear()
    yield
    if mode == "compiled" and (skips := counters["inductor"]["cudagraph_skips"]):
        notes.append(f"torch.compile left out CUDA graphs {skips} times")
    if mode != "eager" and (breaks := sum(counters["graph_break"].values())):
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
