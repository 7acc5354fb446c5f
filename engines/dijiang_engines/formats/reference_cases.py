"""Recorded cases: what the PyTorch reference computed, for `validate` to compare with.

`reference.safetensors` holds teacher-forced cases. Case `c` has B rows of up to T tokens; the states
start at zero even where positions do not:

    c.input_ids    int64 [B, T]         right-padded with 0
    c.seq_lens     int64 [B]            tokens of each row
    c.positions    int64 [B]            where each row starts
    c.marks        int64 [B, M]         ascending token counts; the last is seq_lens
    c.logits       float32 [B, M, V]    of the last of the first marks[b, m] tokens
    c.state_marks  int64 [S]            indices into M
    c.state.{i}    float32 [B, S, H, d, d]   layer i's state after marks[b, state_marks[s]] tokens

The case `embedding` is of another kind: rows of up to T tokens, each of the vocabulary's tokens once, and of
the first N layers the state after each row, summed over its features:

    embedding.input_ids   int64 [B, T]         right-padded with 0
    embedding.seq_lens    int64 [B]
    embedding.positions   int64 [B]
    embedding.values.{i}  float32 [B, H, d]    i < N

Metadata: format "dijiang-reference", version "1", cases (a JSON list), compute_dtype; rounding_cost and
rounding_cost_int8 (JSON, `rounding_cost`) and embedding (N), all absent from older files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.rounding_cost import INT8_KEY, RoundingCost, read_rounding_cost
from dijiang_engines.formats.rounding_cost import KEY as COST_KEY
from dijiang_engines.formats.safe_files import parse_json
from dijiang_engines.spec import ModelSpec

FORMAT = "dijiang-reference"
VERSION = "1"
MAX_CASES = 1000
EMBEDDING = "embedding"
"""Name of the case that has every row of the embedding, and of the metadata that says it is there."""

_CASE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), framework="numpy")


@dataclass(frozen=True)
class ReferenceCase:
    """One case. The small arrays are here; logits and states are read when asked for."""

    name: str
    input_ids: npt.NDArray[np.int64]
    """[B, T]"""
    seq_lens: npt.NDArray[np.int64]
    """[B]"""
    positions: npt.NDArray[np.int64]
    """[B]"""
    marks: npt.NDArray[np.int64]
    """[B, M]"""
    state_marks: npt.NDArray[np.int64]
    """[S]"""
    _file: Any
    _check: Callable[[], None]
    _first: int = 0
    """The file's row that is row 0 here."""

    @property
    def batch(self) -> int:
        """B."""
        return int(self.input_ids.shape[0])

    def logits(self, row: int | None = None) -> npt.NDArray[np.float32]:
        """[B, M, V], or [M, V] of one row, freshly read."""
        return self._read("logits", row)

    def state(self, layer: int, row: int | None = None) -> npt.NDArray[np.float32]:
        """[B, S, H, d, d] of one layer, or [S, H, d, d] of one row, freshly read."""
        return self._read(f"state.{layer}", row)

    def rows(self, start: int, stop: int) -> ReferenceCase:
        """The case of the rows `start` to `stop` alone, cut to the longest of them."""
        rows = slice(start, stop)
        lens = self.seq_lens[rows]
        return replace(
            self,
            input_ids=np.ascontiguousarray(self.input_ids[rows, : int(lens.max())]),
            seq_lens=lens,
            positions=self.positions[rows],
            marks=self.marks[rows],
            _first=self._first + start,
        )

    def _read(self, field: str, row: int | None) -> npt.NDArray[np.float32]:
        first, stop = (0, self.batch) if row is None else (row, row + 1)
        data = self._file.get_slice(f"{self.name}.{field}")[self._first + first : self._first + stop]
        self._check()
        return np.asarray(data if row is None else data[0], dtype=np.float32)


@dataclass(frozen=True)
class EmbeddingCase:
    """The case `embedding`. Values are read when asked for."""

    input_ids: npt.NDArray[np.int64]
    """[B, T]"""
    seq_lens: npt.NDArray[np.int64]
    """[B]"""
    positions: npt.NDArray[np.int64]
    """[B]"""
    layers: int
    """Of how many layers there are values."""
    _file: Any

    def values(self, layer: int) -> npt.NDArray[np.float32]:
        """[B, H, d]: one layer's states, summed over their features."""
        return np.asarray(self._file.get_tensor(f"{EMBEDDING}.values.{layer}"), dtype=np.float32)


class Reference:
    """An opened reference.safetensors whose names, types and shapes have been checked.

    Attributes:
        path: the file.
        cases: name -> ReferenceCase, in recorded order.
        compute_dtype: "float32" or "float64": what the reference computed in.
        rounding_cost: what rounding to the bundle's type costs the model; None in older files.
        rounding_cost_int8: what it costs with activations in int8; None without quantised weights.
        embedding: the case with every row of the embedding; None without `--cases full` and in older files.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        read_from: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            path: the file.
            spec: the model's.
            read_from: another name of the same file, to open in place of `path`.
            check: called after each reading; raises if the file is not what it was.

        Raises:
            BundleError: the file is not what the spec says.
        """
        from safetensors import SafetensorError

        self.path = path
        self._spec = spec
        self._check = check
        try:
            self._file = _open(read_from or path)
            metadata: dict[str, str] = self._file.metadata() or {}
            self._names = set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} is not a safetensors file", got=str(error)) from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise BundleError(
                f"{path} does not hold recorded cases of a version that this program knows",
                got=f"format {metadata.get('format')!r}, version {metadata.get('version')!r}",
                expected=f"format {FORMAT!r}, version {VERSION!r}",
            )
        self.compute_dtype: str = metadata.get("compute_dtype", "")
        if self.compute_dtype not in ("float32", "float64"):
            raise BundleError(f"{path} has a bad compute_dtype", got=repr(self.compute_dtype)[:80])
        self.rounding_cost: RoundingCost | None = None
        if COST_KEY in metadata:
            self.rounding_cost = read_rounding_cost(metadata[COST_KEY], str(path), spec.num_layers)
        self.rounding_cost_int8: RoundingCost | None = None
        if INT8_KEY in metadata:
            self.rounding_cost_int8 = read_rounding_cost(metadata[INT8_KEY], str(path), spec.num_layers)
        names = parse_json(metadata.get("cases", "").encode(), f"the list of cases in {path}")
        if not isinstance(names, list) or len(names) > MAX_CASES or len(set(map(str, names))) != len(names):
            raise BundleError(f"{path} has a bad list of cases")
        self.cases: Mapping[str, ReferenceCase] = MappingProxyType({n: self._case(n) for n in names})
        self.embedding = self._embedding(metadata[EMBEDDING]) if EMBEDDING in metadata else None

    def _case(self, name: Any) -> ReferenceCase:
        if not isinstance(name, str) or not _CASE_NAME.fullmatch(name):
            raise BundleError(f"{self.path} has a case with an odd name", got=repr(name)[:100])
        spec = self._spec
        batch, length = self._shape(name, "input_ids", "I64", (None, None))
        self._shape(name, "seq_lens", "I64", (batch,))
        self._shape(name, "positions", "I64", (batch,))
        _, marks = self._shape(name, "marks", "I64", (batch, None))
        (states,) = self._shape(name, "state_marks", "I64", (None,))
        self._shape(name, "logits", "F32", (batch, marks, spec.vocab_size))
        for layer in range(spec.num_layers):
            self._shape(name, f"state.{layer}", "F32", (batch, states, *spec.state_shape))
        case = ReferenceCase(
            name,
            self._ints(name, "input_ids"),
            self._ints(name, "seq_lens"),
            self._ints(name, "positions"),
            self._ints(name, "marks"),
            self._ints(name, "state_marks"),
            self._file,
            self._check,
        )
        good = (
            ((case.input_ids >= 0) & (case.input_ids < spec.vocab_size)).all()
            and ((case.seq_lens >= 1) & (case.seq_lens <= length)).all()
            and (case.positions >= 0).all()
            and marks > 0
            and (case.marks >= 1).all()
            and (np.diff(case.marks, axis=1) >= 0).all()
            and (case.marks[:, -1] == case.seq_lens).all()
            and ((case.state_marks >= 0) & (case.state_marks < marks)).all()
        )
        if not good:
            raise BundleError(f"case {name!r} in {self.path} has values out of range")
        return case

    def _embedding(self, layers: str) -> EmbeddingCase:
        spec = self._spec
        wanted = [str(n) for n in range(1, min(spec.num_layers, 8) + 1)]
        if layers not in wanted or EMBEDDING in self.cases:
            raise BundleError(
                f"{self.path} does not say rightly what its case {EMBEDDING!r} holds",
                got=repr(layers)[:80],
                expected=f"a number of layers from 1 to {wanted[-1]}, and no other case of that name",
            )
        batch, length = self._shape(EMBEDDING, "input_ids", "I64", (None, None))
        self._shape(EMBEDDING, "seq_lens", "I64", (batch,))
        self._shape(EMBEDDING, "positions", "I64", (batch,))
        for layer in range(int(layers)):
            self._shape(EMBEDDING, f"values.{layer}", "F32", (batch, spec.num_heads, spec.head_dim))
        ids, lens, positions = (self._ints(EMBEDDING, f) for f in ("input_ids", "seq_lens", "positions"))
        good = (
            ((ids >= 0) & (ids < spec.vocab_size)).all()
            and ((lens >= 1) & (lens <= length)).all()
            and (positions >= 0).all()
        )
        if not good:
            raise BundleError(f"case {EMBEDDING!r} in {self.path} has values out of range")
        return EmbeddingCase(ids, lens, positions, int(layers), self._file)

    def _ints(self, case: str, field: str) -> npt.NDArray[np.int64]:
        return np.asarray(self._file.get_tensor(f"{case}.{field}"), dtype=np.int64)

    def _shape(self, case: str, field: str, dtype: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
        key = f"{case}.{field}"
        if key not in self._names:
            raise BundleError(f"{self.path} lacks the tensor {key!r}")
        view = self._file.get_slice(key)
        shape, found = tuple(view.get_shape()), str(view.get_dtype())
        fits = len(shape) == len(expected) and all(
            e is None or e == s for e, s in zip(expected, shape, strict=True)
        )
        if found != dtype or not fits or 0 in shape[:1]:
            raise BundleError(
                f"tensor {key!r} in {self.path} has another type or shape than the model needs",
                got=f"{found} {list(shape)}",
                expected=f"{dtype} {['any' if e is None else e for e in expected]}",
            )
        return shape
