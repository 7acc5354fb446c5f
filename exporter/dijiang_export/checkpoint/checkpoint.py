"""A DiJiang checkpoint folder -> ModelSpec and canonical parameters, read in blocks.

    with open_checkpoint("pythia-160m-dijiang") as checkpoint:
        checkpoint.spec                                             # geometry, decay included
        for start, block in checkpoint.row_blocks("layers.0.attention.qkv.weight"):
            ...

Opening reads config.json, the headers of the weight files and the decay tables; weights are read when asked
for, and only the bytes that were asked for. NaN and infinity in weights are found while they stream past.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint import decay as decay_tables
from dijiang_export.checkpoint.decay import Geometric, Tables
from dijiang_export.checkpoint.families import Parameter
from dijiang_export.checkpoint.source import Source, check_finite, shape_of, walk

_DECAY_PARTS = ("log_decay", "gain", "read_scale")


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a canonical parameter, and the stored rows (or columns) that they are."""

    source: str
    start: int
    rows: int
    transposed: bool = False


@dataclass(frozen=True)
class Layout:
    """Shape of a canonical parameter and the pieces that make its rows, in order."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def open_checkpoint(
    path: str | Path,
    *,
    extend_decay: bool = False,
    max_positions: int | None = None,
    keep_tables: bool = False,
) -> Checkpoint:
    """Open a DiJiang checkpoint in a Hugging Face folder.

    Args:
        path: folder with config.json and safetensors or `.bin` weights, single or sharded.
        extend_decay: let trained decay tables go on past their last row (`decay.extend`).
        max_positions: use only that many rows of trained decay tables.
        keep_tables: use stored tables as they are, even if they are geometric: an oracle's option, which
            reproduces the rounding of the stored entries and ends at the last row.

    Raises:
        CheckpointError: anything is wrong with the folder, from a missing file to an infinite decay. For a
            vanilla checkpoint the hint says how to convert it.
    """
    source = Source(Path(path))
    try:
        if not source.has_dijiang:
            source.check(dijiang=False)
            name = Path(path).resolve().name
            command = shlex.join(["dijiang-export", "convert", str(path), f"{name}-dijiang"])
            raise CheckpointError(
                f"{path} is a vanilla {source.family.name} checkpoint: it has no DiJiang parameters",
                hint=f"convert it first: {command}",
            )
        source.check(dijiang=True)
        return Checkpoint(
            source, extend_decay=extend_decay, max_positions=max_positions, keep_tables=keep_tables
        )
    except BaseException:
        source.close()
        raise


class Checkpoint:
    """An opened DiJiang checkpoint. Use it in a with statement, or close it.

    Attributes:
        path: its folder.
        spec: geometry and kind of decay.
        config: config.json as it stands.
        storage_dtype: float32, float16 or bfloat16: the type of most of the weights.
        files: the weight files that were read.
        tokenizer_files: the tokenizer's and the generation settings' files that exist.
        notes: what was done to read it that its owner may not expect, sentences for people.
        decay_notes: what was found in the decay tables, one sentence for each run of
            layers of which the same is true.
    """

    def __init__(
        self, source: Source, *, extend_decay: bool, max_positions: int | None, keep_tables: bool
    ) -> None:
        self._source = source
        self.path = source.path
        self.config: dict[str, Any] = source.config
        self.storage_dtype = source.storage_dtype()
        self.files = source.weights.files
        self.tokenizer_files = source.tokenizer_files
        self.notes = source.notes
        available = source.spec.max_position_embeddings
        if max_positions is not None and not 1 <= max_positions <= available:
            raise CheckpointError(
                "--max-positions does not fit the decay tables",
                got=max_positions,
                expected=f"1 .. {available}",
            )
        found = [
            self._classify(layer, max_positions=max_positions, keep_tables=keep_tables)
            for layer in range(source.spec.num_layers)
        ]
        self.decay_notes = _notes(found)
        self._decays, self.spec = _one_kind(
            source.spec, found, extend_decay=extend_decay, max_positions=max_positions
        )
        self._layouts = {
            parameter.name.format(i=layer): _layout(self.spec, parameter, layer)
            for layer, parameter in walk(source.family, self.spec, dijiang=True)
        }

    def __enter__(self) -> Checkpoint:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the weight files."""
        self.close()

    def close(self) -> None:
        """Close the weight files."""
        self._source.close()

    def hash_files(self, on_bytes: Callable[[int], None]) -> dict[str, dict[str, Any]]:
        """Name -> sha256 and bytes of the weight files that were opened, for provenance."""
        return self._source.weights.hashes(on_bytes)

    def names(self) -> list[str]:
        """Canonical names, in the order of the computation; no lm_head.weight if it is tied."""
        out = [name for name in self._layouts if not name.startswith((*_AFTER_LAYERS, "layers."))]
        for layer in range(self.spec.num_layers):
            prefix = f"layers.{layer}."
            out += [name for name in self._layouts if name.startswith(prefix)]
            out += [f"{prefix}attention.{part}" for part in self._decay_parts]
        return out + [name for name in self._layouts if name.startswith(_AFTER_LAYERS)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical parameter; `lm_head.weight` exists also if tied."""
        decay = self._decay(name)
        return tuple(decay.shape) if decay is not None else self._layout(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """A whole parameter, in its storage type; decay parameters in float32.

        Raises:
            CheckpointError: no such name; NaN or infinity; the file cannot be read.
        """
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop of the first axis; only their bytes are read. See `tensor`."""
        decay = self._decay(name)
        if decay is not None:
            return torch.from_numpy(decay[start:stop]).to(torch.float32)
        layout = self._layout(name)
        if not 0 <= start <= stop <= layout.shape[0]:
            raise IndexError(f"{name} has rows 0 .. {layout.shape[0]}, not {start} .. {stop}")
        out = torch.empty((stop - start, *layout.shape[1:]), dtype=self._torch_dtype(name))
        at = 0
        for piece in layout.pieces:
            first, last = max(start, at), min(stop, at + piece.rows)
            if first < last:
                stored = self._source.tensors[piece.source]
                target = out[first - start : last - start]
                read = stored.read_columns if piece.transposed else stored.read_rows
                read(target, piece.start + first - at)
                check_finite(target, piece.source)
            at += piece.rows
        return out

    def row_blocks(self, name: str, max_bytes: int = 16 << 20) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) until all rows are through, each block of at most `max_bytes` (or one row)."""
        shape = self.shape(name)
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self._torch_dtype(name).itemsize
        step = max(1, max_bytes // max(1, row_bytes))
        for start in range(0, shape[0], step):
            yield start, self.rows(name, start, min(start + step, shape[0]))

    def load_state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """All canonical parameters in memory, in `dtype`; decay parameters always in float32 or float64.

        They are float64, and not rounded to float32 first, if `dtype` is.
        """
        out: dict[str, torch.Tensor] = {}
        for name in self.names():
            decay = self._decay(name)
            if decay is None:
                out[name] = self.tensor(name).to(dtype)
            else:
                wide = dtype if dtype == torch.float64 else torch.float32
                out[name] = torch.from_numpy(decay).to(wide)
        return out

    def stored_tensors(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The opposite of `load_state_dict`: canonical parameters as tensors under their official names.

        For models that were trained on: same shapes, other values. Decay becomes D1 and D2 in float32, all
        else keeps the type that it comes in. A tied head is stored once.

        Args:
            parameters: every name of `names`; more are not looked at.

        Raises:
            CheckpointError: this checkpoint's decay is not geometric, or a parameter is missing or of
                another shape.
        """
        if self.spec.decay != "geometric":
            raise CheckpointError(f"{self.path}: trained decay tables cannot be stored anew")
        out: dict[str, torch.Tensor] = {}
        for name, layout in self._layouts.items():
            value = _parameter(parameters, name, layout.shape)
            at = 0
            for piece in layout.pieces:
                rows = value[at : at + piece.rows]
                at += piece.rows
                if piece.transposed:
                    out[piece.source] = rows.T.contiguous()
                    continue
                if piece.source not in out:
                    shape = self._source.tensors[piece.source].shape
                    out[piece.source] = torch.empty(shape, dtype=value.dtype, device=value.device)
                out[piece.source][piece.start : piece.start + piece.rows] = rows
        for layer in range(self.spec.num_layers):
            log_decay = _parameter(parameters, f"layers.{layer}.attention.log_decay", (self.spec.num_heads,))
            gammas = np.exp(log_decay.detach().cpu().double().numpy())
            tables = decay_tables.geometric_tables(gammas, self.spec.max_position_embeddings)
            out |= zip(self._source.family.decay_tables(layer), tables, strict=True)
        return out

    @property
    def _decay_parts(self) -> tuple[str, ...]:
        return _DECAY_PARTS if self.spec.decay == "tables" else _DECAY_PARTS[:1]

    def _layout(self, name: str) -> Layout:
        if name == "lm_head.weight" and self.spec.tied_embeddings:
            name = "embed_tokens.weight"
        if name not in self._layouts:
            raise CheckpointError(f"a {self.spec.family} model has no parameter {name!r}")
        return self._layouts[name]

    def _decay(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Float64 values of a decay parameter; None for other names."""
        match = re.fullmatch(r"layers\.(\d+)\.attention\.(log_decay|gain|read_scale)", name)
        if match is None or match[2] not in self._decay_parts or int(match[1]) >= len(self._decays):
            return None
        return np.asarray(getattr(self._decays[int(match[1])], match[2]), dtype=np.float64)

    def _torch_dtype(self, name: str) -> torch.dtype:
        if self._decay(name) is not None:
            return torch.float32
        kinds = [self._source.tensors[p.source].delivered_dtype for p in self._layout(name).pieces]
        out = kinds[0]
        for kind in kinds:
            out = torch.promote_types(out, kind)
        return out

    def _classify(self, layer: int, *, max_positions: int | None, keep_tables: bool) -> Geometric | Tables:
        stored = [self._source.tensors[name] for name in self._source.family.decay_tables(layer)]
        heads = self._source.spec.num_heads
        d1, d2 = (t.exact().reshape(heads, -1).to(torch.float64).numpy() for t in stored)
        dtype = stored[0].dtype if stored[0].itemsize <= stored[1].itemsize else stored[1].dtype
        return decay_tables.classify(
            d1, d2, dtype,  # type: ignore[arg-type]
            where=f"layer {layer}: the decay tables D1 and D2",
            max_positions=max_positions,
            keep_tables=keep_tables,
        )  # fmt: skip


def _parameter(parameters: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    value = parameters.get(name)
    if value is None or tuple(value.shape) != shape:
        raise CheckpointError(
            f"{name} cannot be stored",
            got="nothing" if value is None else list(value.shape),
            expected=list(shape),
        )
    return value


_AFTER_LAYERS = ("final_norm.", "project_out.", "lm_head.")


def _one_kind(
    spec: ModelSpec, found: list[Geometric | Tables], *, extend_decay: bool, max_positions: int | None
) -> tuple[list[Geometric] | list[Tables], ModelSpec]:
    """All layers' decay in one form, and the spec that says which."""
    geometric = [item for item in found if isinstance(item, Geometric)]
    if len(geometric) == len(found):
        if max_positions is not None:
            raise CheckpointError(
                "--max-positions cuts trained decay tables, and this checkpoint has none",
                got="geometric decay, which has no last position",
                hint="leave --max-positions out",
            )
        return geometric, spec
    rows = spec.max_position_embeddings if max_positions is None else max_positions
    tables = [
        decay_tables.geometric_as_tables(item, rows) if isinstance(item, Geometric) else item
        for item in found
    ]
    if extend_decay:
        tables = [decay_tables.extend(item) for item in tables]
    return tables, dataclasses.replace(
        spec, decay="tables", decay_rows=rows + extend_decay, decay_extended=extend_decay
    )


def _notes(found: Sequence[Geometric | Tables]) -> list[str]:
    notes: list[str] = []
    first = 0
    for text, run in itertools.groupby(_note(item) for item in found):
        last = first + len(list(run)) - 1
        notes.append(f"layer {first}: {text}" if first == last else f"layers {first} to {last}: {text}")
        first = last + 1
    return notes


def _note(found: Geometric | Tables) -> str:
    if isinstance(found, Tables):
        return f"trained tables, {len(found.log_decay)} rows"
    gammas = np.exp(found.log_decay)
    return f"geometric, {found.origin}: γ from {gammas.min():.5f} to {gammas.max():.5f}"


def _layout(spec: ModelSpec, parameter: Parameter, layer: int) -> Layout:
    sources = [(name.format(i=layer), shape_of(spec, letters)) for name, letters in parameter.sources]
    name, shape = sources[0]
    if parameter.layout == "transposed":
        return Layout(shape[::-1], (Piece(name, 0, shape[1], transposed=True),))
    if parameter.layout == "heads":
        # Stored rows: head 0's q, k, v, head 1's q, ... (@3459531:205); wanted: all q, all k, all v.
        d = spec.head_dim
        starts = [(3 * head + part) * d for part in range(3) for head in range(spec.num_heads)]
        return Layout(shape, tuple(Piece(name, start, d) for start in starts))
    rows = sum(s[0] for _, s in sources)
    return Layout((rows, *shape[1:]), tuple(Piece(n, 0, s[0]) for n, s in sources))
