"""A step in one launch for a reference model: its weights packed, its memory, and a reference in float64.

Works on whatever memory torch has: the GPU's for the kernels, the host's for their emulation.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import torch
from support.quantised_models import QuantisedWeights
from torch import Tensor

from dijiang_engines.building.step.tensors import LAYER_TENSORS
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.step import StepCall, StepKernels, StepModel, step_parts
from dijiang_engines.spec import ModelSpec
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


MATRICES = ("qkv", "gate", "dense", "up", "mlp_gate", "down", "head")
ALLOWED = {"float16": 5e-3, "bfloat16": 4e-2}
"""Of a difference's 2-norm over that of the logits or of a state: both types round what is multiplied."""
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


class PackedStep:
    """A model's step: packed weights and everything that a call needs."""

    def __init__(
        self, kernels: StepKernels, spec: ModelSpec, model: ReferenceModel, dtype: str, rows: int,
        device: str, quantised: QuantisedWeights | None = None,
    ) -> None:  # fmt: skip
        self.kernels, self.spec, self.rows, self.device = kernels, spec, rows, device
        self.model = StepModel.of(spec, dtype, None if quantised is None else quantised.parts)
        self.size = kernels.step_size(self.model, rows)
        self.packed, self.sync = Guarded(self.size.packed, device), Guarded(self.size.sync, device)
        self.sync.bytes.zero_()
        state = model.state_dict() | {"inv_freq": model.get_buffer("inv_freq")}
        kind = torch_dtype(dtype)
        for layer in range(spec.num_layers):
            tensors = {
                name: self._placed(state[f"layers.{layer}.{source}"], kind if name in MATRICES else None)
                for name, source in LAYER_TENSORS.items()
                if f"layers.{layer}.{source}" in state and (quantised is None or name not in MATRICES)
            }
            kernels.pack_step_layer(
                self.model, layer, {n: t.data_ptr() for n, t in tensors.items()},
                self.packed.pointer, self.size.packed, self.stream(),
            )  # fmt: skip
            self._wait()
        ends = {
            "norm_weight": self._placed(state["final_norm.weight"]),
            "inv_freq": self._placed(state["inv_freq"]),
        }
        if quantised is None:
            ends["head"] = self._placed(state["lm_head.weight"], kind)
        else:
            self._pack_quantised(quantised)
        if "final_norm.bias" in state:
            ends["norm_bias"] = self._placed(state["final_norm.bias"])
        kernels.pack_step_ends(
            self.model, {n: t.data_ptr() for n, t in ends.items()}, self.packed.pointer, self.size.packed,
            self.stream(),
        )  # fmt: skip
        self._wait()
        self.embedding_scales: Tensor | None = None
        if quantised is None:
            self.embedding = self._placed(state["embed_tokens.weight"], kind)
        else:
            self.embedding = self._placed(quantised.values["embed_tokens.weight"], torch.uint8)
            self.embedding_scales = self._placed(quantised.scales["embed_tokens.weight"], torch.float16)
        self.position_embedding = None
        if "embed_positions.weight" in state:
            self.position_embedding = self._placed(state["embed_positions.weight"], kind)
        shape = (rows, *spec.state_shape)
        self.states = [torch.zeros(shape, device=device) for _ in range(spec.num_layers)]
        self.logits = torch.full((rows, spec.vocab_size), float("nan"), device=device)
        self.ids, self.positions, self.lens = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )

    def _pack_quantised(self, quantised: QuantisedWeights) -> None:
        for part in step_parts(self.spec, quantised.parts):
            rows = slice(part.first_row, part.first_row + part.rows)
            values = self._placed(quantised.values[part.stored.name][rows], torch.uint8)
            scales = self._placed(quantised.scales[part.stored.name][rows], torch.float16)
            self.kernels.pack_step_matrix(
                self.model, part, values.data_ptr(), scales.data_ptr(), self.packed.pointer,
                self.size.packed, self.stream(),
            )  # fmt: skip
            self._wait()

    def _placed(self, tensor: Tensor, kind: torch.dtype | None = None) -> Tensor:
        return tensor.to(device=self.device, dtype=kind or torch.float32).contiguous()

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def stream(self) -> int:
        return 0 if self.device == "cpu" else int(torch.cuda.current_stream().cuda_stream)

    def run(self) -> None:
        """Enqueue a step over what ids, positions, lens and states hold."""
        position_embedding = self.position_embedding
        call = StepCall(
            packed=self.packed.pointer, embedding=self.embedding.data_ptr(),
            embedding_scales=0 if self.embedding_scales is None else self.embedding_scales.data_ptr(),
            position_embedding=0 if position_embedding is None else position_embedding.data_ptr(),
            input_ids=self.ids.data_ptr(), positions=self.positions.data_ptr(),
            seq_lens=self.lens.data_ptr(), states=[state.data_ptr() for state in self.states],
            logits=self.logits.data_ptr(), sync=self.sync.pointer, sync_size=self.size.sync,
            rows=self.rows, integers="int64",
        )  # fmt: skip
        self.kernels.step(self.model, call, self.stream())

    def start(self, ids: Any, positions: Any, lens: Any, states: list[Any]) -> None:
        """Fill in the inputs, and poison the logits."""
        for mine, given in ((self.ids, ids), (self.positions, positions), (self.lens, lens)):
            mine.copy_(torch.as_tensor(given).reshape(-1))
        for mine, given in zip(self.states, states, strict=True):
            mine.copy_(torch.as_tensor(given))
        self.logits.fill_(float("nan"))


def reference_step(
    model: ReferenceModel, ids: Any, positions: Any, lens: Any, states: list[Any]
) -> tuple[Tensor, list[Tensor]]:
    """Logits [rows, V] and new states in float64, computed where the model is; on the CPU."""
    device = next(model.parameters()).device
    wide = [torch.as_tensor(state).double().to(device) for state in states]
    ids, positions, lens = (torch.as_tensor(it).to(device) for it in (ids, positions, lens))
    logits, new = model(ids.reshape(-1, 1), positions, lens, wide, form="recurrent")
    return logits[:, 0].cpu(), [state.cpu() for state in new]


def wide_reference(spec: ModelSpec, model: ReferenceModel) -> ReferenceModel:
    """The same weights in float64, on the GPU."""
    wide = ReferenceModel(spec, dtype=torch.float64, device="cuda")
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return wide


def error(got: Tensor, expected: Tensor) -> float:
    """The difference's norm over the expected one's; infinite where something is not finite."""
    got = got.double().cpu()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).norm() / expected.norm())
