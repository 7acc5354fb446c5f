"""One call of DijiangAttention in hostile memory.

All buffers of a call lie in one allocation, each between guard zones, aligned to what the C ABI demands
and no more. Guards, the gaps between strided rows, the output, the new state and the workspace hold bytes
0xFF: NaN in every type. After the call everything but the results must still have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from support.makers.kernel_cases import Call
from torch import Tensor

POISON = 0xFF
GUARD = 240  # bytes; not a multiple of 32, so that nothing is aligned to more than 16 bytes by chance
STRIDED = ("qkv", "gate", "output")


@dataclass(frozen=True)
class Layout:
    """How far rows are apart beyond dense, in elements (multiples of 16 bytes), and the order of B and L."""

    token_gap: int = 0
    batch_gap: int = 0
    time_major: bool = False
    in_place: bool = False


class Engine(Protocol):
    """What runs a call: the kernels, or a stand-in for them."""

    device: str

    def workspace_size(self, call: Call) -> int: ...

    def sync_size(self, call: Call) -> int: ...

    def launch(self, call: Call, buffers: dict[str, Tensor], stream: int) -> None:
        """Enqueue the call. `buffers` are views, strided as laid out; geometry and types are `call`'s."""


@dataclass
class Arena:
    """The buffers of one call, ready to be launched any number of times."""

    engine: Engine
    call: Call
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        call, layout, self.memory = self.call, self.layout, torch.empty(0, dtype=torch.uint8)
        self._plan: list[tuple[str, int, int]] = []
        sources = call.tensors()
        self._total = GUARD
        makers: dict[str, Callable[[], Tensor]] = {}
        for name, value in sources.items():
            if name in STRIDED:
                makers[name] = self._strided(name, value.shape, value.dtype)
            elif name == "past_state":
                makers[name] = self._states(name, value.shape)
            else:
                makers[name] = self._dense(name, tuple(value.shape), value.dtype)
        makers["output"] = self._strided("output", call.gate.shape, call.dtype)
        if not layout.in_place:
            makers["present_state"] = self._states("present_state", call.past_state.shape)
        sizes = self.engine.workspace_size(call), self.engine.sync_size(call)
        for name, size in zip(("workspace", "sync"), sizes, strict=True):
            if size:
                makers[name] = self._dense(name, (size,), torch.uint8)
        self.memory = torch.full((self._total,), POISON, dtype=torch.uint8, device=self.engine.device)
        assert self.memory.data_ptr() % 256 == 0 or self.engine.device == "cpu"
        self.buffers = {name: make() for name, make in makers.items()}
        if layout.in_place:
            self.buffers["present_state"] = self.buffers["past_state"]
        for name, value in sources.items():
            self.buffers[name].copy_(value)
        if "sync" in self.buffers:
            self.buffers["sync"].zero_()

    def launch(self, stream: int = 0) -> None:
        self.engine.launch(self.call, self.buffers, stream)

    def run(self, stream: int = 0) -> tuple[Tensor, Tensor]:
        """Launch once and check the memory. Returns copies of the output and the new state."""
        before = self.memory.clone()
        synchronize = torch.cuda.synchronize if self.engine.device != "cpu" else lambda: None
        synchronize()  # the call may run on a stream that knows nothing of the one that filled the memory
        self.launch(stream)
        synchronize()
        self.check_unchanged(before)
        return self.results()

    def results(self) -> tuple[Tensor, Tensor]:
        return self.buffers["output"].clone().contiguous(), self.buffers["present_state"].clone().contiguous()

    def check_unchanged(self, before: Tensor, *, results_too: bool = False) -> None:
        """Assert that nothing was written but the results and the workspace."""
        changed = self.memory != before
        written = [] if results_too else ["output", "present_state", "workspace"]
        view = dict(self.buffers)
        for name in written:
            if name in view:
                self._bytes_of(changed, view[name]).fill_(False)
        if changed.any():
            at = int(changed.nonzero()[0])
            raise AssertionError(
                f"{int(changed.sum())} bytes changed that must not; first {self._describe(at)}"
            )
        if "sync" in view:
            assert not view["sync"].any(), "sync memory was not left zeroed"

    def _bytes_of(self, mask: Tensor, view: Tensor) -> Tensor:
        """The part of a per-byte mask that belongs to a (strided) view of the memory."""
        size, start = view.element_size(), view.data_ptr() - self.memory.data_ptr()
        shape, strides = (*view.shape, size), (*(s * size for s in view.stride()), 1)
        return mask.as_strided(shape, strides, start)

    def _describe(self, at: int) -> str:
        best = "before everything"
        for name, start, size in self._plan:
            if start <= at:
                best = f"byte {at - start} of {name}'s {size}" if at < start + size else f"after {name}"
        return best

    def _reserve(self, name: str, size: int, alignment: int) -> int:
        self._total = -(-self._total // alignment) * alignment
        start = self._total
        self._plan.append((name, start, size))
        self._total += size + GUARD
        return start

    def _dense(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
        count = int(torch.Size(shape).numel())
        only4 = name in ("positions", "seq_lens")
        start = self._reserve(name, count * dtype.itemsize, 4 if only4 else 16) + 0
        if only4:  # not 16-byte aligned: the ABI asks for 4 bytes only
            start += 4
            self._total += 4

        def make() -> Tensor:
            return self.memory[start : start + count * dtype.itemsize].view(dtype).reshape(shape)

        return make

    def _as_strided(
        self, name: str, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if shape.numel() else 0
        start = self._reserve(name, extent * dtype.itemsize, 16)

        def make() -> Tensor:
            flat = self.memory[start : start + extent * dtype.itemsize].view(dtype)
            return flat.as_strided(shape, strides)

        return make

    def _strided(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Callable[[], Tensor]:
        batch, length, width = shape
        token = width + self.layout.token_gap
        if self.layout.time_major:
            strides = (token, batch * token + self.layout.batch_gap, 1)
        else:
            strides = (length * token + self.layout.batch_gap, token, 1)
        return self._as_strided(name, shape, strides, dtype)

    def _states(self, name: str, shape: torch.Size) -> Callable[[], Tensor]:
        _, heads, d, _ = shape
        return self._as_strided(
            name, shape, (heads * d * d + self.layout.batch_gap, d * d, d, 1), torch.float32
        )


class StandIn:
    """The kernels' arithmetic on the CPU (kernel_emulation.py), with a workspace and a sync to misuse."""

    device = "cpu"

    def workspace_size(self, call: Call) -> int:
        return 64 * call.batch * (call.length > 1)

    def sync_size(self, call: Call) -> int:
        return 16 * call.batch

    def launch(self, call: Call, buffers: dict[str, Tensor], stream: int) -> None:
        from support.oracles.kernel_emulation import emulate

        del stream
        inputs = {k: buffers[k].clone().contiguous() for k in call.tensors()}
        output, state = emulate(call.with_(**inputs))
        if "workspace" in buffers:
            buffers["workspace"].fill_(7)
        buffers["output"].copy_(output)
        buffers["present_state"].copy_(state)
