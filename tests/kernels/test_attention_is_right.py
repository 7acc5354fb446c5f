"""Are the attention kernels right? The page to read first: what they compute, in twenty lines of PyTorch,
and how close they come to it.

`naive` is the op's definition (docs/mathematics.md) for one sequence, token by token. It runs in float64
here and is the truth. Two programs are held to it: the project's reference model, on any CPU, and the CUDA
library, where there is a GPU and a library (DIJIANG_KERNELS, or what `dijiang-export build-plugin` made).
test_kernels_gpu.py is the long version: every head size, trained tables, strided and aliased memory, bounds
that are derived.

    pytest tests/kernels/test_attention_is_right.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.makers.kernel_engine import find_library
from torch import Tensor
from torch.nn.functional import group_norm, silu

from dijiang_engines.kernels.attention import AttentionBuffers, Geometry, load_kernels
from dijiang_export.reference import attention as reference

EPSILON = 1e-5
Tensors = dict[str, Tensor]
Program = Callable[[Tensors, Geometry], tuple[Tensor, Tensor]]


def naive(x: Tensors, g: Geometry, row: int) -> tuple[Tensor, Tensor]:
    """Output [length, H d] and state [H, d, d] of one row, in the type of `x`."""
    length, heads, d, half = int(x["seq_lens"][row]), g.num_heads, g.head_dim, g.rotary_dim // 2
    packed = x["qkv"][row, :length].reshape(length, -1, d)
    q, k, v = packed.split([heads, g.num_kv_heads, g.num_kv_heads], dim=1)
    k, v = (u.repeat_interleave(heads // g.num_kv_heads, dim=1) for u in (k, v))
    angles = (x["positions"][row] + torch.arange(length))[:, None, None] * x["inv_freq"]

    def features(u: Tensor) -> Tensor:  # RoPE on the first dimensions, then softmax(u P)
        a, b, rest = u.split([half, half, d - 2 * half], dim=-1)
        turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest)
        return torch.softmax(torch.cat(turned, dim=-1) @ x["proj"], dim=-1)

    q, k, state, read = features(q), features(k), x["past_state"][row], []
    for t in range(length):
        state = x["log_decay"].exp()[:, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
        read.append((q[t, :, None, :] @ state).flatten())
    normed = group_norm(torch.stack(read), d, x["norm_weight"], x["norm_bias"], EPSILON)
    return normed * silu(x["gate"][row, :length]), state


def reference_model(x: Tensors, g: Geometry) -> tuple[Tensor, Tensor]:
    """The reference model's op, chunk by chunk, on the CPU."""
    names = (
        "qkv", "gate", "past_state", "positions", "seq_lens", "proj", "norm_weight", "norm_bias", "inv_freq",
    )  # fmt: skip
    decay = reference.Decay(x["log_decay"])
    return reference.dijiang_attention(*(x[name] for name in names), decay=decay, attributes=g)


def cuda_library(x: Tensors, g: Geometry) -> tuple[Tensor, Tensor]:
    """The C ABI, on the GPU. What is written is NaN before."""
    kernels, x = load_kernels(find_library()[0]), {name: tensor.cuda() for name, tensor in x.items()}
    batch, length, _ = x["qkv"].shape
    sizes = kernels.workspace_size(g, batch, length), kernels.sync_size(g, batch, length)
    x["output"] = torch.full_like(x["gate"], torch.nan)
    x["present_state"] = torch.full_like(x["past_state"], torch.nan)
    x["workspace"] = torch.full([sizes[0] // 4 + 1], torch.nan, device="cuda")
    x["sync"] = torch.zeros(sizes[1] // 4 + 1, dtype=torch.int32, device="cuda")
    addresses = {name: tensor.data_ptr() for name, tensor in x.items()}
    buffers = AttentionBuffers(**addresses, workspace_size=sizes[0], sync_size=sizes[1])
    kernels.attention(g, batch, length, buffers, torch.cuda.current_stream().cuda_stream)
    return x["output"].cpu(), x["present_state"].cpu()


LIBRARY, MISSING = find_library()
PROGRAMS = [
    reference_model,
    pytest.param(cuda_library, marks=pytest.mark.skipif(LIBRARY is None, reason=MISSING)),
]
SHAPES = [  # B, L, H, Hkv, d, r
    (1, 1, 4, 4, 64, 16),  # one token: the decode kernels
    (5, 1, 8, 2, 128, 32),
    (3, 63, 8, 8, 64, 16),  # several: the prefill kernels
    (2, 130, 16, 16, 80, 20),
    (2, 350, 4, 2, 128, 128),
    (1, 200, 8, 8, 256, 64),
    (2, 70, 3, 1, 48, 0),  # groups that straddle heads, no RoPE, a head size without kernels of its own
]
BOUNDS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
"""|got - truth| / |truth|: some roundings of T (2^-24, 2^-11, 2^-8); a wrong term is off by 0.1 and more."""


def inputs(g: Geometry, batch: int, length: int, dtype: torch.dtype) -> Tensors:
    """Fresh random tensors of a call. P is a number of T, as the kernels round it. The last row is padded."""
    heads, d, random = g.num_heads, g.head_dim, torch.Generator().manual_seed(length + g.head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    seq_lens = torch.full([batch], length, dtype=torch.int32)
    seq_lens[-1] = length - length // 3
    return {
        "qkv": normal(batch, length, g.packed_width).to(dtype),
        "gate": normal(batch, length, g.width).to(dtype),
        "past_state": 4 * normal(batch, heads, d, d) / d,
        "positions": torch.arange(batch, dtype=torch.int32) * 1000,
        "seq_lens": seq_lens,
        "proj": (normal(d, d) / d**0.5).to(dtype).float(),
        "norm_weight": 1 + normal(heads * d) / 4,
        "norm_bias": normal(heads * d) / 4,
        "inv_freq": 10000.0 ** -(torch.arange(max(g.rotary_dim // 2, 1)) / max(g.rotary_dim // 2, 1)),
        "log_decay": (1 - 2.0 ** -torch.linspace(2, 7, heads)).log(),
    }


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_computes_the_definition(program: Program, shape: tuple[int, ...], dtype: str) -> None:
    batch, length, heads, kv_heads, d, rotary = shape
    geometry = Geometry(heads, kv_heads, d, rotary, dtype, epsilon=EPSILON)  # type: ignore[arg-type]
    x = inputs(geometry, batch, length, getattr(torch, dtype))
    output, state = program(x, geometry)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in x.items()}
    for row in range(batch):
        valid = int(x["seq_lens"][row])
        true_output, true_state = naive(wide, geometry, row)
        assert error(output[row, :valid], true_output) <= BOUNDS[dtype]
        assert error(state[row], true_state) <= BOUNDS[dtype]
        assert not output[row, valid:].any()  # padding is zero


@pytest.mark.parametrize("part", ["log_decay", "positions", "proj", "past_state", "norm_weight", "gate"])
def test_the_bound_is_tight_enough_to_see_a_wrong_part(part: str) -> None:
    """The same with one operand a little wrong fails in the widest type, so the bounds say something."""
    geometry = Geometry(8, 8, 64, 16, "bfloat16", epsilon=EPSILON)
    x = inputs(geometry, 1, 100, torch.bfloat16)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in x.items()}
    truth, _ = naive(wide, geometry, 0)
    wide[part] = wide[part] + 1 if part == "positions" else wide[part] * 1.25
    assert error(naive(wide, geometry, 0)[0], truth) > BOUNDS["bfloat16"]
