"""A checkpoint's layers as PyTorch modules whose matrices stay on disk.

A matrix is read in blocks of rows, which are rounded to the bundle's type (dequantised ones are what they
are), widened, multiplied with and dropped. So memory does not grow with the model, and what is computed is
the arithmetic of an engine with the weights that it has, not the rounding of weights that it cannot avoid.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dijiang_export.export.dequantised import ModelWeights, is_exact
from dijiang_export.graph.weights import round_to
from dijiang_export.reference.model import AttentionOp, Block, ReferenceModel, is_op_constant
from dijiang_export.reference.rope import inverse_frequencies

BLOCK_BYTES = 16 << 20
"""Of the stored weight; float64 blocks are up to four times as large."""
SEGMENT_BYTES = 64 << 20
"""Of the widest activation of a segment, in float64; a few of them are alive at a time."""
LEAST_SEGMENT = 512
"""Tokens, however wide the model: each segment reads all weights again."""


class StreamedModel:
    """One checkpoint's parts, to be computed with in inference mode.

    Args:
        checkpoint: where weights come from.
        dtype: to which they are rounded.
        work: in which everything is computed.
    """

    def __init__(
        self, checkpoint: ModelWeights, dtype: torch.dtype, work: torch.dtype = torch.float64
    ) -> None:
        self.checkpoint, self.dtype, self.work = checkpoint, dtype, work
        self.spec = checkpoint.spec
        self.names = set(checkpoint.names())
        self.inv_freq = inverse_frequencies(self.spec)
        self._positions: Tensor | None = None
        """OPT's table, once it was needed."""

    def segment_tokens(self) -> int:
        """How many tokens at a time keep activations bounded."""
        spec = self.spec
        widest = max(spec.qkv_size, spec.intermediate_size, spec.hidden_size)
        return max(LEAST_SEGMENT, SEGMENT_BYTES // (8 * widest))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Blocks of rows of a weight, rounded to the bundle's type first."""
        for _, block in self.checkpoint.row_blocks(name, BLOCK_BYTES):
            yield self._rounded(block, name).to(self.work)

    def _rounded(self, block: Tensor, name: str) -> Tensor:
        """In the bundle's type; q · scale is exact, and no weight of that type."""
        return block if is_exact(self.checkpoint, name) else round_to(block, self.dtype, name)

    def tensor(self, name: str) -> Tensor:
        """A whole small parameter, rounded; op constants are not, except P."""
        value = self.checkpoint.tensor(name)
        if name.endswith(".proj"):
            return value.float().to(self.dtype).to(self.work)  # the op casts float32 P to T
        kept = value if is_op_constant(name) else round_to(value, self.dtype, name)
        return kept.to(self.work)

    def layer(self, index: int) -> Block:
        """Layer `index`."""
        with torch.device("meta"):
            block = Block(self.spec)
        self.load(block, f"layers.{index}.")
        return block

    def run_layer(self, block: Block, hidden: Tensor, op: AttentionOp) -> Tensor:
        """One layer, [B, n, h] -> [B, n, h]; `op` knows the rows' states, positions and lengths."""
        unused = torch.zeros(1)
        result: Tensor
        result, _ = block(hidden, unused, unused, unused, self.inv_freq, op)
        return result

    def load(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its small parameters, and let its matrices be streamed."""
        for path, child in list(module.named_modules()):
            if isinstance(child, nn.Linear):
                bias = self.tensor(f"{prefix}{path}.bias") if child.bias is not None else None
                name = f"{prefix}{path}.weight"
                if name == "lm_head.weight" and name not in self.names:
                    name = "embed_tokens.weight"
                parent, _, leaf = path.rpartition(".")
                setattr(module.get_submodule(parent), leaf, StreamedLinear(self, name, bias))
        state = {name: self.tensor(prefix + name) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)

    def product_input(self, name: str, x: Tensor) -> Tensor:
        """What the matrix `name` is multiplied with, for x [..., in]."""
        return x

    def embed(self, ids: npt.NDArray[np.int64], position: int) -> Tensor:
        """[n, h] for n tokens of one sequence, the first of them at `position`."""
        vectors = [self.checkpoint.rows("embed_tokens.weight", int(i), int(i) + 1) for i in ids]
        x = self._rounded(torch.cat(vectors), "embed_tokens.weight").to(self.work)
        if self.spec.embedding_size != self.spec.hidden_size:
            x = StreamedLinear(self, "project_in.weight", None)(x)
        if self.spec.position_embeddings:
            if self._positions is None:
                self._positions = self.tensor("embed_positions.weight")
            first = position + self.spec.position_offset
            rows = torch.arange(first, first + len(ids)).clamp(max=len(self._positions) - 1)  # of padding
            x = x + self._positions[rows]
        return x

    def head(self, model: ReferenceModel, hidden: Tensor) -> Tensor:
        """[K, h] -> [K, V]."""
        return model.head(hidden)


class StreamedLinear(nn.Module):
    """x @ Wᵀ + b with W read in blocks of rows."""

    def __init__(self, model: StreamedModel, name: str, bias: Tensor | None) -> None:
        super().__init__()
        self.model, self.name, self.bias = model, name, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        x = self.model.product_input(self.name, x)
        parts = [x @ block.T for block in self.model.blocks(self.name)]
        y: Tensor = torch.cat(parts, dim=-1)
        return y if self.bias is None else y + self.bias
