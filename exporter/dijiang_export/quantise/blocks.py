"""Round blocks of 32 weights to integers with one float16 scale, and back.

int8    scale = largest magnitude / 127,       q = round(w / scale) in -127..127
int4    scale = the element of largest magnitude / -8, q = round(w / scale) in -8..7

So an int4 block uses all sixteen values: its largest element is exactly -8 scales, and the scale's sign is
the opposite of that element's. Where the largest magnitude occurs with both signs, the negative one counts.
The quotient is by the scale as it is stored, in float32, and halves go to the even neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dijiang_engines.errors import CheckpointError
from dijiang_engines.weight_formats import BLOCK, ZERO, MatrixFormat

LIMITS: dict[MatrixFormat, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""Least and largest q."""


def scales(blocks: Tensor, kind: MatrixFormat, name: str) -> Tensor:
    """The scale of each block: float16 [...] for float32 [..., 32].

    A block of zeros has scale 0. A scale that float16 can only hold with few bits is taken a step larger
    where the largest element would be cut off.

    Raises:
        CheckpointError: a weight is not finite, or so large that float16 has no scale for it.
    """
    least, most = blocks.amin(-1), blocks.amax(-1)
    if not bool(torch.isfinite(most - least).all()):
        raise CheckpointError(f"{name} holds NaN or infinity", hint="such weights cannot be quantised")
    divisor = float(LIMITS[kind][1 if kind == "int8" else 0])
    largest = torch.maximum(most, -least) if kind == "int8" else torch.where(most > -least, most, least)
    exact = largest / divisor
    scale = exact.half()
    if bool(torch.isinf(scale).any()):
        raise CheckpointError(
            f"{name} cannot be quantised to {kind}",
            got=f"a weight of magnitude {float(largest.abs().max()):.4g}",
            expected=f"at most {65504 * abs(divisor):.4g}, for which float16 has a scale",
            hint="export with --weight-format float",
        )
    # Of normal numbers, float16 loses 2^-11 at most.
    cut = scale.float().abs() < exact.abs() * (1 - 2**-10)
    return torch.where(cut, _next_half(scale, exact), scale)


def _next_half(scale: Tensor, towards: Tensor) -> Tensor:
    """The float16 after `scale`, away from zero, on the side of `towards`."""
    bits = (scale.abs().view(torch.int16) + 1).view(torch.float16)
    return torch.where(towards < 0, -bits, bits)


def quantise(weights: Tensor, kind: MatrixFormat, name: str) -> tuple[Tensor, Tensor]:
    """Rows of a matrix -> integers and scales.

    Args:
        weights: [n, K], any float type; K a multiple of 32.
        kind: int8 or int4.
        name: of the matrix, for messages.

    Returns:
        q, int8 [n, K]; and scales, float16 [n, K/32].

    Raises:
        CheckpointError: as `scales`.
    """
    blocks = weights.float().reshape(len(weights), -1, BLOCK)
    scale = scales(blocks, kind, name)
    return round_to_scale(blocks, scale.unsqueeze(-1), kind).reshape(weights.shape), scale


def round_to_scale(weights: Tensor, scale: Tensor, kind: MatrixFormat) -> Tensor:
    """round(w / scale), cut to what `kind` has: int8, in the shape of float32 `weights`.

    Args:
        weights: float32.
        scale: float16, broadcast over `weights`.
        kind: int8 or int4.
    """
    wide = scale.float()
    ratio = torch.where(wide == 0, torch.zeros_like(weights), weights / wide)
    return ratio.round().clamp(*LIMITS[kind]).to(torch.int8)


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """q · scale, exact in float32: [n, K] from int8 [n, K] and float16 [n, K/32]."""
    blocks = q.reshape(len(q), -1, BLOCK).float() * scale.float().unsqueeze(-1)
    return blocks.reshape(q.shape)


def pack(q: Tensor, kind: MatrixFormat) -> Tensor:
    """Integers as they are stored: uint8 [n, K/32, 32 or 16] from int8 [n, K]."""
    shifted = (q.short() + ZERO[kind]).to(torch.uint8).reshape(len(q), -1, BLOCK)
    return shifted if kind == "int8" else shifted[..., 0::2] | (shifted[..., 1::2] << 4)


def unpack(stored: Tensor, kind: MatrixFormat) -> Tensor:
    """The opposite of `pack`: int8 [n, K] from uint8 [n, K/32, 32 or 16]."""
    if kind == "int4":
        stored = torch.stack((stored & 15, stored >> 4), -1)
    return (stored.reshape(len(stored), -1).short() - ZERO[kind]).to(torch.int8)
