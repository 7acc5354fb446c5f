"""Checkpoint weights as bytes at offsets: any rows of any tensor, in bounded memory, without running code.

A weight file, safetensors or `.bin`, is reduced to a table {name: StoredTensor}. Reading is `pread` into
fresh memory: nothing is memory-mapped, so that no file page counts as resident, and only the bytes that were
asked for are read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_engines.formats.safe_files import open_regular
from dijiang_export.checkpoint.files import INDEX_FILES, SINGLE_FILES, check_link, find_file
from dijiang_export.checkpoint.files import read_json as read_json  # config_io takes it from here

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

_SHARD_SUFFIXES = (".safetensors", ".bin")
_WEIGHT_SUFFIXES = (*_SHARD_SUFFIXES, ".pt", ".pth", ".ckpt")
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


class Weights:
    """All tensors of a checkpoint folder by their stored names. Close it, or use it in a with statement."""

    def __init__(self, tensors: dict[str, StoredTensor], files: list[WeightFile]) -> None:
        self.tensors = tensors
        self._files = files

    @property
    def files(self) -> list[Path]:
        """The weight files, in the order in which they were opened."""
        return [file.path for file in self._files]

    @property
    def notes(self) -> list[str]:
        """What there is to say about the files, sentences for people."""
        return [note for file in self._files for note in file.notes]

    def hashes(self, on_bytes: Callable[[int], None] = lambda _: None) -> dict[str, dict[str, Any]]:
        """Name -> sha256 and bytes of every file that was opened; `on_bytes` is told each block's size."""
        return {file.path.name: {"sha256": file.sha256(on_bytes), "bytes": file.size} for file in self._files}

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
    from dijiang_export.checkpoint.bin_file import read_bin_table
    from dijiang_export.checkpoint.safetensors_file import read_safetensors_table

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
        path = find_file(folder, single)
        if path is not None:
            yield path, []
            return
        if find_file(folder, index) is not None:
            yield from _shards(folder, index)
            return
    found = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES)
    raise CheckpointError(
        f"{folder} holds no weights",
        got=", ".join(found)[:500] or "no weight file at all",
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
            raise CheckpointError(f"{folder / index} has a bad entry for {name[:200]}", got=repr(file)[:200])
        names.setdefault(file, []).append(name)
    shards: dict[Path, list[str]] = {}
    for file, listed in names.items():
        shards.setdefault(_shard(folder, file, index), []).extend(listed)
    yield from shards.items()


def _shard(folder: Path, name: str, listed_in: str) -> Path:
    """The path of a file that an index names, which must be in `folder` itself.

    Raises:
        CheckpointError: it is elsewhere or does not exist.
    """
    plain = name
    while plain.startswith("./"):
        plain = plain[2:].lstrip("/")
    if "\0" in plain or plain != os.path.basename(plain) or plain in ("", ".", "..") or "\\" in plain:
        below = not plain.startswith("/") and ".." not in plain.split("/") and "/" in plain
        raise CheckpointError(
            f"{listed_in} names a file outside the checkpoint's folder",
            got=repr(name)[:300] + (", in a folder below" if below else ""),
            expected=f"the name of a file in {folder}",
            hint="move that file beside the index, and write its bare name there"
            if below
            else "do not use a checkpoint that you do not trust",
        )
    if not plain.endswith(_SHARD_SUFFIXES):
        raise CheckpointError(
            f"{listed_in} names a file of an unknown kind",
            got=repr(name)[:300],
            expected=" or ".join(_SHARD_SUFFIXES),
        )
    path = folder / plain
    check_link(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing", hint=f"{listed_in} lists it: the download is not complete"
        )
    return path
