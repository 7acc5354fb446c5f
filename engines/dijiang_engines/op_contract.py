"""What the graphs' users have to know of DijiangAttention beyond its inputs and outputs."""

from __future__ import annotations


def chunk_size(head_dim: int) -> int:
    """Tokens in a chunk of the prefill graph, for heads of `head_dim`: C of docs/mathematics.md, section 4.

    64 measured best on CPUs up to d = 128, and 128 at d = 256 (docs/performance.md). A call with fewer
    tokens is one chunk.
    """
    return 128 if head_dim >= 256 else 64
