"""A step in one launch: a model's packed weights, and everything that a call of dijiang_step needs."""

from __future__ import annotations

import torch
from torch import Tensor

from dijiang_engines.building.step.tensors import LAYER_TENSORS
from dijiang_engines.kernels.step import StepCall, StepKernels, StepModel, step_parts
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.step.step import Step
from dijiang_export.bench.step.weights import QuantisedWeights
from dijiang_export.reference.model import DTYPES, ReferenceModel

MATRICES = ("qkv", "gate", "dense", "up", "mlp_gate", "down", "head")
"""Of a layer and of the ends: in T where weights are not quantised. All else is float32."""

ALIGNMENT = 128
"""Bytes, of packed weights and of sync memory (plugins/include/dijiang/step.h)."""


class OneLaunch(Step):
    """A model's step.

    Args:
        kernels: the library.
        spec: of the model.
        model: its weights.
        dtype: T, float16 or bfloat16.
        rows: sequences.
        device: where everything goes; "cpu" for an emulated library.
        quantised: the matrices, or None: they are of type T.

    Raises:
        KernelError: the kernel has no such step, or it does not fit.
    """

    def __init__(
        self, kernels: StepKernels, spec: ModelSpec, model: ReferenceModel, dtype: str, rows: int,
        device: str, quantised: QuantisedWeights | None = None,
    ) -> None:  # fmt: skip
        super().__init__(spec, rows, device)
        self.kernels, self.device = kernels, device
        self.model = StepModel.of(spec, dtype, None if quantised is None else quantised.parts)
        self.size = kernels.step_size(self.model, rows)
        self.packed, self.sync = self.memory(self.size.packed), self.memory(self.size.sync)
        self.sync.zero_()
        state = model.state_dict() | {"inv_freq": model.get_buffer("inv_freq")}
        self._pack(state, DTYPES[dtype], quantised)
        self.embedding_scales: Tensor | None = None
        if quantised is None:
            self.embedding = self._placed(state["embed_tokens.weight"], DTYPES[dtype])
        else:
            self.embedding = self._placed(quantised.values["embed_tokens.weight"], torch.uint8)
            self.embedding_scales = self._placed(quantised.scales["embed_tokens.weight"], torch.float16)
        positions = state.get("embed_positions.weight")
        self.position_embedding = None if positions is None else self._placed(positions, DTYPES[dtype])
        self._logits = torch.full((rows, spec.vocab_size), float("nan"), device=device)

    @property
    def logits(self) -> Tensor:
        """float32 [rows, V]."""
        return self._logits

    def memory(self, size: int) -> Tensor:
        """So many bytes, aligned."""
        memory = torch.empty(size + ALIGNMENT - 1, dtype=torch.uint8, device=self.device)
        return memory[-memory.data_ptr() % ALIGNMENT :][:size]

    def run(self) -> None:
        """Enqueue a step."""
        call = StepCall(
            packed=self.packed.data_ptr(), embedding=self.embedding.data_ptr(),
            embedding_scales=_address(self.embedding_scales),
            position_embedding=_address(self.position_embedding),
            input_ids=self.ids.data_ptr(), positions=self.positions.data_ptr(),
            seq_lens=self.lens.data_ptr(), states=[state.data_ptr() for state in self.states],
            logits=self.logits.data_ptr(), sync=self.sync.data_ptr(), sync_size=self.size.sync,
            rows=self.rows, integers="int64",
        )  # fmt: skip
        self.kernels.step(self.model, call, self._stream())

    def _pack(self, state: dict[str, Tensor], kind: torch.dtype, quantised: QuantisedWeights | None) -> None:
        target = self.packed.data_ptr(), self.size.packed, self._stream()
        for layer in range(self.spec.num_layers):
            sources = {name: f"layers.{layer}.{source}" for name, source in LAYER_TENSORS.items()}
            tensors = {
                name: self._placed(state[source], kind if name in MATRICES else None)
                for name, source in sources.items()
                if source in state and (quantised is None or name not in MATRICES)
            }
            self.kernels.pack_step_layer(
                self.model, layer, {n: t.data_ptr() for n, t in tensors.items()}, *target
            )
            self._wait()
        ends = {
            "norm_weight": self._placed(state["final_norm.weight"]),
            "inv_freq": self._placed(state["inv_freq"]),
        }
        if "final_norm.bias" in state:
            ends["norm_bias"] = self._placed(state["final_norm.bias"])
        if quantised is None:
            ends["head"] = self._placed(state["lm_head.weight"], kind)
        else:
            self._pack_quantised(quantised)
        self.kernels.pack_step_ends(self.model, {n: t.data_ptr() for n, t in ends.items()}, *target)
        self._wait()

    def _pack_quantised(self, quantised: QuantisedWeights) -> None:
        for part in step_parts(self.spec, quantised.parts):
            rows = slice(part.first_row, part.first_row + part.rows)
            values = self._placed(quantised.values[part.stored.name][rows], torch.uint8)
            scales = self._placed(quantised.scales[part.stored.name][rows], torch.float16)
            self.kernels.pack_step_matrix(
                self.model, part, values.data_ptr(), scales.data_ptr(), self.packed.data_ptr(),
                self.size.packed, self._stream(),
            )  # fmt: skip
            self._wait()

    def _placed(self, tensor: Tensor, kind: torch.dtype | None = None) -> Tensor:
        return tensor.to(device=self.device, dtype=kind or torch.float32).contiguous()

    def _wait(self) -> None:
        """What was enqueued has read its tensors, which go out of use now."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _stream(self) -> int:
        return 0 if self.device == "cpu" else int(torch.cuda.current_stream().cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
