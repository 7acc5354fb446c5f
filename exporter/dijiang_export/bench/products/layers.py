"""Layers' products as an engine calls them: qkv, gate, the MLP's first; dense, the MLP's second; head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm
from dijiang_engines.kernels.packing import as_int8, pack
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix
from dijiang_export.bench.cells.device import relative_error
from dijiang_export.bench.kernels.peers import PeerError
from dijiang_export.bench.products.cells import FEW, planned
from dijiang_export.bench.step.shapes import Weights, formats
from dijiang_export.bench.step.weights import QuantisedWeights, quantise_model, random_model
from dijiang_export.reference.model import ACTIVATIONS, DTYPES

Part = Literal["first", "second", "head"]
FIRST = {"attention.qkv": "attention_norm", "attention.gate": "attention_norm", "mlp.up": "mlp_norm"}
"""A layer's first products, and the norms of their input."""
SECOND = ("attention.dense", "mlp.down")


@dataclass(frozen=True)
class Weight:
    """Some rows of a matrix, as the kernels read them."""

    tensor: Tensor
    """T [rows, K], or uint8, packed."""
    format: Literal["same", "int8", "int4"]
    first_row: int
    rows: int


class Layers:
    """So many layers of GPT-NeoX with parallel residual, whose weights are equal and lie in different memory.

    Few rows have norms inside their products; many have none, and a workspace.

    Args:
        kernels: the library.
        spec: of a model of one layer.
        weights: how the matrices are stored.
        rows: of every input.
        layers: how many.
        dtype: T, float16 or bfloat16.
        device: where everything is.

    Raises:
        PeerError: another kind of model.
    """

    def __init__(
        self, kernels: LinearKernels, spec: ModelSpec, weights: Weights, rows: int, layers: int, dtype: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        if not spec.parallel_residual or spec.gated_mlp or spec.norm != "layer_norm":
            raise PeerError("two calls a layer are of models with parallel residual", got=spec.family)
        self.few = rows <= FEW
        self._kernels, self._spec, self._rows = kernels, spec, rows
        self._kind, self._device = DTYPES[dtype], device
        model = random_model(spec, self._kind, device)
        stored = formats(spec, weights)
        quantised = None if stored is None else quantise_model(model, stored)
        self._state = model.state_dict()

        def as_read(name: str) -> list[Weight]:
            return self._as_read(f"{name}.weight", planned(spec, weights, rows), quantised)

        one = {name: as_read(f"layers.0.{name}") for name in (*FIRST, *SECOND)}
        more = [{name: [_copy(it) for it in parts] for name, parts in one.items()} for _ in range(layers - 1)]
        self.layers = [one, *more]
        self._head = as_read("lm_head") if self.few else []

        draw = torch.Generator(device).manual_seed(rows)
        self._x, self._mixed, self._inner = (
            torch.randn(rows, size, generator=draw, device=device).to(self._kind)
            for size in (spec.hidden_size, spec.attention_size, spec.intermediate_size)
        )
        self._made = {name: [self._empty(it.rows) for it in one[name]] for name in FIRST}
        self._y = self._empty(spec.hidden_size)
        self._logits = [self._empty(it.rows) for it in self._head]
        self._workspace: Tensor | None = None
        if not self.few:
            size = max(kernels.workspace_size(outputs) for outputs in (self._first(one), self._second(one)))
            self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is to run: the head with few rows."""
        return ("first", "second", "head") if self.few else ("first", "second")

    def run(self, *parts: Part) -> None:
        """Enqueue these parts of all layers."""
        for layer in self.layers:
            if "first" in parts:
                self._enqueue(self._first(layer))
            if "second" in parts:
                self._enqueue(self._second(layer))
        if "head" in parts:
            self._enqueue(self._of_norm("lm_head", self._head, self._logits, "final_norm"))

    def error(self) -> float:
        """The largest relative error of the last layer's outputs, and of logits, beside float64."""
        written = {**self._made, "lm_head": self._logits, "second": [self._y]}
        for output in (output for outputs in written.values() for output in outputs):
            output.fill_(float("nan"))
        self.run(*self.parts)
        expected = {
            name: self._exact(f"layers.0.{name}", self._x, f"layers.0.{norm}") for name, norm in FIRST.items()
        }
        dense, down = (
            self._exact(f"layers.0.{name}", x)
            for name, x in zip(SECOND, (self._mixed, self._inner), strict=True)
        )
        expected["second"] = self._x.double() + dense + down
        expected["mlp.up"] = ACTIVATIONS[self._spec.activation](expected["mlp.up"])
        if self.few:
            expected["lm_head"] = self._exact("lm_head", self._x, "final_norm")
        return max(relative_error(torch.cat(written[name], -1), want) for name, want in expected.items())

    def _first(self, layer: dict[str, list[Weight]]) -> list[LinearOutput]:
        found = []
        for name, norm in FIRST.items():
            activation: Any = self._spec.activation if name == "mlp.up" else "identity"
            found += self._of_norm(
                f"layers.0.{name}", layer[name], self._made[name], f"layers.0.{norm}", activation
            )
        return found

    def _second(self, layer: dict[str, list[Weight]]) -> list[LinearOutput]:
        inputs = zip(SECOND, (self._mixed, self._inner), strict=True)
        terms = [self._term(x, f"layers.0.{name}", it) for name, x in inputs for it in layer[name]]
        return [LinearOutput(self._y, terms, "identity", self._x)]

    def _of_norm(
        self, name: str, weights: Sequence[Weight], outputs: Sequence[Tensor], norm: str,
        activation: Any = "identity",
    ) -> list[LinearOutput]:  # fmt: skip
        of_input: tuple[Any, ...] = ()
        if self.few:
            scale, shift = self._vector(f"{norm}.weight"), self._vector(f"{norm}.bias")
            of_input = self._spec.norm, scale, shift, self._spec.norm_epsilon
        return [
            LinearOutput(output, [self._term(self._x, name, it)], activation, None, *of_input)
            for it, output in zip(weights, outputs, strict=True)
        ]

    def _term(self, x: Tensor, name: str, weight: Weight) -> LinearTerm:
        bias = self._vector(f"{name}.bias")
        if bias is not None:
            bias = bias[weight.first_row : weight.first_row + weight.rows]
        return LinearTerm(x, weight.tensor, bias, weight.format, bias_is_rounded=bias is not None)

    def _enqueue(self, outputs: list[LinearOutput]) -> None:
        stream = int(torch.cuda.current_stream().cuda_stream) if self._x.is_cuda else 0
        self._kernels.linear(outputs, constant_weights=True, workspace=self._workspace, stream=stream)

    def _exact(self, name: str, x: Tensor, norm: str | None = None) -> Tensor:
        """In float64, of the numbers that the kernel is given."""
        wide = x.double()
        if norm is not None and self.few:
            scale, shift = (self._state[f"{norm}.{part}"].double() for part in ("weight", "bias"))
            wide = layer_norm(wide, wide.shape[-1:], scale, shift, self._spec.norm_epsilon)
            wide = wide.to(self._kind).double()
        bias = self._state.get(f"{name}.bias")
        y: Tensor = wide @ self._state[f"{name}.weight"].double().T
        return y if bias is None else y + bias.double()

    def _vector(self, name: str) -> Tensor | None:
        """float32; made once, since its address must last."""
        found = self._state.get(name)
        if found is not None and found.dtype != torch.float32:
            found = self._state[name] = found.float()
        return found

    def _as_read(
        self, name: str, plan: dict[str, list[Matrix]] | None, quantised: QuantisedWeights | None
    ) -> list[Weight]:
        if plan is None or quantised is None:
            weight = self._state[name].to(self._kind).contiguous()
            return [Weight(weight, "same", 0, len(weight))]
        found = []
        for part in plan[name]:
            rows = range(part.first_row, part.first_row + part.rows)
            stored = [it for it in quantised.parts[name] if it.first_row in rows]
            values = [quantised.values[it.name].cpu().numpy() for it in stored]
            same = [
                v if it.format == part.format else as_int8(v) for it, v in zip(stored, values, strict=True)
            ]
            scales = torch.cat([quantised.scales[it.name] for it in stored])
            packed = pack(part.format, np.concatenate(same), scales.cpu().numpy())
            tensor = torch.from_numpy(packed).to(self._device)
            found.append(Weight(tensor, part.format, part.first_row, part.rows))
        return found

    def _empty(self, size: int) -> Tensor:
        return torch.empty(self._rows, size, dtype=self._kind, device=self._device)


def _copy(weight: Weight) -> Weight:
    return replace(weight, tensor=weight.tensor.clone())
