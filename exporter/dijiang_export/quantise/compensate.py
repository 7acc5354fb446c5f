"""Round a matrix so that its products stay close, not its elements: errors are passed on to later columns.

For inputs x with H = Σ x xᵀ the loss of a row is (w - ŵ) H (w - ŵ)ᵀ. Columns are rounded in order; what
rounding column i changes is made up for by the columns after it, as far as these can, which the Cholesky
factor U of H⁻¹ (H⁻¹ = Uᵀ U, upper) says: w_j -= (w_i - ŵ_i) / U_ii · U_ij for j > i. After Frantar et al.,
"GPTQ", arXiv 2210.17323, algorithm 1, with the scale of each block of 32 chosen when its turn comes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dijiang_engines.weight_formats import BLOCK, MatrixFormat
from dijiang_export.quantise.blocks import round_to_scale, scales

DAMPING = 0.01
"""Added to H's diagonal, in units of its mean: few tokens leave directions unseen. GPTQ's own value."""
MOST_COLUMNS = 4096
"""Of one H. Wider matrices are cut into pieces, between which no errors are passed on: it bounds memory."""


def pieces(columns: int) -> list[slice]:
    """The columns that share an H."""
    return [slice(start, min(start + MOST_COLUMNS, columns)) for start in range(0, columns, MOST_COLUMNS)]


def factor(hessian: Tensor) -> Tensor:
    """U [K, K] of H [K, K], float32, positive semidefinite. Columns that saw nothing stand alone."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item() or 1.0
    damping = DAMPING
    while True:
        damped = hessian.double()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.item():
                result: Tensor = upper.float()
                return result
        damping *= 10


def compensate(weights: Tensor, upper: Tensor, kind: MatrixFormat, name: str) -> tuple[Tensor, Tensor]:
    """Quantise rows of one piece.

    Args:
        weights: float32 [n, K], K a multiple of 32; is overwritten.
        upper: [K, K], from `factor`.
        kind: int8 or int4.
        name: of the matrix, for messages.

    Returns:
        q, int8 [n, K]; and scales, float16 [n, K/32].

    Raises:
        CheckpointError: as `blocks.scales`.
    """
    q = torch.empty(weights.shape, dtype=torch.int8)
    found = torch.empty((len(weights), weights.shape[1] // BLOCK), dtype=torch.float16)
    for index in range(found.shape[1]):
        start, stop = index * BLOCK, (index + 1) * BLOCK
        block, local = weights[:, start:stop], upper[start:stop, start:stop]
        found[:, index] = scale = scales(block, kind, name)
        errors = torch.empty_like(block)
        for i in range(BLOCK):
            rounded = round_to_scale(block[:, i], scale, kind)
            q[:, start + i] = rounded
            errors[:, i] = (block[:, i] - rounded.float() * scale.float()) / local[i, i]
            block[:, i + 1 :] -= torch.outer(errors[:, i], local[i, i + 1 :])
        weights[:, stop:] -= errors @ upper[start:stop, stop:]
    return q, found
