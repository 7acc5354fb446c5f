"""The same step by the kernels of its parts: products, attention, products, a launch each, in every layer.

What an engine of two plans runs where it has no step in one launch: qkv, gate and the MLP's first product
with their norms; attention; dense and the MLP's second product with the residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dijiang_engines.kernels.attention import Geometry, Kernels
from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.kernels.peers import PeerError
from dijiang_export.bench.step.step import Step
from dijiang_export.reference.model import DTYPES, ReferenceModel


class Launches(Step):
    """A model's step.

    Args:
        attention: the library, for attention.
        products: and for the products around it.
        spec: of the model: GPT-NeoX with parallel residual and geometric decay.
        model: its weights, on the GPU.
        dtype: T, float16 or bfloat16.
        rows: sequences.

    Raises:
        PeerError: another kind of model.
    """

    def __init__(
        self, attention: Kernels, products: LinearKernels, spec: ModelSpec, model: ReferenceModel,
        dtype: str, rows: int,
    ) -> None:  # fmt: skip
        if not spec.parallel_residual or spec.gated_mlp or spec.decay != "geometric":
            raise PeerError("three launches a layer are of models with parallel residual", got=spec.family)
        kind, device = DTYPES[dtype], next(model.parameters()).device
        super().__init__(spec, rows, device, torch.int32)
        self._attention, self._products = attention, products
        self._weights = {
            name: value.to(kind if value.dim() == 2 and not name.endswith("proj") else torch.float32)
            for name, value in (model.state_dict() | {"inv_freq": model.get_buffer("inv_freq")}).items()
        }
        self._geometry = Geometry(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, rotary_dim=spec.rotary_dim,
            epsilon=spec.group_norm_epsilon, dtype=dtype,  # type: ignore[arg-type]
        )  # fmt: skip

        def made(*sizes: int) -> Tensor:
            return torch.empty(rows, 1, *sizes, dtype=kind, device=device)

        width = spec.attention_size
        self._hidden = made(spec.hidden_size), made(spec.hidden_size)
        self._qkv, self._gate, self._mixed = made(spec.qkv_size), made(width), made(width)
        self._inner, self._head = made(spec.intermediate_size), made(spec.vocab_size)
        sizes = (
            attention.workspace_size(self._geometry, rows, 1),
            attention.sync_size(self._geometry, rows, 1),
        )
        self._workspace, self._sync = (
            torch.zeros(max(size, 16), dtype=torch.uint8, device=device) for size in sizes
        )

    @property
    def logits(self) -> Tensor:
        """T [rows, V]."""
        return self._head[:, 0]

    def run(self) -> None:
        """Enqueue a step."""
        x, y = self._hidden
        torch.index_select(self._weights["embed_tokens.weight"], 0, self.ids, out=x[:, 0])
        for layer in range(self.spec.num_layers):
            self._layer(layer, x, y)
            x, y = y, x
        norm = self._norm("final_norm")
        self._multiply([LinearOutput(self._head, [self._term(x, "lm_head")], "identity", None, *norm)])

    def _layer(self, layer: int, x: Tensor, y: Tensor) -> None:
        at = f"layers.{layer}."
        norm, mlp_norm = self._norm(f"{at}attention_norm"), self._norm(f"{at}mlp_norm")
        up, activation = self._term(x, f"{at}mlp.up"), self.spec.activation
        self._multiply(
            [
                LinearOutput(self._qkv, [self._term(x, f"{at}attention.qkv")], "identity", None, *norm),
                LinearOutput(self._gate, [self._term(x, f"{at}attention.gate")], "identity", None, *norm),
                LinearOutput(self._inner, [up], activation, None, *mlp_norm),
            ]
        )
        of, state = self._weights, self.states[layer]
        self._attention.attention_tensors(
            self._geometry, qkv=self._qkv, gate=self._gate, past_state=state, present_state=state,
            positions=self.positions, seq_lens=self.lens, proj=of[f"{at}attention.proj"],
            norm_weight=of[f"{at}attention.norm_weight"], norm_bias=of[f"{at}attention.norm_bias"],
            inv_freq=of["inv_freq"], log_decay=of[f"{at}attention.log_decay"], output=self._mixed,
            workspace=self._workspace, sync=self._sync, stream=self._stream(),
        )  # fmt: skip
        terms = [self._term(self._mixed, f"{at}attention.dense"), self._term(self._inner, f"{at}mlp.down")]
        self._multiply([LinearOutput(y, terms, "identity", x)])

    def _term(self, x: Tensor, name: str) -> LinearTerm:
        return LinearTerm(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str) -> tuple[Any, ...]:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        return (self.spec.norm, weight, bias, self.spec.norm_epsilon)

    def _multiply(self, outputs: list[LinearOutput]) -> None:
        self._products.linear(outputs, constant_weights=True, stream=self._stream())

    def _stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream) if self.ids.is_cuda else 0
