"""The CUDA kernels as the tests' `Engine`, straight through the C ABI (plugins/include/dijiang/kernels.h).

On purpose not through dijiang_engines.kernels: strides, alignment and every field are the test's to choose.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from support.makers.kernel_cases import Call
from torch import Tensor

DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POINTERS = (
    "qkv", "gate", "past_state", "positions", "seq_lens", "proj", "norm_weight", "norm_bias", "inv_freq",
    "log_decay", "gain", "read_scale", "output", "present_state",
)  # fmt: skip


INTEGERS = ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "dtype", "table_rows")


class Geometry(Structure):
    _fields_ = (*((name, c_int32) for name in INTEGERS), ("epsilon", c_float), ("reserved", c_int32))


class Buffers(Structure):
    _fields_ = (
        *((name, c_void_p) for name in POINTERS),
        *((f"{t}_{axis}_stride", c_int64) for t in ("qkv", "gate", "output") for axis in ("batch", "token")),
        ("past_batch_stride", c_int64), ("present_batch_stride", c_int64),
        ("workspace", c_void_p), ("workspace_size", c_size_t), ("sync", c_void_p), ("sync_size", c_size_t),
    )  # fmt: skip


class StatusError(AssertionError):
    """The library refused a call."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


@cache
def find_library() -> tuple[Path | None, str]:
    """The library to test, or why there is none."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    named = os.environ.get("DIJIANG_KERNELS")
    if named:
        return Path(named), ""
    from dijiang_engines.kernels import attention as kernels

    try:
        kernels.load_kernels()
    except Exception as error:  # noqa: BLE001  # whatever the reason, it is the reason to skip
        return None, f"no kernels: {error}"
    return Path(kernels.load_kernels().path), ""


class CudaEngine:
    """Calls the library. Buffers are torch tensors on the GPU."""

    device = "cuda"

    def __init__(self, path: Path) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        library = self.library
        library.dijiang_last_error.restype = c_char_p
        library.dijiang_version.restype = c_char_p
        library.dijiang_architectures.restype = c_char_p
        sizes = (POINTER(Geometry), c_int32, c_int32, c_void_p, POINTER(c_size_t))
        library.dijiang_attention_workspace_size.argtypes = sizes
        library.dijiang_attention_sync_size.argtypes = sizes
        library.dijiang_attention_plan.argtypes = (*sizes[:4], c_char_p, c_size_t)
        library.dijiang_attention.argtypes = (*sizes[:3], POINTER(Buffers), c_void_p)

    def _check(self, status: int) -> None:
        if status:
            raise StatusError(status, self.library.dijiang_last_error().decode())

    def geometry(self, call: Call) -> Geometry:
        g = call.geometry
        return Geometry(
            g.num_heads, g.num_kv_heads, g.head_dim, g.rotary_dim, DTYPE_NUMBERS[call.dtype], call.table_rows,
            g.epsilon, 0,
        )  # fmt: skip

    def _size(self, function: Any, call: Call) -> int:
        size = c_size_t()
        self._check(function(self.geometry(call), call.batch, call.length, None, size))
        return size.value

    def workspace_size(self, call: Call) -> int:
        return self._size(self.library.dijiang_attention_workspace_size, call)

    def sync_size(self, call: Call) -> int:
        return self._size(self.library.dijiang_attention_sync_size, call)

    def plan(self, call: Call) -> str:
        text = ctypes.create_string_buffer(256)
        arguments = (self.geometry(call), call.batch, call.length, None, text, 256)
        self._check(self.library.dijiang_attention_plan(*arguments))
        return text.value.decode()

    def arguments(self, call: Call, buffers: dict[str, Tensor]) -> Buffers:
        found = Buffers(**{k: v.data_ptr() for k, v in buffers.items()})
        for name in ("qkv", "gate", "output"):
            setattr(found, f"{name}_batch_stride", buffers[name].stride(0))
            setattr(found, f"{name}_token_stride", buffers[name].stride(1))
        found.past_batch_stride = buffers["past_state"].stride(0)
        found.present_batch_stride = buffers["present_state"].stride(0)
        for name in ("workspace", "sync"):
            if name in buffers:
                setattr(found, f"{name}_size", buffers[name].numel())
        return found

    def launch_raw(
        self, geometry: Geometry, batch: int, length: int, buffers: Buffers | None, stream: int = 0
    ) -> None:
        """The C function itself.

        Raises:
            StatusError: it did not return DIJIANG_OK.
        """
        self._check(self.library.dijiang_attention(geometry, batch, length, buffers, stream))

    def launch(self, call: Call, buffers: dict[str, Tensor], stream: int) -> None:
        self.launch_raw(self.geometry(call), call.batch, call.length, self.arguments(call, buffers), stream)
