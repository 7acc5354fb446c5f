"""Rotary position embedding with angles accurate at any position.

The rotation pairs dimensions i and i + r/2 ("rotate half", modeling_gpt_neox_dijiang.py@3459531:392-396).
Angles are position · inv_freq with inv_freq rounded to float32 as the official code rounds it
(@3459531:316). The official code also rounds the product to float32, which at position 10^6 costs up to
0.03 radian; here the product is exact to float64. See docs/differences-from-official.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Float32 [r/2] angular frequencies in radians per token, with `rope_scaling` folded in.

    One zero when r = 0: the op contract has no empty tensors.

    Raises:
        CheckpointError: a scaling rule that depends on the sequence length or needs more than inv_freq.
    """
    if spec.rotary_dim == 0:
        return torch.zeros(1)
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    inv_freq = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return inv_freq
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        # The official class divides the position instead (@3459531:356): the same angle.
        return inv_freq / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(inv_freq, scaling)
    raise CheckpointError(
        f"rope_scaling of type {kind!r} is not supported",
        expected="linear or llama3",
        hint="dynamic, yarn and longrope change angles with the length of the sequence, or scale attention",
    )


def _llama3(inv_freq: Tensor, scaling: dict[str, float]) -> Tensor:
    """Llama 3.1's rule: keep short wavelengths, divide long ones, interpolate between.

    Source: transformers v5, modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def rotation(
    positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, *, official_angles: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of `positions`.

    Args:
        positions: integers of any shape [...].
        inv_freq: float32 [r/2].
        dtype: of the result.
        official_angles: round the angle to float32 as the official code does; for oracles only.

    Returns:
        Two tensors [..., r/2].
    """
    if official_angles:
        angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq.to(torch.float32)
    else:
        angles = positions.to(torch.float64).unsqueeze(-1) * inv_freq.to(torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the leading r dimensions of `x` [..., d] by `cos`, `sin` [..., r/2] (broadcast)."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
