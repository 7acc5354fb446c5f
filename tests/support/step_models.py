"""A step in one launch for a reference model: its weights packed, its memory, and a reference in float64.

Works on whatever memory torch has: the GPU's for the kernels, the host's for their emulation.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dijiang_engines.kernels import abi
from dijiang_engines.kernels.step import StepKernels
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.step.one_launch import OneLaunch
from dijiang_export.bench.step.weights import QuantisedWeights
from dijiang_export.reference.model import ReferenceModel


class EmulatedKernels(StepKernels):
    """The library of tests/kernels/step_emulation: the step's functions of the ABI, and no others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name, (result, arguments) in abi.FUNCTIONS.items():
            if name.startswith("dijiang_step") or name == "dijiang_last_error":
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments

    def call(self, name: str, *arguments: Any) -> None:
        super().call(name, *arguments)


GUARD = 256
"""Bytes on both sides of what is written that must stay what they are."""


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def at_a_wall(size: int) -> Tensor:
    """Memory of the host that ends where nobody may read: who does dies."""
    page = mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) != 0:
        raise OSError("mprotect")
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=whole - size)


class Guarded:
    """Memory with a guard on both sides, poisoned with NaN; on a host a wall behind it."""

    def __init__(self, size: int, device: str) -> None:
        self.size = size
        if device == "cpu":
            self._all = at_a_wall(GUARD + size).fill_(0xFF)
        else:
            self._all = torch.full((size + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=device)
        self.bytes = self._all[GUARD:][:size]
        assert self.pointer % 128 == 0

    @property
    def pointer(self) -> int:
        return int(self.bytes.data_ptr())

    def guards_are_intact(self) -> bool:
        start = self.pointer - int(self._all.data_ptr())
        outside = torch.cat([self._all[:start], self._all[start + self.size :]])
        return bool((outside == 0xFF).all())


class PackedStep(OneLaunch):
    """A model's step whose packed weights and sync memory have guards."""

    def __init__(
        self, kernels: StepKernels, spec: ModelSpec, model: ReferenceModel, dtype: str, rows: int,
        device: str, quantised: QuantisedWeights | None = None,
    ) -> None:  # fmt: skip
        self._guarded: list[Guarded] = []
        super().__init__(kernels, spec, model, dtype, rows, device, quantised)

    def memory(self, size: int) -> Tensor:
        self._guarded.append(Guarded(size, self.device))
        return self._guarded[-1].bytes

    def guards_are_intact(self) -> bool:
        return all(each.guards_are_intact() for each in self._guarded)


def reference_step(
    model: ReferenceModel, ids: Any, positions: Any, lens: Any, states: list[Any]
) -> tuple[Tensor, list[Tensor]]:
    """Logits [rows, V] and new states in float64, computed where the model is; on the CPU."""
    device = next(model.parameters()).device
    wide = [torch.as_tensor(state).double().to(device) for state in states]
    ids, positions, lens = (torch.as_tensor(it).to(device) for it in (ids, positions, lens))
    logits, new = model(ids.reshape(-1, 1), positions, lens, wide, form="recurrent")
    return logits[:, 0].cpu(), [state.cpu() for state in new]
