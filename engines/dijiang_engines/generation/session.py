"""Saving what a model has read to a file, and going on from there.

DiJiang's memory of a text is a state of constant size, so a long prompt needs to be read only once. A
session file is a safetensors file of these tensors and no others:

    state.{i}    float32 [B, H, d, d]   layer i's state
    positions    int64 [B]              tokens that are in the state
    lengths      int64 [B]              tokens of each row's text, at least one more than positions
    token_ids    int64 [sum(lengths)]   all rows' tokens, one after the other
    held         int64 [B]              characters at the end of each row's text that were not given out yet:
                                        half a character, or what may be the beginning of a stop string

The last tokens of a row are not in its state yet: the model reads them first when it goes on, which gives
the same logits as if it had never stopped. Metadata: format "dijiang-session", version "2", model (a
name, for people), spec_sha256 and weights_sha256, since in another model the numbers mean nothing, and
sha256, the hash of the whole file with these 64 digits replaced by zeros. A state is numbers that look
right whatever they are, so without that hash a changed byte would show in nothing but worse text. Version 1
had none, and is refused.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import OutputError, SessionError
from dijiang_engines.formats.atomic_file import check_output_file, output_file
from dijiang_engines.formats.open import Model
from dijiang_engines.formats.safe_files import open_regular, parse_json
from dijiang_engines.runners.base import FloatArray
from dijiang_engines.spec import ModelSpec

FORMAT = "dijiang-session"
VERSION = "2"
MAX_ROWS = 4096
MAX_TOKENS = 1 << 28
"""Of all rows together: as many as the bytes of the longest prompt."""

_MAX_HEADER_BYTES = 1 << 20
_SIZES = {"F32": 4, "I64": 8}
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Session:
    """What B texts have left in a model, on the host and independent of any runner."""

    layers: list[FloatArray]
    """One [B, H, d, d] array per layer."""
    positions: npt.NDArray[np.int64]
    """[B]: how many of each row's tokens are in the state."""
    token_ids: list[list[int]]
    """Each row's whole text; longer than `positions`."""
    held: npt.NDArray[np.int64] | None = None
    """[B]: how many characters at the end of each row's text have not been given out; None is 0."""

    @property
    def batch(self) -> int:
        """B."""
        return len(self.token_ids)


def save_session(path: str | Path, session: Session, bundle: Model) -> None:
    """Write a session file, in one step: an older file of that name stays until the new one is complete.

    Raises:
        OutputError: the file cannot be written, would replace something that is no session, or would be
            larger than what `load_session` takes.
    """
    target = Path(path)
    check_session_target(target)
    if session.batch > MAX_ROWS or sum(map(len, session.token_ids)) > MAX_TOKENS:
        raise OutputError(
            f"the session is too large to save to {target}",
            got=f"{session.batch} texts of {sum(map(len, session.token_ids))} tokens",
            expected=f"at most {MAX_ROWS} texts, {MAX_TOKENS} tokens",
        )
    data = session_bytes(session, bundle)
    with output_file(target) as file:
        file.write(data)


def session_bytes(session: Session, bundle: Model) -> bytes:
    """What a session file holds."""
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[Any]] = {
        f"state.{i}": np.ascontiguousarray(layer, dtype=np.float32) for i, layer in enumerate(session.layers)
    }
    tensors["positions"] = np.asarray(session.positions, dtype=np.int64)
    tensors["lengths"] = np.array([len(ids) for ids in session.token_ids], dtype=np.int64)
    tensors["token_ids"] = np.array([i for ids in session.token_ids for i in ids], dtype=np.int64)
    held = np.zeros(session.batch, np.int64) if session.held is None else session.held
    tensors["held"] = np.asarray(held, dtype=np.int64)
    data = bytearray(save(tensors, metadata=_metadata(bundle) | {"sha256": _NO_HASH}))
    place = _hash_place(memoryview(data), _NO_HASH)
    data[place : place + len(_NO_HASH)] = _hash(memoryview(data), place).encode()
    return bytes(data)


def check_session_target(path: str | Path) -> None:
    """Find out early whether a session could be written to `path`.

    Raises:
        OutputError: its folder is missing or read-only, or something else has that name.
    """
    target = Path(path)
    if target.is_dir() or (target.exists() and not _is_session(target)):
        raise OutputError(
            f"{target} exists and is not a session file", hint="choose another name, or remove it yourself"
        )
    check_output_file(target)


def load_session(path: str | Path, bundle: Model) -> Session:
    """Read a session file that was saved with this model.

    What the file declares is compared with the model, with its size and with the machine's memory before any
    of it is read.

    Raises:
        SessionError: the file is missing or damaged, belongs to another model, or is too large.
    """
    source = Path(path)
    if not source.exists():
        raise SessionError(f"there is no session file {source}")
    with open_regular(source, links=True, error=SessionError) as file:
        return _checked(file, os.fstat(file.fileno()).st_size, str(source), bundle)


def session_from_bytes(data: bytes, name: str, bundle: Model) -> Session:
    """A session from what its file holds.

    Args:
        data: the bytes.
        name: what messages call it.
        bundle: the model.

    Raises:
        SessionError: as `load_session`.
    """
    return _checked(io.BytesIO(data), len(data), name, bundle)


def _checked(file: BinaryIO, file_bytes: int, source: str, bundle: Model) -> Session:
    header = _read_header(file, file_bytes, source)
    metadata = header.metadata
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise SessionError(
            f"{source} is not a session file of a version that this program knows",
            got=f"format {metadata.get('format')!r}, version {metadata.get('version')!r}",
            expected=f"format {FORMAT!r}, version {VERSION!r}",
            hint="save the session again with this program",
        )
    for key, expected in _metadata(bundle).items():
        if key.endswith("_sha256") and metadata.get(key) != expected:
            raise SessionError(
                f"{source} was saved with another model, whose state means nothing here",
                got=f"{metadata.get('model', 'unknown')} ({key.removesuffix('_sha256')} differ)",
                expected=bundle.name,
                hint="use the bundle that the session was saved with",
            )
    try:
        _check_sizes(header, bundle.spec)
        file.seek(0)
        data = file.read(header.file_bytes + 1)
        _check_hash(data, header)
        return _read(data, bundle.spec)
    except (ValueError, OSError) as error:
        raise SessionError(
            f"{source} is damaged", got=error, hint="save the session again, or copy it again"
        ) from error


@dataclass(frozen=True)
class _Header:
    """What a safetensors file says of itself, and its size."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Type and shape."""
    header_bytes: int
    """With the 8 bytes of its length."""
    file_bytes: int


def _read_header(file: BinaryIO, file_bytes: int, source: str) -> _Header:
    """The header alone, so that nothing is believed before it is checked.

    Raises:
        SessionError: it is none.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise SessionError(f"{source} is not a session file", got="no header of a safetensors file")
    entries = parse_json(file.read(length), f"the header of {source}", error=SessionError)
    try:
        metadata = entries.pop("__metadata__")
        tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        strings = all(isinstance(value, str) for value in metadata.values())
        numbers = all(type(n) is int and n >= 0 for _, shape in tensors.values() for n in shape)
    except (KeyError, TypeError, AttributeError):
        strings = numbers = False
    if not (strings and numbers):
        raise SessionError(f"{source} is not a session file", got="a header without what sessions have")
    return _Header(metadata, tensors, 8 + length, file_bytes)


def _check_sizes(header: _Header, spec: ModelSpec) -> None:
    """Whether the file holds the model's tensors and nothing else, and fits into memory.

    Raises:
        ValueError: it does not; says why.
    """
    from dijiang_engines.machine import available_memory

    batch, tokens = _extent(header, "positions"), _extent(header, "token_ids")
    if not 0 < batch <= MAX_ROWS or tokens > MAX_TOKENS:
        raise ValueError(f"{batch} texts of {tokens} tokens")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        f"state.{i}": ("F32", (batch, *spec.state_shape)) for i in range(spec.num_layers)
    }
    wanted |= dict.fromkeys(("positions", "lengths", "held"), ("I64", (batch,)))
    wanted["token_ids"] = ("I64", (tokens,))
    for name in wanted.keys() | header.tensors.keys():
        if name not in header.tensors:
            raise ValueError(f"no tensor {name!r}")
        if wanted.get(name) != header.tensors[name]:
            dtype, shape = header.tensors[name]
            raise ValueError(f"{name} is {dtype} {list(shape)}")
    size = header.header_bytes + sum(_SIZES[dtype] * math.prod(shape) for dtype, shape in wanted.values())
    if size != header.file_bytes:
        raise ValueError(f"{header.file_bytes} bytes instead of {size}")
    # The file, its tensors, and a runner's copy of them.
    if 3 * size > (available := available_memory()):
        raise ValueError(
            f"it needs {3 * size / 1e9:.1f} GB of memory, and {available / 1e9:.1f} are available"
        )


def _extent(header: _Header, name: str) -> int:
    dtype, shape = header.tensors.get(name, ("missing", ()))
    if dtype != "I64" or len(shape) != 1:
        raise ValueError(f"{name} is {dtype} {list(shape)}")
    return shape[0]


def _read(data: bytes, spec: ModelSpec) -> Session:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    positions, lengths, ids = tensors["positions"], tensors["lengths"], tensors["token_ids"]
    if (positions < 0).any() or (lengths <= positions).any() or lengths.max() > ids.size:
        raise ValueError("positions and lengths do not fit each other")
    if int(lengths.sum()) != ids.size:
        raise ValueError(f"token_ids has {ids.size} entries instead of {int(lengths.sum())}")
    if (tensors["held"] < 0).any():
        raise ValueError("held is negative")
    if (ids < 0).any() or (ids >= spec.vocab_size).any():
        raise ValueError("a token id is out of range")
    layers = [tensors[f"state.{i}"] for i in range(spec.num_layers)]
    if not all(np.isfinite(layer).all() for layer in layers):
        raise ValueError("the state is not finite")
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    return Session(layers, positions, [row.tolist() for row in rows], tensors["held"])


def _check_hash(data: bytes, header: _Header) -> None:
    found = header.metadata.get("sha256", "")
    view = memoryview(data)
    place = _hash_place(view[: header.header_bytes], found) if len(found) == len(_NO_HASH) else -1
    if place < 0 or _hash(view, place) != found:
        raise ValueError("its bytes are not those that were saved (SHA-256)")


def _hash_place(data: memoryview, digits: str) -> int:
    """Where the hash stands in the header; -1 if it does not stand there as `save_session` writes it."""
    key = b'"sha256":"'  # no other key ends so, and quotes inside of strings are escaped
    place = bytes(data[: 8 + _MAX_HEADER_BYTES]).find(key + digits.encode() + b'"')
    return place if place < 0 else place + len(key)


def _hash(data: memoryview, place: int) -> str:
    digest = hashlib.sha256(data[:place])
    digest.update(_NO_HASH.encode())
    digest.update(data[place + len(_NO_HASH) :])
    return digest.hexdigest()


def _metadata(bundle: Model) -> dict[str, str]:
    identity = bundle.identity
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": bundle.name,
        "spec_sha256": identity.spec_sha256,
        "weights_sha256": identity.weights_sha256,
    }


def _is_session(path: Path) -> bool:
    try:
        with open_regular(path, links=True, error=SessionError) as file:
            size = os.fstat(file.fileno()).st_size
            return _read_header(file, size, str(path)).metadata.get("format") == FORMAT
    except SessionError:
        return False
