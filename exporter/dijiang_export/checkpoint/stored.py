"""Checkpoint weights as bytes at offsets: any rows of any tensor, in bounded memory, without running code.

A reader of one format (`safetensors_file`, `bin_file`) reduces a weight file to a table {name: StoredTensor};
what they share is here. Reading is `pread` into fresh memory: nothing is memory-mapped, so that no file page
counts as resident, and only the bytes that were asked for are read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_engines.formats.safe_files import open_regular

FLOAT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Types that a weight may be stored in. float64 is delivered as float32."""

MOST_NAME = 1000
"""Characters of a tensor's name; the longest of published weights have about 100."""
MOST_DIMENSIONS = 64
"""Of a tensor: PyTorch's own limit for most of its operators."""

_CHUNK = 4 << 20  # bytes read at once where a block is gathered from pieces
_LARGEST_STRIDED = 256 << 20  # bytes; a larger tensor that is not in C order is refused


class WeightFile:
    """An open file that is read at offsets. Close it, or the Weights that owns it.

    Attributes:
        path: its path.
        size: in bytes.
        notes: what its reader has to say about it, sentences for people.

    Raises:
        CheckpointError: it is missing, not an ordinary file, or a Git LFS pointer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        with open_regular(path, links=True, error=CheckpointError) as file:
            self._descriptor = os.dup(file.fileno())
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            CheckpointError: the file ends too early, or the disk fails.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}", got=error.strerror) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} is truncated",
                    got=f"{self.size} bytes",
                    expected=f"at least {offset + len(buffer)}",
                    hint="download or copy the file again",
                )
            done += count

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`."""
        out = bytearray(count)
        self.read_into(memoryview(out), offset)
        return bytes(out)

    def sha256(self, on_bytes: Callable[[int], None]) -> str:
        """The hex SHA-256 of what is read here, whatever its path leads to by now; told each block's size."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        for at in range(0, self.size, _CHUNK):
            part = buffer[: min(_CHUNK, self.size - at)]
            self.read_into(part, at)
            digest.update(part)
            on_bytes(len(part))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def corrupt(file: WeightFile, got: str) -> NoReturn:
    """Refuse a file whose bytes are not what its format says.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{file.path} is corrupt or truncated", got=got, hint="download or copy the file again"
    )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file.

    `dtype` is one of FLOAT_DTYPES, or says in words what else the elements are: such a tensor cannot be read.
    `strides` count elements; None = C order.
    """

    name: str
    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes in C order."""
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type to read with.

        Raises:
            CheckpointError: not a floating-point type that weights may have.
        """
        if self.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.file.path.name} is not stored as floating point",
                got=self.dtype,
                expected=", ".join(FLOAT_DTYPES),
                hint="quantised checkpoints cannot be read; save the weights in float16 or wider",
            )
        return FLOAT_DTYPES[self.dtype]

    @property
    def delivered_dtype(self) -> torch.dtype:
        """The type of what `read_rows` returns: as stored, but float32 for float64."""
        return torch.float32 if self.torch_dtype == torch.float64 else self.torch_dtype

    def exact(self) -> torch.Tensor:
        """The whole tensor in its stored type, float64 included. For small tensors."""
        out = torch.empty(self.shape, dtype=self.torch_dtype)
        self._fill_rows(out if self.shape else out.view(1), 0)
        return out

    def read_rows(self, out: torch.Tensor, start: int) -> None:
        """Fill `out` [n, ...], contiguous and of any type, with rows start .. start+n of the first axis."""
        if out.dtype == self.torch_dtype:
            self._fill_rows(out, start)
            return
        row = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, _CHUNK // row)
        for at in range(0, len(out), step):
            part = torch.empty(out[at : at + step].shape, dtype=self.torch_dtype)
            self._fill_rows(part, start + at)
            out[at : at + step] = part

    def read_columns(self, out: torch.Tensor, start: int) -> None:
        """Fill `out` [n, rows] with columns start .. start+n of a matrix: rows of its transpose."""
        rows, columns = self.shape
        wanted = len(out)
        if self.strides is None and 4 * wanted < columns:
            # A narrow strip: read each row's piece, in place of whole rows several times over.
            step = max(1, _CHUNK // (wanted * self.itemsize))
            for at in range(0, rows, step):
                part = torch.empty((min(step, rows - at), wanted), dtype=self.torch_dtype)
                for i, piece in enumerate(part):
                    self.file.read_into(
                        _bytes_of(piece), self.offset + ((at + i) * columns + start) * self.itemsize
                    )
                out[:, at : at + len(part)] = part.T
            return
        step = max(1, _CHUNK // (columns * self.itemsize))
        for at in range(0, rows, step):
            part = torch.empty((min(step, rows - at), columns), dtype=self.torch_dtype)
            self._fill_rows(part, at)
            out[:, at : at + len(part)] = part[:, start : start + wanted].T

    def _fill_rows(self, out: torch.Tensor, start: int) -> None:
        if out.numel() == 0:
            return
        if self.strides is None:
            row_bytes = out[0].numel() * self.itemsize
            self.file.read_into(_bytes_of(out), self.offset + start * row_bytes)
        else:
            span = sum((n - 1) * s for n, s in zip(out.shape, self.strides, strict=True)) + 1
            if span * self.itemsize > _LARGEST_STRIDED:
                raise CheckpointError(
                    f"{self.name} in {self.file.path.name} is stored in an unusual memory order",
                    got=f"strides {self.strides}",
                    hint="make it contiguous and save the checkpoint again",
                )
            flat = torch.empty(span, dtype=self.torch_dtype)
            self.file.read_into(_bytes_of(flat), self.offset + start * self.strides[0] * self.itemsize)
            out.copy_(flat.as_strided(out.shape, self.strides))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
