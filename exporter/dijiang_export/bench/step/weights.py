"""Models with random weights, and their matrices as a bundle of quantised weights stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix
from dijiang_export.quantise.blocks import dequantise, pack, quantise
from dijiang_export.reference.model import ReferenceModel, is_op_constant


@dataclass(frozen=True)
class QuantisedWeights:
    """The matrices of one model."""

    parts: Mapping[str, Sequence[Matrix]]
    """Canonical name -> stored matrices, as a manifest says it."""
    values: Mapping[str, Tensor]
    """Name of a stored matrix -> uint8 [N, K/32, 32 or 16]."""
    scales: Mapping[str, Tensor]
    """float16 [N, K/32]."""


def random_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 1) -> ReferenceModel:
    """Weights such that activations stay near one.

    Args:
        spec: of the model; its decay is geometric, as all of `shapes` are.
        dtype: of the weights.
        device: where they are made.
        seed: of what is drawn.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model = ReferenceModel(spec, dtype=dtype, device=str(device))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "log_decay":
            noise = -noise.abs() * 0.1
        elif "norm" in name and leaf.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif is_op_constant(name):
            noise = noise if leaf == "proj" else 0.1 * noise
        elif noise.dim() > 1:
            noise *= 1.0 if name.startswith("embed") else 0.5 / noise.shape[-1] ** 0.5
        else:
            noise *= 0.1
        parameter.data.copy_(noise)
    return model


def quantise_model(model: ReferenceModel, parts: Mapping[str, Sequence[Matrix]]) -> QuantisedWeights:
    """Quantise a model's matrices, and put what is stored in their place: q · scale.

    Args:
        model: on any device, of any type that holds q · scale exactly, or nearly; changed in place.
        parts: canonical name -> stored matrices.
    """
    values, scales = {}, {}
    state = model.state_dict()
    for source, stored in parts.items():
        weight = state[source]
        for it in stored:
            rows = slice(it.first_row, it.first_row + it.rows)
            q, scale = quantise(weight[rows], it.format, it.name)
            values[it.name], scales[it.name] = pack(q, it.format), scale
            weight[rows] = dequantise(q, scale).to(weight.dtype)
    return QuantisedWeights(parts, values, scales)


def widened(model: ReferenceModel, device: torch.device | str) -> ReferenceModel:
    """The same weights in float64, on a device."""
    wide = ReferenceModel(model.spec, dtype=torch.float64, device=str(device))
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return wide
