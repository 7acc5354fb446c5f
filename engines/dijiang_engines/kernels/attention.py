"""The CUDA kernels from Python: attention, sampling and counting on.

A thin layer over the C ABI of plugins/include/dijiang/: it never imports PyTorch, allocates nothing on the
GPU, whose memory the caller owns, and does not synchronise. Every method that takes a `stream` (a
cudaStream_t as an int, 0 = the default stream) only enqueues work there, so it may be captured into a CUDA
graph; the arrays must outlive that work.

    kernels = load_kernels()
    geometry = Geometry(16, 16, 64, rotary_dim=16, dtype="float16")
    size = kernels.workspace_size(geometry, max_batch=8, max_length=2048)
    stream = torch.cuda.current_stream().cuda_stream
    kernels.attention_tensors(geometry, qkv=qkv, gate=gate, ..., stream=stream)
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.device_arrays import device_array
from dijiang_engines.kernels.library import Device, device_argument
from dijiang_engines.kernels.sampling import SamplingKernels
from dijiang_engines.op_contract import INPUTS, OUTPUTS, Attributes, Tensors, dimensions
from dijiang_engines.plugin.cache import find_kernels_library

ENVIRONMENT = "DIJIANG_KERNELS"
"""The environment variable that names another library than the one in the cache."""

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Geometry(Attributes):
    """A layer's attributes, and what else decides types and shapes: dijiang_geometry of the C ABI."""

    rotary_dim: int = 0
    epsilon: float = field(default=1e-5, kw_only=True)
    dtype: Dtype = "float16"
    """T: of qkv, gate and output."""
    table_rows: int = field(default=0, kw_only=True)
    """N of log_decay, gain and read_scale [N, H]; 0 = geometric decay, log_decay [H]."""


@dataclass(frozen=True, kw_only=True)
class AttentionBuffers(Tensors[int]):
    """Addresses in GPU memory and strides in elements, 0 = dense: dijiang_attention_buffers of the C ABI."""

    qkv_batch_stride: int = 0
    qkv_token_stride: int = 0
    gate_batch_stride: int = 0
    gate_token_stride: int = 0
    output_batch_stride: int = 0
    output_token_stride: int = 0
    past_batch_stride: int = 0
    present_batch_stride: int = 0
    workspace: int = 0
    workspace_size: int = 0
    sync: int = 0
    sync_size: int = 0


def load_kernels(path: Path | str | None = None) -> Kernels:
    """Load the kernels' library.

    Args:
        path: the library; default: the environment variable DIJIANG_KERNELS, else what
            `dijiang-export build-plugin` built last from these sources.

    Raises:
        PluginError: none was built.
        KernelError: it cannot be loaded, or is of another ABI.
    """
    if path is None:
        path = os.environ.get(ENVIRONMENT) or find_kernels_library()
    return Kernels(Path(path))


class Kernels(SamplingKernels):
    """The loaded library, as `Library` makes it. All methods may be called from several threads."""

    def workspace_size(
        self, geometry: Geometry, max_batch: int, max_length: int, device: Device | None = None
    ) -> int:
        """Bytes of scratch memory for calls up to that size; contents need not survive between calls.

        Args:
            geometry: of the layer.
            max_batch, max_length: rows, and tokens per row; enough for every smaller call too.
            device: None for the current one; given, no GPU is needed.

        Raises:
            KernelError: an argument is out of range.
        """
        return self._size("dijiang_attention_workspace_size", geometry, max_batch, max_length, device)

    def sync_size(
        self, geometry: Geometry, max_batch: int, max_length: int, device: Device | None = None
    ) -> int:
        """Bytes of memory that its owner zeroes once and every call leaves zeroed; as `workspace_size`."""
        return self._size("dijiang_attention_sync_size", geometry, max_batch, max_length, device)

    def plan(self, geometry: Geometry, batch: int, length: int, device: Device | None = None) -> str:
        """One line that says which kernels a call runs and how they cut the work; as `workspace_size`."""
        text = ctypes.create_string_buffer(1024)
        self.call(
            "dijiang_attention_plan",
            _geometry(geometry),
            batch,
            length,
            device_argument(device),
            text,
            len(text),
        )
        return text.value.decode()

    def attention(
        self, geometry: Geometry, batch: int, length: int, buffers: AttentionBuffers, stream: int = 0
    ) -> None:
        """Enqueue DijiangAttention over addresses; nothing about the memory behind them can be checked.

        Args:
            geometry: of the layer.
            batch: B.
            length: L, tokens per row.
            buffers: addresses and strides.
            stream: where to.

        Raises:
            KernelError: an argument is wrong, or CUDA refused.
        """
        struct = abi.AttentionBuffersStruct(**asdict(buffers))
        self.call("dijiang_attention", _geometry(geometry), batch, length, ctypes.byref(struct), stream)

    def attention_tensors(
        self,
        geometry: Geometry,
        *,
        workspace: Any = None,
        sync: Any = None,
        stream: int = 0,
        **tensors: Any,
    ) -> None:
        """Enqueue DijiangAttention over arrays, after checking their types, shapes and strides.

        B and L are those of `qkv`. T is `geometry.dtype`; arrays are dense row by row, qkv, gate and output
        along their last axis only, states but for their first.

        Args:
            geometry: of the layer.
            workspace: any type, at least `workspace_size` bytes; None if that is 0.
            sync: any type, at least `sync_size` bytes, zeroed once; None if that is 0.
            stream: where to.
            tensors: qkv, gate and the other inputs and outputs of `op_contract`, by name, types and shapes as
                there; present_state may be past_state, inv_freq None if r is 0, gain and read_scale are left
                out with geometric decay.

        Raises:
            TypeError: a tensor is missing, or has no name of the op's.
            KernelError: an array is wrong, or CUDA refused.
        """
        given = {name: device_array(name, value) for name, value in vars(Tensors(**tensors)).items()}
        batch, length = given["qkv"].size(0), given["qkv"].size(1)
        of = dimensions(geometry, batch, length, geometry.table_rows)
        strides: dict[str, int] = {}
        for formal in (*INPUTS, *OUTPUTS):
            array, names = given[formal.name], abi.STRIDES.get(formal.name, ())
            kind = geometry.dtype if formal.kind == "T" else formal.kind
            array.require([kind], formal.sizes(of), dense_from=len(names))
            strides |= {name: array.stride(axis) for axis, name in enumerate(names)}
        scratch, locks = device_array("workspace", workspace), device_array("sync", sync)
        # What is behind an address is the caller's word; an array says it itself.
        sizes = {
            "workspace_size": scratch.bytes()
            if scratch.known or not scratch.pointer
            else self.workspace_size(geometry, batch, length),
            "sync_size": locks.bytes()
            if locks.known or not locks.pointer
            else self.sync_size(geometry, batch, length),
        }
        pointers = {array.name: array.pointer for array in (*given.values(), scratch, locks)}
        self.attention(geometry, batch, length, AttentionBuffers(**pointers, **strides, **sizes), stream)

    def _size(
        self, name: str, geometry: Geometry, max_batch: int, max_length: int, device: Device | None
    ) -> int:
        size = ctypes.c_size_t()
        self.call(
            name, _geometry(geometry), max_batch, max_length, device_argument(device), ctypes.byref(size)
        )
        return size.value


def _geometry(geometry: Geometry) -> Any:
    fields = asdict(geometry)
    if geometry.dtype not in abi.DTYPES:
        raise KernelError("unknown dtype", got=geometry.dtype, expected=" or ".join(abi.DTYPES))
    return ctypes.byref(abi.GeometryStruct(**{**fields, "dtype": abi.DTYPES[geometry.dtype]}))
