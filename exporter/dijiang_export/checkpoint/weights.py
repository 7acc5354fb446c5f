"""The weights of a checkpoint folder: which files hold them, and one table of all their tensors.

transformers' order of looking is followed: safetensors before `.bin`, one file before a shard index. Each
file is read by the reader of its format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.bin_file import read_bin_table
from dijiang_export.checkpoint.files import INDEX_FILES, SINGLE_FILES, check_link, find_file, read_json
from dijiang_export.checkpoint.safetensors_file import read_safetensors_table
from dijiang_export.checkpoint.stored import StoredTensor, WeightFile

_SHARD_SUFFIXES = (".safetensors", ".bin")
_WEIGHT_SUFFIXES = (*_SHARD_SUFFIXES, ".pt", ".pth", ".ckpt")


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
