"""How a bundle stores the matrices of its model: as floats, or quantised in blocks to 8 or 4 bits.

A quantised matrix W [N, K] (N outputs, K inputs, as PyTorch has it) is cut into blocks of `BLOCK` along K.
An element is q · scale of its block, where q is an integer and the scale a float16. In weights.data lie

    <name>.int8   uint8 [N, K/32, 32]: q + 128, q in -127..127
    <name>.int4   uint8 [N, K/32, 16]: q + 8, q in -8..7; byte j has element 2j low, element 2j+1 high
    <name>.scale  float16 [N, K/32]; may be negative

which is what com.microsoft::MatMulNBits reads (ContribOperators.md of onnxruntime@v1.32.0), and, taken
as UINT8 or UINT4 [N, K], what DequantizeLinear of opset 21 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dijiang_engines.spec import ModelSpec

WeightFormat = Literal["float", "int8", "int4"]
MatrixFormat = Literal["int8", "int4"]
Activations = Literal["float", "int8"]
"""What a product of a quantised matrix multiplies with: the activations as they are, or rounded to int8 in
blocks of 32 (MatMulNBits' accuracy_level 4)."""

BLOCK = 32
_FORMATS: Mapping[str, MatrixFormat] = {"int8": "int8", "int4": "int4"}
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
ZERO: Mapping[str, int] = {"int8": 128, "int4": 8}
"""What is added to an element before it is stored."""
ZERO_BYTE: Mapping[str, int] = {"int8": 0x80, "int4": 0x88}
"""A stored byte of elements that are 0: the highest bit of each number in it."""

QKV = "attention.qkv.weight"
QK, V = "attention.qkv.qk.weight", "attention.qkv.v.weight"
"""The rows of q and k, and those of v, where they are stored as two matrices."""


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix as it is stored."""

    name: str
    """The canonical name, or that of a part."""
    source: str
    """The canonical name."""
    first_row: int
    """Of the canonical matrix."""
    rows: int
    """N."""
    columns: int
    """K, a multiple of BLOCK."""
    format: MatrixFormat

    @property
    def bits(self) -> int:
        """8 or 4."""
        return BITS[self.format]

    @property
    def stored_name(self) -> str:
        """Of the tensor with the elements."""
        return f"{self.name}.{self.format}"

    @property
    def scale_name(self) -> str:
        """Of the tensor with the scales."""
        return f"{self.name}.scale"

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Bytes: [N, K/32, 16 or 32]."""
        return (self.rows, self.columns // BLOCK, BLOCK * self.bits // 8)

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Scales: [N, K/32]."""
        return (self.rows, self.columns // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of elements and scales."""
        return self.rows * self.columns * self.bits // 8 + 2 * self.rows * (self.columns // BLOCK)


def matrix_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Canonical name -> [N, K] of every matrix that can be quantised, in the order of weights.data.

    P, norms, biases, decay and OPT's table of positions never are.
    """
    h, e, v = spec.hidden_size, spec.embedding_size, spec.vocab_size
    width, inner = spec.attention_size, spec.intermediate_size
    shapes = {"embed_tokens.weight": (v, e)}
    if e != h:
        shapes |= {"project_in.weight": (h, e), "project_out.weight": (e, h)}
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        shapes |= {
            at + QKV: (spec.qkv_size, h),
            f"{at}attention.gate.weight": (width, h),
            f"{at}attention.dense.weight": (h, width),
            f"{at}mlp.up.weight": (inner, h),
        }
        if spec.gated_mlp:
            shapes[f"{at}mlp.gate.weight"] = (inner, h)
        shapes[f"{at}mlp.down.weight"] = (h, inner)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (v, e)
    return shapes


def matrices(spec: ModelSpec, formats: Mapping[str, str]) -> dict[str, list[Matrix]]:
    """Canonical name -> its stored matrices, one or two, which follow each other row by row.

    Args:
        spec: the model.
        formats: name of each stored matrix -> int8 or int4; every canonical matrix, or both parts of one.

    Raises:
        ValueError: a matrix is missing, unknown or in both forms, a format is unknown, K is no multiple of
            BLOCK; the message is one clause about it.
    """
    left = dict(formats)
    found: dict[str, list[Matrix]] = {}
    for source, (rows, columns) in matrix_shapes(spec).items():
        if columns % BLOCK:
            raise ValueError(f"{source} has {columns} columns, no multiple of {BLOCK}")
        parts = [(source, rows)]
        if source.endswith(QKV) and source not in left:
            at, v_rows = source.removesuffix(QKV), spec.num_kv_heads * spec.head_dim
            parts = [(at + QK, rows - v_rows), (at + V, v_rows)]
        start = 0
        for name, count in parts:
            kind = left.pop(name, "")
            if kind not in _FORMATS:
                raise ValueError(f"{name} is {'not there' if not kind else 'of an unknown format'}")
            found.setdefault(source, []).append(Matrix(name, source, start, count, columns, _FORMATS[kind]))
            start += count
    if left:
        raise ValueError(f"the model has no matrix {min(left)[:80]!r}")
    return found
