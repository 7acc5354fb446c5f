"""What `bench kernels` measures, and the arithmetic around it: cells, bytes, operations, floors, ratios.

Imports no torch: all of this is known before a GPU is touched.

Two floors bound one call from below. It must move its tensors through device memory once, and it must do
its multiplications; at the measured ceilings (a large copy, a large matrix product) each takes a time, and
the larger is the floor. Two sets of bytes are counted:

    op    the whole of DijiangAttention: q, k, v and gate in, output out, state in and out
    core  the bare recurrence: q, k, v in, o out, and in decode the state in and out. No gate; the state of a
          prefill is small beside its tokens. What a kernel without gate and norm could be held to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dijiang_engines.errors import UsageError

Phase = Literal["decode", "prefill"]
Dtype = Literal["float32", "float16", "bfloat16"]

ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
STATE_BYTES = 4
CHUNK = 64
"""Tokens per chunk that the operations of a prefill are counted for."""

REFERENCE_COPY, REFERENCE_MATMUL = 4.25e12, 790e12
"""Bytes and operations per second of an H200, so that core floors of different runs can be compared."""


@dataclass(frozen=True)
class Shape:
    """Heads of one layer; as many key/value heads as query heads."""

    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads}x{self.head_dim}"


@dataclass(frozen=True)
class Cell:
    """One size at which everybody is measured."""

    phase: Phase
    shape: Shape
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.phase} {self.shape} B{self.batch} L{self.length}"

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.batch * self.length

    @property
    def state_elements(self) -> int:
        """Of all rows: B·H·d²."""
        return self.batch * self.shape.heads * self.shape.head_dim**2


@dataclass(frozen=True)
class Bytes:
    """What one call must move, in bytes."""

    state: int
    """Read and written once each."""
    qkv: int
    gate: int
    output: int

    @property
    def op(self) -> int:
        """Of the whole op."""
        return self.state + self.qkv + self.gate + self.output

    def core(self, phase: Phase) -> int:
        """Of the bare recurrence."""
        return (self.state if phase == "decode" else 0) + self.qkv + self.output


SHAPES = (Shape(16, 64), Shape(32, 80), Shape(32, 128), Shape(8, 256))
"""The heads of Pythia-410M, 2.8B, 6.9B and 1B."""
BATCHES = (1, 8, 64, 256)
PROMPTS = ((1, 512), (1, 2048), (1, 8192), (8, 2048))
"""(batch, length) of prefills."""


def cell_bytes(cell: Cell, dtype: Dtype) -> Bytes:
    """The bytes of one call; proj, norm and decay parameters are shared by all calls and not counted."""
    plane = cell.tokens * cell.shape.heads * cell.shape.head_dim * ITEM_BYTES[dtype]
    return Bytes(state=2 * STATE_BYTES * cell.state_elements, qkv=3 * plane, gate=plane, output=plane)


def cell_operations(cell: Cell, chunk: int = CHUNK) -> int:
    """Multiplications and additions (two per pair) of the matrix products of one call.

    Per token and head: two feature maps and, with the state, an update and a read-out, 2d² each; in a
    prefill also C keys times d and C values times d inside the token's chunk, 2Cd each.
    """
    d = cell.shape.head_dim
    inside = 4 * min(chunk, cell.length) * d if cell.phase == "prefill" else 0
    return cell.tokens * cell.shape.heads * (8 * d * d + inside)


def floor_seconds(nbytes: int, operations: int, copy: float, matmul: float) -> float:
    """The larger of the two floors.

    Args:
        nbytes: that must be moved.
        operations: that must be done.
        copy: bytes per second, read and written.
        matmul: operations per second.
    """
    return max(nbytes / copy, operations / matmul)


def core_floor_seconds(cell: Cell, dtype: Dtype) -> float:
    """The bare recurrence's floor at the fixed reference ceilings."""
    core = cell_bytes(cell, dtype).core(cell.phase)
    operations = cell_operations(cell) if cell.phase == "prefill" else 0
    return floor_seconds(core, operations, REFERENCE_COPY, REFERENCE_MATMUL)


def make_cells(
    shapes: Sequence[Shape] = SHAPES,
    batches: Sequence[int] = BATCHES,
    prompts: Sequence[tuple[int, int]] = PROMPTS,
    phases: Sequence[Phase] = ("decode", "prefill"),
) -> tuple[Cell, ...]:
    """All cells, in the order in which they are measured and shown.

    Args:
        shapes: of the heads.
        batches: of decode steps.
        prompts: (batch, length) of prefills, length at least 2.
        phases: which of the two.
    """
    cells: list[Cell] = []
    if "decode" in phases:
        cells += [Cell("decode", s, b, 1) for s in shapes for b in batches]
    if "prefill" in phases:
        cells += [Cell("prefill", s, b, n) for s in shapes for b, n in prompts]
    return tuple(dict.fromkeys(cells))


def parse_shape(text: str) -> Shape:
    """`16x64` as 16 heads of 64.

    Raises:
        UsageError: anything else, or a head size that the kernels do not have.
    """
    match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
    expected = "HEADSxSIZE such as 32x128, the size a multiple of 16 from 16 to 256"
    if match is None:
        raise UsageError("not a shape of heads", got=text, expected=expected)
    heads, head_dim = int(match[1]), int(match[2])
    if heads < 1 or head_dim not in range(16, 257, 16):
        raise UsageError("the kernels have no such heads", got=text, expected=expected)
    return Shape(heads, head_dim)


def parse_prompt(text: str) -> tuple[int, int]:
    """`8x2048` as a batch of 8 prompts of 2048 tokens; `2048` as one.

    Raises:
        UsageError: anything else, or fewer than two tokens.
    """
    match = re.fullmatch(r"(?:(\d+)[x×])?(\d+)", text.strip())
    expected = "BATCHxLENGTH such as 8x2048, or a length; at least 2 tokens"
    if match is None:
        raise UsageError("not a batch and length of prompts", got=text, expected=expected)
    batch, length = int(match[1] or 1), int(match[2])
    if batch < 1 or length < 2:
        raise UsageError("there is no such prefill", got=text, expected=expected)
    return batch, length


def buffer_sets(nbytes: int, cache_bytes: int, *, most: int = 512) -> int:
    """How many sets of `nbytes` to go round, so that none is still in the cache when it recurs.

    Three times the cache: what is evicted is not exactly what is oldest. At least 2, at most `most`.
    """
    return min(max(2, -(-3 * cache_bytes // max(nbytes, 1))), most)


def derive(
    cell: Cell,
    dtype: Dtype,
    medians: dict[str, float],
    copy: float | None,
    matmul: float | None,
) -> dict[str, Any]:
    """What follows from the medians (seconds) of one cell, by contestant, and from the ceilings.

    Returns:
        bytes, operations, both floors in seconds (`floor` None without ceilings), `bound` ("bytes" or
        "operations"), `ratios`: every other contestant's median over that of `ours`, and of `ours`:
        `over_floor`, `over_core_floor`, `share_of_copy` (its bytes over its time, of the copy's rate),
        None where unknown.
    """
    counted, operations = cell_bytes(cell, dtype), cell_operations(cell)
    floor = bound = None
    if copy and matmul:
        # A decode's products are vectors times matrices: bytes bind them, matrix units do not apply.
        used = operations if cell.phase == "prefill" else 0
        floor = floor_seconds(counted.op, used, copy, matmul)
        bound = "bytes" if floor == counted.op / copy else "operations"
    core = core_floor_seconds(cell, dtype)
    ours = medians.get("ours")
    return {
        "bytes": asdict(counted) | {"op": counted.op, "core": counted.core(cell.phase)},
        "operations": operations,
        "floor": floor,
        "bound": bound,
        "core_floor": core,
        "ratios": {n: s / ours for n, s in medians.items() if n != "ours"} if ours else {},
        "over_floor": ours / floor if ours and floor else None,
        "over_core_floor": ours / core if ours else None,
        "share_of_copy": counted.op / ours / copy if ours and copy else None,
    }


def geometric_mean(values: Iterable[float]) -> float | None:
    """Of positive numbers; None if there are none."""
    from math import exp, log

    logs = [log(v) for v in values]
    return exp(sum(logs) / len(logs)) if logs else None
