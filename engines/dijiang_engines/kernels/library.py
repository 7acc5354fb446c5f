"""The kernels' shared library: loading it, calling into it, and its errors as Python's."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.errors import KernelError
from dijiang_engines.formats.safe_files import LIMITS, open_regular
from dijiang_engines.kernels import abi
from dijiang_engines.plugin.elf import check_machine


@dataclass(frozen=True)
class Device:
    """What of a GPU decides how work is cut."""

    compute_capability: int
    """10 * major + minor, such as 87."""
    multiprocessors: int
    shared_memory: int
    """Most bytes that one block may ask for."""


class Library:
    """The loaded library and its conventions.

    Args:
        path: libdijiang_kernels.so.

    Attributes:
        path: where it came from.
        version: of the project that it was compiled from.
        architectures: what it was compiled for, such as "sm_90 compute_90".

    Raises:
        KernelError: it cannot be loaded, is for another kind of processor, or is of another ABI.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        hint = "`dijiang-export build-plugin` makes one that fits"
        try:
            with open_regular(path, most=LIMITS["library"], links=True, error=KernelError):
                pass  # dlopen would wait on a pipe
        except KernelError as error:
            raise KernelError(
                f"cannot load the CUDA kernels from {path}", got=error.what, hint=hint
            ) from error
        check_machine(path, KernelError, hint)
        try:
            self._library = ctypes.CDLL(str(path.absolute()))
        except OSError as error:
            raise KernelError(f"cannot load the CUDA kernels from {path}", got=error, hint=hint) from error
        try:
            version = self._library.dijiang_abi_version()  # returns an int, ctypes' default
            if version == abi.ABI_VERSION:
                abi.declare(self._library)
        except AttributeError as error:
            raise KernelError(f"{path} is not a library of these kernels", got=error, hint=hint) from error
        if version != abi.ABI_VERSION:
            raise KernelError(
                f"{path} has another ABI than this program",
                got=f"version {version}",
                expected=f"version {abi.ABI_VERSION}",
                hint=hint,
            )
        self.version: str = self._library.dijiang_version().decode()
        self.architectures: str = self._library.dijiang_architectures().decode()

    def query_device(self) -> Device:
        """The current GPU.

        Raises:
            KernelError: there is none, or it is too old.
        """
        device = abi.DeviceStruct()
        self.call("dijiang_query_device", ctypes.byref(device))
        return Device(device.compute_capability, device.multiprocessors, device.shared_memory)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status.

        Raises:
            KernelError: it was not DIJIANG_OK; says what the library says.
        """
        status = getattr(self._library, name)(*arguments)
        if status == abi.OK:
            return
        text = self._library.dijiang_last_error().decode(errors="replace")
        what, _, rest = text.partition("; got ")
        got, _, expected = rest.partition("; expected ")
        hint = None
        if status == abi.UNSUPPORTED and "cannot run on this GPU" in what:
            hint = "`dijiang-export build-plugin` compiles for the GPU at hand"
        elif status == abi.CUDA_ERROR:
            hint = "the error may come from earlier work; `dijiang-export doctor` looks at driver and GPU"
        raise KernelError(f"{name}: {what}", got=got or None, expected=expected or None, hint=hint)


def device_argument(device: Device | None) -> Any:
    """A pointer for ctypes."""
    return None if device is None else ctypes.byref(abi.DeviceStruct(**asdict(device)))
