"""Packs a model's step for the GPU that is here: the constants of a layer DijiangStep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.building.step.tensors import StepTensors
from dijiang_engines.errors import RunnerError
from dijiang_engines.kernels.step import StepKernels, StepModel, StepSize
from dijiang_engines.nvidia.cuda import Buffer, Cuda, Stream

Words = npt.NDArray[np.int32]

LINE = 32
"""int32 of a row of the packed weights: the 128 bytes that their beginning is a multiple of."""
MOST_ELEMENTS = 2**31 - 1
"""Of one tensor of TensorRT's (NvInferRuntime.h, Dims: the product of the sizes)."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class StepConstants:
    """What the layer reads, as int32, which TensorRT neither converts nor copies."""

    size: StepSize
    packed: Words
    """[size.packed / 128, 32]."""
    embedding: Words
    """[V, h/2]; quantised, [V, h/4] or [V, h/8]."""
    embedding_scales: Words | None
    """float16 [V, h/32] in lines, [.., 32], zeros behind them; None: the embedding is not quantised."""
    position_embedding: Words | None
    """[rows, h/2]."""


def pack_step(
    kernels: StepKernels, cuda: Cuda, model: StepModel, tensors: StepTensors, rows: int
) -> StepConstants:
    """Pack on the GPU, a layer at a time.

    Args:
        kernels: the plugin's library.
        cuda: the GPU that the plan is built for: how many multiprocessors it has decides the order.
        model: the geometry.
        tensors: its weights, quantised if the model's are.
        rows: of the largest step.

    Raises:
        KernelError: the model or so many rows do not fit this GPU.
        RunnerError: the weights are too large for one tensor of TensorRT's, or for the GPU's memory.
    """
    size = kernels.step_size(model, rows)
    if size.packed // 4 > MOST_ELEMENTS:
        raise RunnerError(
            "the packed weights are too large for one tensor of TensorRT's",
            got=f"{size.packed / 1e9:.1f} GB",
            expected=f"at most {4 * MOST_ELEMENTS / 1e9:.1f} GB",
        )
    stream, packed = cuda.stream(), cuda.buffer(size.packed)
    stream.fill(packed.address, 0, size.packed)
    for layer in range(model.layers):
        arrays = tensors.layer(layer)
        buffers = {name: _upload(cuda, stream, array) for name, array in arrays.items()}
        kernels.pack_step_layer(model, layer, _addresses(buffers), packed.address, size.packed, stream.handle)
        stream.synchronize()
    for part in tensors.parts():
        stored = tensors.part(part)  # lives until it was copied
        values, block_scales = (_upload(cuda, stream, array) for array in stored)
        kernels.pack_step_matrix(
            model, part, values.address, block_scales.address, packed.address, size.packed, stream.handle
        )
        stream.synchronize()
    arrays = tensors.ends()
    buffers = {name: _upload(cuda, stream, array) for name, array in arrays.items()}
    kernels.pack_step_ends(model, _addresses(buffers), packed.address, size.packed, stream.handle)
    stream.synchronize()
    host = np.empty((size.packed // (4 * LINE), LINE), np.int32)
    stream.download(host.ctypes.data, packed.address, size.packed)
    stream.synchronize()
    positions, scales = tensors.position_embedding(), tensors.embedding_scales()
    return StepConstants(
        size,
        host,
        tensors.embedding().view(np.int32),
        None if scales is None else _lines(scales),
        None if positions is None else positions.view(np.int32),
    )


def _lines(array: npt.NDArray[Any]) -> Words:
    """Its bytes as int32 [.., LINE], zeros behind them."""
    lines = np.zeros((-(-array.nbytes // (4 * LINE)), LINE), np.int32)
    lines.reshape(-1).view(np.uint8)[: array.nbytes] = array.reshape(-1).view(np.uint8)
    return lines


def _upload(cuda: Cuda, stream: Stream, array: npt.NDArray[Any]) -> Buffer:
    buffer = cuda.buffer(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    stream.upload(buffer.address, array.ctypes.data, array.nbytes)
    return buffer


def _addresses(buffers: dict[str, Buffer]) -> dict[str, int]:
    return {name: buffer.address for name, buffer in buffers.items()}
