"""weights.data: one file of raw tensors that all graphs of a bundle share, streamed from the checkpoint.

Tensors lie one after another in the order of the reference model's parameters, little-endian, row-major,
at offsets that are multiples of 4096 for large tensors (so that a runtime can map them) and of 64 for
small ones.
Linear weights are stored transposed, [in, out]; quantised ones are not, and are two tensors each.
docs/bundle-format.md describes the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import ZERO, Matrix
from dijiang_export.graph.tidy import TRANSPOSED_KEY
from dijiang_export.quantise.blocks import pack, quantise
from dijiang_export.quantise.recipe import Recipe
from dijiang_export.reference.model import ReferenceModel

FILE_NAME = "weights.data"
PAGE, CACHE_LINE = 4096, 64
BLOCK_BYTES = 64 << 20
"""Most of one tensor that is in memory at a time."""
QUANTISED_BLOCK_BYTES = 8 << 20
"""The same of a tensor that is quantised, which takes some ten times as much."""
FLUSH_BYTES = 256 << 20
"""Written between two requests to the disk."""

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
DATA_TYPES = {dtype: kind for kind, dtype in TORCH_DTYPES.items()}


class WeightSource(Protocol):
    """Where canonical tensors come from: `checkpoint.Checkpoint`, or tensors in memory."""

    def row_blocks(self, name: str, max_bytes: int = ...) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) blocks of the canonical tensor `name`, in order."""
        ...


@dataclass(frozen=True)
class StoredWeight:
    """One tensor in weights.data."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    """As stored: [in, out] if transposed."""
    transposed: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * int(self.dtype.bitwidth) // 8


Layout = dict[str, StoredWeight]


def layout_of(
    spec: ModelSpec, dtype: torch.dtype, recipe: Recipe | None = None, *, zero_points: bool = False
) -> Layout:
    """Lay out a model's parameters in the reference model's order, then inv_freq.

    Args:
        spec: the model.
        dtype: of all that is not quantised.
        recipe: of what is; its matrices are two tensors each, or four in two parts.
        zero_points: add one tensor for each format that holds what its elements are counted from, as often
            as the largest matrix has blocks: DequantizeLinear wants one for each block.
    """
    model = ReferenceModel(spec, dtype=dtype, device="meta")
    linear = {f"{path}.weight" for path, child in model.named_modules() if isinstance(child, nn.Linear)}
    parts = {} if recipe is None else recipe.parts
    found: list[StoredWeight] = []
    for name, tensor in (*model.named_parameters(), ("inv_freq", model.get_buffer("inv_freq"))):
        if name in parts:
            found += [one for part in parts[name] for one in _tensors_of(part)]
            continue
        # A tied head is listed once, as the embedding, which Gather reads as it is.
        transposed = name in linear
        shape = tuple(tensor.shape)[::-1] if transposed else tuple(tensor.shape)
        found.append(StoredWeight(name, DATA_TYPES[tensor.dtype], shape, transposed, 0))
    if recipe is not None and zero_points:
        found += _zero_points(recipe.stored)
    layout: Layout = {}
    end = 0
    for stored in found:
        alignment = PAGE if stored.nbytes >= PAGE else CACHE_LINE
        offset = -(-end // alignment) * alignment
        layout[stored.name] = dataclasses.replace(stored, offset=offset)
        end = offset + stored.nbytes
    return layout


def _tensors_of(part: Matrix) -> tuple[StoredWeight, StoredWeight]:
    return (
        StoredWeight(part.stored_name, ir.DataType.UINT8, part.stored_shape, False, 0),
        StoredWeight(part.scale_name, ir.DataType.FLOAT16, part.scale_shape, False, 0),
    )


def _zero_points(matrices: Sequence[Matrix]) -> Iterator[StoredWeight]:
    for kind in ZERO:
        nbytes = [int(np.prod(m.scale_shape)) * m.bits // 8 for m in matrices if m.format == kind]
        if nbytes:
            yield StoredWeight(zero_point_name(kind), ir.DataType.UINT8, (max(nbytes),), False, 0)


def zero_point_name(kind: str) -> str:
    """Of the tensor that `layout_of` adds for a format."""
    return f"zero_points.{kind}"


def check_layout(layout: Layout, weights: Iterable[ir.Value]) -> None:
    """A traced graph's weights must be those of `layout`, which quantises nothing.

    Raises:
        AssertionError: tracing and layout disagree; a defect here.
    """
    for value in weights:
        assert value.name is not None and value.shape is not None
        stored = layout[value.name]
        found = (value.dtype, tuple(value.shape), TRANSPOSED_KEY in value.metadata_props)
        assert found == (stored.dtype, stored.shape, stored.transposed), f"{value.name}: {found}, {stored}"


def write(
    path: Path,
    layout: Layout,
    source: WeightSource,
    extra: dict[str, Tensor],
    recipe: Recipe | None = None,
    *,
    on_bytes: Callable[[int], None],
) -> None:
    """Write every tensor of `layout` to a new file, with one block in memory at a time.

    Args:
        path: weights.data, which must not exist.
        layout: from `layout_of`.
        source: delivers canonical tensors.
        extra: tensors that no checkpoint holds (inv_freq).
        recipe: what is quantised: the one that `layout` was made with.
        on_bytes: told how many bytes were written; what it raises ends the writing.

    Raises:
        CheckpointError: a value that the bundle's type cannot hold, or that cannot be quantised.
    """
    extra = extra | {
        zero_point_name(kind): _filled(layout[zero_point_name(kind)], zero if kind == "int8" else zero * 17)
        for kind, zero in ZERO.items()
        if zero_point_name(kind) in layout
    }
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, max(weight.offset + weight.nbytes for weight in layout.values()))
        with ThreadPoolExecutor(1) as disk:
            flushing: Future[None] | None = None
            unflushed = 0
            for written in _write_each(descriptor, layout, source, extra, recipe):
                on_bytes(written)
                unflushed += written
                # The disk works while the next blocks are read, instead of all at the end.
                if unflushed > FLUSH_BYTES and (flushing is None or flushing.done()):
                    if flushing is not None:
                        flushing.result()
                    flushing, unflushed = disk.submit(os.fdatasync, descriptor), 0
            if flushing is not None:
                flushing.result()  # a failed write is reported once, and here is who hears of it
    finally:
        os.close(descriptor)


def _write_each(
    descriptor: int, layout: Layout, source: WeightSource, extra: dict[str, Tensor], recipe: Recipe | None
) -> Iterator[int]:
    """Write tensor after tensor; after each block, how many bytes that was."""
    quantised = {} if recipe is None else {part.stored_name: part for part in recipe.stored}
    scales = {part.scale_name for part in quantised.values()}
    for weight in layout.values():
        if weight.name in quantised:
            yield from _write_quantised(descriptor, layout, quantised[weight.name], source)
        elif weight.name not in scales:
            for start, block in _blocks(weight, source, extra):
                _write_block(descriptor, weight, start, block)
                yield block.numel() * int(weight.dtype.itemsize)


def _write_quantised(descriptor: int, layout: Layout, part: Matrix, source: WeightSource) -> Iterator[int]:
    for start, block in source.row_blocks(part.source, QUANTISED_BLOCK_BYTES):
        first = max(part.first_row - start, 0)
        rows = block[first : max(part.first_row + part.rows - start, 0)]
        if len(rows):
            q, scale = quantise(rows, part.format, part.name)
            at = start + first - part.first_row
            yield write_quantised_rows(descriptor, layout, part, at, q, scale)


def write_quantised_rows(
    descriptor: int, layout: Layout, part: Matrix, start: int, q: Tensor, scale: Tensor
) -> int:
    """Write rows of a quantised matrix to their places; returns the bytes.

    Args:
        descriptor: weights.data.
        layout: where everything is.
        part: which matrix.
        start: the first row, of the part's.
        q: int8 [n, K].
        scale: float16 [n, K/32].
    """
    written = 0
    for name, rows in ((part.stored_name, pack(q, part.format)), (part.scale_name, scale)):
        data = _as_bytes(rows)
        _write_all(descriptor, data, layout[name].offset + start * (data.size // len(rows)))
        written += data.size
    return written


def _filled(weight: StoredWeight, value: int) -> Tensor:
    return torch.full(weight.shape, value, dtype=torch.uint8)


def _blocks(
    weight: StoredWeight, source: WeightSource, extra: dict[str, Tensor]
) -> Iterable[tuple[int, Tensor]]:
    if weight.name in extra:
        return [(0, extra[weight.name])]
    return source.row_blocks(weight.name, BLOCK_BYTES)


def _write_block(descriptor: int, weight: StoredWeight, start: int, block: Tensor) -> None:
    data = block if block.dtype == torch.uint8 else round_to(block, TORCH_DTYPES[weight.dtype], weight.name)
    item = int(weight.dtype.itemsize)
    if not weight.transposed:
        row = int(np.prod(weight.shape[1:])) * item
        _write_all(descriptor, _as_bytes(data), weight.offset + start * row)
        return
    columns = weight.shape[1]
    turned = _as_bytes(data.T)  # PyTorch transposes in cache-sized tiles: ten times faster than NumPy
    if block.shape[0] == columns:
        _write_all(descriptor, turned, weight.offset)
        return
    for index, part in enumerate(turned.reshape(block.shape[1], -1)):
        _write_all(descriptor, part, weight.offset + (index * columns + start) * item)


def round_to(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`block` in the bundle's type.

    Raises:
        CheckpointError: a finite value overflows it.
    """
    rounded = block.to(dtype)
    if rounded.dtype != block.dtype and not bool(torch.isfinite(rounded).all()):
        largest = block.abs().max().item()
        raise CheckpointError(
            f"{name} does not fit into {str(dtype).removeprefix('torch.')}",
            got=f"a weight of magnitude {largest:.4g}",
            expected=f"at most {torch.finfo(dtype).max:.4g}",
            hint="export with --dtype float32 or --dtype bfloat16",
        )
    return rounded


def _as_bytes(data: Tensor) -> npt.NDArray[np.uint8]:
    flat = data.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _write_all(descriptor: int, data: npt.NDArray[Any], offset: int) -> None:
    view = data.reshape(-1).view(np.uint8).data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def attach(graph: ir.Graph, layout: Layout, folder: Path) -> None:
    """Turn a graph's weight inputs into initializers that point into weights.data."""
    for value in [v for v in graph.inputs if v.name in layout]:
        assert value.name is not None
        weight = layout[value.name]
        graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            FILE_NAME,
            weight.offset,
            weight.nbytes,
            weight.dtype,
            shape=ir.Shape(weight.shape),
            name=value.name,
            doc_string="stored transposed, [in, out]" if weight.transposed else None,
            base_dir=folder,
        )
        value.metadata_props.clear()
        graph.register_initializer(value)
