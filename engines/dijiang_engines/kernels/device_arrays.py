"""Arrays in GPU memory, whoever owns them: PyTorch tensors, CuPy arrays and their like, or plain addresses.

Nothing is imported for that. An object counts as an array if it has `data_ptr()` (PyTorch) or
`__cuda_array_interface__` (CuPy, Numba); an int is an address, of which nothing can be checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dijiang_engines.errors import KernelError

_NAMES = {
    "<f4": "float32", "<f2": "float16", "<f8": "float64", "<i4": "int32", "<i8": "int64", "<u4": "uint32",
    "<u8": "uint64", "|u1": "uint8", "|b1": "bool",
}  # fmt: skip
_SIGNED = {"uint32": "int32", "uint64": "int64"}  # PyTorch has few unsigned operations: the bits are the same


@dataclass(frozen=True)
class DeviceArray:
    """What an array says about itself."""

    name: str
    """For messages."""
    pointer: int
    dtype: str | None
    """Such as "float16"; None: a plain address, of which nothing else is known either."""
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    """In elements."""

    @property
    def known(self) -> bool:
        """False for a plain address."""
        return self.dtype is not None

    def size(self, axis: int) -> int:
        """How long the array is along `axis`.

        Raises:
            KernelError: it is a plain address, or has fewer axes.
        """
        if not self.known or len(self.shape) <= axis:
            raise KernelError(
                f"{self.name} does not say how large it is",
                got="an address" if not self.known else f"shape {list(self.shape)}",
                hint="pass an array, or use the call that takes addresses and sizes",
            )
        return self.shape[axis]

    def require(self, dtypes: Sequence[str], shape: Sequence[int], dense_from: int = 0) -> None:
        """Check type, shape and layout; a plain address passes.

        Args:
            dtypes: the names that will do.
            shape: what it must be.
            dense_from: axes from this one on must be dense, row-major.

        Raises:
            KernelError: it is something else.
        """
        if not self.known:
            return
        allowed = {*dtypes, *(_SIGNED[name] for name in dtypes if name in _SIGNED)}
        if self.dtype not in allowed:
            raise KernelError(f"{self.name} has the wrong type", got=self.dtype, expected=" or ".join(dtypes))
        if self.shape != tuple(shape):
            raise KernelError(f"{self.name} has the wrong shape", got=list(self.shape), expected=list(shape))
        step = 1
        for axis in range(len(shape) - 1, dense_from - 1, -1):
            if shape[axis] > 1 and self.strides[axis] != step and 0 not in shape:
                raise KernelError(
                    f"{self.name} is not dense",
                    got=f"strides {list(self.strides)} for shape {list(shape)}",
                    expected=f"stride {step} on axis {axis}",
                    hint="make it contiguous",
                )
            step *= shape[axis]

    def stride(self, axis: int) -> int:
        """Elements from one index of `axis` to the next; 0 (to the C ABI: dense) if it has one index."""
        return self.strides[axis] if self.known and self.shape[axis] > 1 else 0

    def bytes(self) -> int:
        """How much memory it is; 0 for a plain address."""
        digits = re.search(r"\d+$", self.dtype or "")  # all but bool say their bits
        item = int(digits.group()) // 8 if digits else 1
        return math.prod(self.shape) * item if self.known else 0


def device_array(name: str, value: Any) -> DeviceArray:
    """Look at one argument.

    Args:
        name: for messages.
        value: a tensor, an array, an address, or None for an absent one (address 0).

    Raises:
        KernelError: it is none of these, or not in GPU memory.
    """
    if value is None:
        return DeviceArray(name, 0, None)
    if isinstance(value, int):
        return DeviceArray(name, value, None)
    if hasattr(value, "data_ptr") and hasattr(value, "stride"):
        if not getattr(value, "is_cuda", True):
            raise KernelError(
                f"{name} is not in GPU memory", got=f"a tensor on {value.device}", hint=".cuda()"
            )
        dtype = str(value.dtype).removeprefix("torch.")
        return DeviceArray(name, int(value.data_ptr()), dtype, tuple(value.shape), tuple(value.stride()))
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        raise KernelError(
            f"{name} is not in GPU memory",
            got=f"{type(value).__module__}.{type(value).__name__}",
            expected="a CUDA tensor of PyTorch, an array with __cuda_array_interface__, or an address",
        )
    typestr, shape = str(interface["typestr"]), tuple(int(size) for size in interface["shape"])
    item = int(typestr[2:])
    strides, step = interface.get("strides"), 1
    if strides is None:
        dense = []
        for size in reversed(shape):
            dense.append(step)
            step *= size
        return DeviceArray(
            name, int(interface["data"][0]), _NAMES.get(typestr, typestr), shape, tuple(reversed(dense))
        )
    elements = tuple(int(stride) // item for stride in strides)
    return DeviceArray(name, int(interface["data"][0]), _NAMES.get(typestr, typestr), shape, elements)
