"""Others' matrix products of given sizes: no norms, biases, activations, residuals, and no attention.

cublas     torch.matmul in T
tinygemm   PyTorch's `_weight_int4pack_mm`: int4 in groups of 32, activations in bfloat16
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_GROUP, _INNER_TILES = 32, 8
"""Of `_weight_int4pack_mm`: weights that share a scale, and how the packed tiles lie."""


def cublas(
    sizes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """One product after the other, each with random weights of its own.

    Args:
        sizes: (N, K) of each.
        rows: of every input.
        dtype: T.
        device: where.
    """
    weights = [torch.randn(n, k, device=device, dtype=dtype) * 0.02 for n, k in sizes]
    inputs = {k: torch.randn(rows, k, device=device, dtype=dtype) for _, k in sizes}
    outputs = {n: torch.empty(rows, n, device=device, dtype=dtype) for n, _ in sizes}

    def run() -> None:
        for weight in weights:
            n, k = weight.shape
            torch.matmul(inputs[k], weight.T, out=outputs[n])

    return run


def tinygemm(sizes: Sequence[tuple[int, int]], rows: int, device: torch.device) -> Callable[[], None]:
    """One product in int4 after the other, each with random weights of its own; arguments as of `cublas`."""
    aten: Any = torch.ops.aten
    weights = []
    for n, k in sizes:
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
        scales = (torch.randn(k // _GROUP, n, 2, device=device) * 0.01).bfloat16()
        weights.append((k, aten._convert_weight_to_int4pack(q, _INNER_TILES), scales))
    inputs = {k: torch.randn(rows, k, device=device, dtype=torch.bfloat16) for _, k in sizes}

    def run() -> None:
        for k, weight, scales in weights:
            aten._weight_int4pack_mm(inputs[k], weight, _GROUP, scales)

    return run
