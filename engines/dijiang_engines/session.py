"""Saving what a model has read to a file, and going on from there.

DiJiang's memory of a text is a state of constant size, so a long prompt needs to be read only once. A
session file is a safetensors file:

    state.{i}    float32 [B, H, d, d]   layer i's state
    positions    int64 [B]              tokens that are in the state
    lengths      int64 [B]              tokens of each row's text, at least one more than positions
    token_ids    int64 [sum(lengths)]   all rows' tokens, one after the other

The last tokens of a row are not in its state yet: the model reads them first when it goes on, which gives
the same logits as if it had never stopped. Metadata: format "dijiang-session", version "1", model (a
name, for people), and spec_sha256 and weights_sha256, since in another model the numbers mean nothing.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import OutputError, SessionError
from dijiang_engines.model import Model
from dijiang_engines.runners.base import FloatArray
from dijiang_engines.spec import ModelSpec

FORMAT = "dijiang-session"
VERSION = "1"

_counter = itertools.count()


@dataclass(frozen=True)
class Session:
    """What B texts have left in a model, on the host and independent of any runner."""

    layers: list[FloatArray]
    """One [B, H, d, d] array per layer."""
    positions: npt.NDArray[np.int64]
    """[B]: how many of each row's tokens are in the state."""
    token_ids: list[list[int]]
    """Each row's whole text; longer than `positions`."""

    @property
    def batch(self) -> int:
        """B."""
        return len(self.token_ids)


def save_session(path: str | Path, session: Session, bundle: Model) -> None:
    """Write a session file, in one step: an older file of that name stays until the new one is complete.

    Raises:
        OutputError: the file cannot be written, or would replace something that is no session.
    """
    from safetensors.numpy import save

    target = Path(path)
    check_session_target(target)
    tensors: dict[str, npt.NDArray[Any]] = {
        f"state.{i}": np.ascontiguousarray(layer, dtype=np.float32) for i, layer in enumerate(session.layers)
    }
    tensors["positions"] = np.asarray(session.positions, dtype=np.int64)
    tensors["lengths"] = np.array([len(ids) for ids in session.token_ids], dtype=np.int64)
    tensors["token_ids"] = np.array([i for ids in session.token_ids for i in ids], dtype=np.int64)
    data = save(tensors, metadata=_metadata(bundle))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{next(_counter)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


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
    if not target.parent.is_dir():
        raise OutputError(f"there is no folder {target.parent} to write {target.name} to")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"the folder {target.parent} is read-only", hint="choose another folder")


def load_session(path: str | Path, bundle: Model) -> Session:
    """Read a session file that was saved with this model.

    Raises:
        SessionError: the file is missing or damaged, or belongs to another model.
    """
    from safetensors import SafetensorError

    source = Path(path)
    try:
        file = _open(source)
        metadata: dict[str, str] = file.metadata() or {}
        names = set(file.keys())
    except FileNotFoundError:
        raise SessionError(f"there is no session file {source}") from None
    except (SafetensorError, OSError) as error:
        raise SessionError(f"{source} is not a session file", got=str(error)) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise SessionError(
            f"{source} is not a session file of a version that this program knows",
            got=f"format {metadata.get('format')!r}, version {metadata.get('version')!r}",
            expected=f"format {FORMAT!r}, version {VERSION!r}",
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
        return _read(file, names, bundle.spec)
    except (SafetensorError, ValueError) as error:
        raise SessionError(f"{source} is damaged", got=str(error)) from error


def _read(file: Any, names: set[str], spec: ModelSpec) -> Session:
    def tensor(name: str, dtype: str, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
        if name not in names:
            raise ValueError(f"no tensor {name!r}")
        view = file.get_slice(name)
        found = tuple(view.get_shape())
        if view.get_dtype() != dtype or len(found) != len(shape):
            raise ValueError(f"{name} is {view.get_dtype()} {list(found)}")
        if any(want is not None and want != have for want, have in zip(shape, found, strict=True)):
            raise ValueError(f"{name} is {view.get_dtype()} {list(found)}")
        return np.array(file.get_tensor(name))

    positions = tensor("positions", "I64", (None,))
    batch = positions.shape[0]
    lengths = tensor("lengths", "I64", (batch,))
    if batch == 0 or (positions < 0).any() or (lengths <= positions).any():
        raise ValueError("positions and lengths do not fit each other")
    if lengths.max() > 2**40:
        raise ValueError("a text is too long")
    ids = tensor("token_ids", "I64", (int(lengths.sum()),))
    if (ids < 0).any() or (ids >= spec.vocab_size).any():
        raise ValueError("a token id is out of range")
    layers = [tensor(f"state.{i}", "F32", (batch, *spec.state_shape)) for i in range(spec.num_layers)]
    if not all(np.isfinite(layer).all() for layer in layers):
        raise ValueError("the state is not finite")
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    return Session(layers, positions, [row.tolist() for row in rows])


def _metadata(bundle: Model) -> dict[str, str]:
    identity = bundle.identity
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": bundle.name,
        "spec_sha256": identity.spec_sha256,
        "weights_sha256": identity.weights_sha256,
    }


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), framework="numpy")


def _is_session(path: Path) -> bool:
    from safetensors import SafetensorError

    try:
        metadata = _open(path).metadata() or {}
    except (SafetensorError, OSError):
        return False
    return bool(metadata.get("format") == FORMAT)


def _cannot_write(target: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write the session {target}",
        got=error.strerror or str(error),
        hint="choose another place with --save-session; nothing was left behind",
    )
