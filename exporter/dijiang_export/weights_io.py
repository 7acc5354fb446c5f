"""Checkpoint weights as bytes at offsets: any rows of any tensor, in bounded memory, without running code.

A weight file, safetensors or `.bin`, is reduced to a table {name: StoredTensor}. Reading is `pread` into
fresh memory: nothing is memory-mapped, so that no file page counts as resident, and only the bytes that were
asked for are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dijiang_engines.errors import CheckpointError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

FLOAT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Types that a weight may be stored in. float64 is delivered as float32."""

_CHUNK = 4 << 20  # bytes read at once where a block is gathered from pieces
_LARGEST_STRIDED = 256 << 20  # bytes; a larger tensor that is not in C order is refused


class WeightFile:
    """An open file that is read at offsets. Close it, or the Weights that owns it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise CheckpointError(f"cannot open {path}", got=error.strerror) from error

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

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file.

    `dtype` is a name of torch's without "torch.", of any type; only the FLOAT_DTYPES can be read. `strides`
    count elements; None = C order. `memory` holds the value of tensors from files that have no offsets.
    """

    name: str
    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    memory: torch.Tensor | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes as stored."""
        return int(np.prod(self.shape, dtype=object)) * self.itemsize if self.shape else self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return torch.empty((), dtype=getattr(torch, self.dtype)).element_size()

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
        if self.strides is None and self.memory is None and 4 * wanted < columns:
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
        if self.memory is not None:
            source = self.memory if self.shape else self.memory.view(1)
            out.copy_(source[start : start + len(out)])
        elif self.strides is None:
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


class Weights:
    """All tensors of a checkpoint folder by their stored names. Close it, or use it in a with statement."""

    def __init__(self, tensors: dict[str, StoredTensor], files: list[WeightFile]) -> None:
        self.tensors = tensors
        self._files = files

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order in which they were opened."""
        return [file.path for file in self._files]

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Weights:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files."""
        self.close()


def open_weights(folder: Path) -> Weights:
    """The weights in a Hugging Face folder, in the order in which transformers looks for them.

    Raises:
        CheckpointError: there are none; a file is missing, corrupt, truncated or unsafe; an index names a
            file outside the folder; a name occurs twice.
    """
    from dijiang_export.bin_io import read_bin_table
    from dijiang_export.safetensors_io import read_safetensors_table

    files: list[WeightFile] = []
    tensors: dict[str, StoredTensor] = {}
    try:
        for path, listed in _weight_paths(folder):
            file = WeightFile(path)
            files.append(file)
            reader = read_safetensors_table if path.name.endswith(".safetensors") else read_bin_table
            table = reader(file)
            for name in listed:
                if name not in table:
                    raise CheckpointError(
                        f"the shard index says that {name} is in {path.name}, which does not hold it",
                        hint="the index and the shards are of different versions: download both again",
                    )
            for name, tensor in table.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{name} is stored twice", got=f"{tensors[name].file.path.name} and {path.name}"
                    )
                tensors[name] = tensor
    except BaseException:
        for file in files:
            file.close()
        raise
    return Weights(tensors, files)


def _weight_paths(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The weight files, each with the names that an index expects there."""
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).exists():
            yield folder / single, []
            return
        if (folder / index).exists():
            yield from _shards(folder, index)
            return
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    raise CheckpointError(
        f"{folder} holds no weights",
        got=", ".join(found) or "no weight file at all",
        expected=" or ".join((*SINGLE_FILES, *INDEX_FILES)),
    )


def _shards(folder: Path, index: str) -> Iterator[tuple[Path, list[str]]]:
    content = read_json(folder / index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index} has no weight_map", expected="{tensor name: file name}")
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{folder / index} has a bad entry for {name}", got=repr(file))
        names.setdefault(file, []).append(name)
    for file, listed in names.items():
        yield check_inside(folder, file, index), listed


def check_inside(folder: Path, name: str, listed_in: str) -> Path:
    """The path of a file that an index names, which must be in `folder` itself.

    A symbolic link may lead elsewhere only as in the Hugging Face cache, from models--*/snapshots/<revision>
    to models--*/blobs.

    Raises:
        CheckpointError: it is elsewhere or does not exist.
    """
    outside = CheckpointError(
        f"{listed_in} names a file outside the checkpoint's folder",
        got=repr(name),
        expected=f"the name of a file in {folder}",
        hint="do not use a checkpoint that you do not trust",
    )
    suffixes = (".safetensors", ".bin")
    if "\0" in name or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
        raise outside
    if not name.endswith(suffixes):
        raise CheckpointError(
            f"{listed_in} names a file of an unknown kind", got=repr(name), expected=" or ".join(suffixes)
        )
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise outside
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing", hint=f"{listed_in} lists it: the download is not complete"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON", got=str(error), hint="download or copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", got=type(value).__name__)
    return value
