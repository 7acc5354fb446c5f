"""Random but lifelike tensors for `bench kernels`, and what is computed from them in float64.

Everybody is given the same numbers. The feature map's P is an orthonormal DCT with uneven columns, decay is
the official initialisation, a quarter of each head turns with RoPE, every row is full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dijiang_engines.op_contract import Attributes
from dijiang_export.bench.kernels.cells import Cell, Shape
from dijiang_export.checkpoint.decay import official_gammas
from dijiang_export.reference.attention import (
    Decay,
    TokenTerms,
    chunked,
    dijiang_attention,
    feature_map,
)

EPSILON = 1e-5
ROTARY_SHARE = 4
"""One in so many dimensions turns, as in Pythia."""
LATEST = 4096
"""Positions are drawn below this."""

TOLERANCES = {"float32": 3e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest ‖got - exact‖ / ‖exact‖ of outputs and states of a kernel that is timed. Rounding to T costs 5e-4
(float16) or 4e-3 (bfloat16) a step, peers round their features and chunk states too, and multiply float32 as
TF32; a wrong decay, position or head is off by 0.1 and more."""


@dataclass(frozen=True)
class Layer:
    """The constants of one layer, float32 on the device; shapes as in docs/op-contract.md."""

    attributes: Attributes
    proj: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    inv_freq: Tensor
    log_decay: Tensor

    @property
    def decay(self) -> Decay:
        """Geometric."""
        return Decay(self.log_decay)


@dataclass(frozen=True)
class Call:
    """The tensors of one call: qkv T [B, L, 3·H·d], gate T [B, L, H·d], state float32 [B, H, d, d]."""

    qkv: Tensor
    gate: Tensor
    state: Tensor
    positions: Tensor
    seq_lens: Tensor

    def heads(self, attributes: Attributes) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as dense T [B, L, H, d]."""
        parts = self.qkv.view(*self.qkv.shape[:2], 3, attributes.num_heads, attributes.head_dim).unbind(2)
        q, k, v = (part.contiguous() for part in parts)
        return q, k, v


@dataclass(frozen=True)
class Exact:
    """What is right, float64: output [B, L, ...] and state [B, H, d, d]."""

    output: Tensor
    state: Tensor

    def errors(self, output: Tensor, state: Tensor) -> dict[str, float]:
        """Relative distances of a result; NaN where it holds one, or was not written after poisoning."""
        pairs = {"output": (output, self.output), "state": (state, self.state)}
        return {
            name: ((got.double().reshape(want.shape) - want).norm() / want.norm()).item()
            for name, (got, want) in pairs.items()
        }


def within(errors: dict[str, float], dtype: str) -> bool:
    """True if every error is at most the dtype's tolerance; NaN is not."""
    return all(error <= TOLERANCES[dtype] for error in errors.values())


def make_layer(shape: Shape, device: torch.device, seed: int = 0) -> Layer:
    """A layer with `shape`'s heads."""
    draw = torch.Generator(device).manual_seed(seed)
    heads, d = shape.heads, shape.head_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device)

    index = torch.arange(d, device=device, dtype=torch.float64)
    dct = torch.cos(math.pi / d * (index[:, None] + 0.5) * index) * math.sqrt(2 / d)
    dct[:, 0] /= math.sqrt(2)
    rotary = d // ROTARY_SHARE // 2 * 2
    exponents = torch.arange(0, rotary, 2, device=device, dtype=torch.float32) / rotary
    return Layer(
        attributes=Attributes(heads, heads, d, rotary, EPSILON),
        proj=(dct.float() * (1 + 0.3 * normal(d))).contiguous(),
        norm_weight=1 + 0.1 * normal(heads * d),
        norm_bias=0.1 * normal(heads * d),
        inv_freq=1.0 / 10000.0**exponents,
        log_decay=torch.from_numpy(official_gammas(heads)).log().float().to(device),
    )


def make_calls(
    cell: Cell, dtype: torch.dtype, device: torch.device, count: int = 1, seed: int = 1
) -> list[Call]:
    """`count` independent sets of tensors for `cell`; each tensor is dense and aligned to 16 bytes."""
    draw = torch.Generator(device).manual_seed(seed)
    heads, d = cell.shape.heads, cell.shape.head_dim
    calls = []
    for _ in range(count):
        tokens = (cell.batch, cell.length)
        calls.append(
            Call(
                qkv=torch.randn(*tokens, 3 * heads * d, generator=draw, device=device, dtype=dtype),
                gate=torch.randn(*tokens, heads * d, generator=draw, device=device, dtype=dtype),
                state=torch.randn(cell.batch, heads, d, d, generator=draw, device=device).mul_(0.1),
                positions=torch.randint(
                    LATEST, (cell.batch,), generator=draw, device=device, dtype=torch.int32
                ),
                seq_lens=torch.full((cell.batch,), cell.length, device=device, dtype=torch.int32),
            )
        )
    return calls


def exact_op(layer: Layer, call: Call) -> Exact:
    """The whole op in float64, with P rounded to T as every kernel holds it."""
    output, state = dijiang_attention(
        call.qkv.double(),
        call.gate.double(),
        call.state.double(),
        call.positions,
        call.seq_lens,
        layer.proj.to(call.qkv.dtype).double(),
        layer.norm_weight.double(),
        layer.norm_bias.double(),
        layer.inv_freq,
        decay=Decay(layer.log_decay.double()),
        attributes=layer.attributes,
    )
    return Exact(output, state)


def exact_core(layer: Layer, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Exact:
    """The bare recurrence in float64 over features q, k and values v, T [B, L, H, d] each."""
    log_decay = layer.log_decay.double().reshape(1, -1, 1).expand(q.shape[0], -1, q.shape[1])
    ones = torch.ones_like(log_decay)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    o, present = chunked(q, k, v, TokenTerms(log_decay, ones, ones), state.double())
    return Exact(o.transpose(1, 2), present)


def exact_features(layer: Layer, u: Tensor) -> Tensor:
    """φ(u) in float64, P rounded to u's type."""
    return feature_map(u.double(), layer.proj.to(u.dtype).double())
