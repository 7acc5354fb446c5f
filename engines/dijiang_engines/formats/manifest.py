"""manifest.json: what a bundle says about itself, checked value by value."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dijiang_engines import io_names
from dijiang_engines.errors import BundleError
from dijiang_engines.formats.file_table import (
    GENAI_ADAPTER,
    GENAI_CONFIG,
    MANIFEST,
    REFERENCE,
    FileInfo,
    check_format,
    file_table,
)
from dijiang_engines.formats.quantised.manifest import KEY, Quantisation, read_quantisation
from dijiang_engines.formats.safe_files import LIMITS, parse_json, read_bounded
from dijiang_engines.op_contract import DOMAIN, OP_NAME, OP_VERSION, T_TYPES
from dijiang_engines.sizes import weight_bytes
from dijiang_engines.spec import ModelSpec

FORMAT = "dijiang-bundle"
FORMAT_VERSION = 1
"""Of bundles whose weights are floats,"""
QUANTISED_VERSION = 2
"""and of those with quantised ones, which a reader that knows only the first refuses."""
WEIGHTS = "weights.data"
GENAI = "genai"
"""Key of the table of GENAI_FILES. Readers that do not know it take every .onnx in `files` for a graph of the
model, which the adapter is not."""
GENAI_FILES = (GENAI_CONFIG, GENAI_ADAPTER)

MAX_GRAPHS = 64
MAX_CASES = 100
MAX_RANK = 8
"""Dimensions of a tensor; the model's have at most four."""
MAX_NAME = 200
"""Characters of a tensor's or a case's name."""

_IO_DTYPES = ("int64", "int32", "float32")

RETRY = "export the checkpoint again, or copy the bundle again"


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph. A dimension is a size, or the name of one that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class GraphInfo:
    """One graph of a bundle."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def graph_io(
    spec: ModelSpec, *, step: bool, all_logits: bool
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """The inputs and outputs that a graph of this model has, in order.

    Args:
        spec: the model.
        step: the graph for one token (L = 1) rather than the one for any number.
        all_logits: logits of every token rather than of each row's last valid one.
    """
    batch, length = io_names.BATCH_DIM, 1 if step else io_names.SEQUENCE_DIM
    state = (batch, *spec.state_shape)
    layers = range(spec.num_layers)
    inputs = (
        TensorInfo(io_names.INPUT_IDS, "int64", (batch, length)),
        TensorInfo(io_names.POSITIONS, "int64", (batch,)),
        TensorInfo(io_names.SEQ_LENS, "int64", (batch,)),
        *(TensorInfo(io_names.past_state(i), "float32", state) for i in layers),
    )
    outputs = (
        TensorInfo(io_names.LOGITS, "float32", (batch, length if all_logits else 1, spec.vocab_size)),
        *(TensorInfo(io_names.present_state(i), "float32", state) for i in layers),
    )
    return inputs, outputs


class Manifest:
    """A checked manifest.

    Attributes:
        raw: the JSON object.
        spec: the model's geometry.
        dtype: float32, float16 or bfloat16.
        logits: "last" or "all".
        files: name -> FileInfo, every file but the manifest and those of `genai`.
        genai: the same of what only ONNX Runtime GenAI reads; empty in bundles that it does not run.
        graphs: name -> GraphInfo.
        cases: names of the recorded cases, None without a reference file.
        quantisation: of the weights, None if they are floats.
    """

    def __init__(self, raw: Any) -> None:
        if not isinstance(raw, dict):
            raise BundleError(f"{MANIFEST} is not a JSON object", hint=RETRY)
        self.raw: dict[str, Any] = raw
        _check_header(raw)
        self.spec = ModelSpec.from_json(raw.get("spec", {}))
        self.dtype: str = raw["dtype"]
        self.logits: str = raw["logits"]
        self.quantisation: Quantisation | None = None
        if raw["format_version"] == QUANTISED_VERSION:
            self.quantisation = read_quantisation(raw.get(KEY), self.spec, MANIFEST)
        self.files = file_table(raw, (WEIGHTS,), source=MANIFEST, hint=RETRY)
        self.genai = _genai_files(raw)
        self._check_weights()  # before anything is made in proportion to the spec
        self.graphs = self._graph_table()
        reference = raw.get("reference")
        self.cases: list[str] | None = None if reference is None else list(reference["cases"])

    def _check_weights(self) -> None:
        quantised = self.quantisation
        parts = None if quantised is None else quantised.parts
        needed, there = weight_bytes(self.spec, self.dtype, parts), self.files[WEIGHTS].bytes
        if needed > there:
            raise BundleError(
                f"the manifest's model spec has more parameters than {WEIGHTS} has room for",
                got=f"{there} bytes",
                expected=f"at least {needed} bytes in {self.dtype}",
                hint=RETRY,
            )

    def _graph_table(self) -> dict[str, GraphInfo]:
        graphs = self.raw.get("graphs")
        if not isinstance(graphs, dict) or not {"prefill", "step"} <= set(graphs):
            raise _bad_manifest("graphs", "an object with at least prefill and step")
        if len(graphs) > MAX_GRAPHS:
            raise _bad_manifest("graphs", f"at most {MAX_GRAPHS} graphs")
        table = {}
        for name, entry in graphs.items():
            file = entry.get("file") if isinstance(entry, dict) else None
            if not isinstance(file, str) or not file.endswith(".onnx") or file not in self.files:
                raise _bad_manifest(f"graphs.{name}.file", "an .onnx file that `files` lists")
            info = GraphInfo(
                file,
                _tensor_infos(entry.get("inputs"), f"graphs.{name}.inputs"),
                _tensor_infos(entry.get("outputs"), f"graphs.{name}.outputs"),
            )
            self._check_io(name, info)
            table[name] = info
        return table

    def _check_io(self, name: str, info: GraphInfo) -> None:
        step = name.partition("_")[0] == "step"
        for kind, found, expected in zip(
            ("inputs", "outputs"),
            (info.inputs, info.outputs),
            graph_io(self.spec, step=step, all_logits=self.logits == "all"),
            strict=True,
        ):
            if len(found) != len(expected) or _fixed_part(found) != _fixed_part(expected):
                raise BundleError(
                    f"the manifest's {kind} of graph {name!r} do not fit its model spec",
                    got=_differences(found, expected),
                    expected=_differences(expected, found),
                    hint=RETRY,
                )


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        BundleError: it is too large, not JSON, of another version, or does not make sense.
    """
    return Manifest(parse_json(read_bounded(folder / MANIFEST, LIMITS["manifest"]), MANIFEST))


def _check_header(manifest: dict[str, Any]) -> None:
    again = "export the checkpoint again"
    versions = (FORMAT_VERSION, QUANTISED_VERSION)
    check_format(manifest, "bundle", FORMAT, versions, source=MANIFEST, again=again)
    if (manifest["format_version"] == QUANTISED_VERSION) != (KEY in manifest):
        raise _bad_manifest(KEY, f"a value with format_version {QUANTISED_VERSION}, and none with another")
    if manifest.get("dtype") not in T_TYPES:
        raise _bad_manifest("dtype", " | ".join(T_TYPES))
    if manifest.get("logits") not in ("last", "all"):
        raise _bad_manifest("logits", "last | all")
    op = manifest.get("op")
    if not isinstance(op, dict) or (op.get("domain"), op.get("name")) != (DOMAIN, OP_NAME):
        raise _bad_manifest("op", f"{DOMAIN}::{OP_NAME}")
    if op.get("version") != OP_VERSION:
        raise BundleError(
            f"the bundle's graphs use another version of {OP_NAME}",
            got=repr(op.get("version"))[:80],
            expected=OP_VERSION,
            hint="export the checkpoint again with this version of dijiang-export",
        )
    weights = manifest.get("weights")
    if not isinstance(weights, dict) or weights.get("file") != WEIGHTS:
        raise _bad_manifest("weights", repr(WEIGHTS))
    reference = manifest.get("reference")
    if reference is not None:
        cases = reference.get("cases") if isinstance(reference, dict) else None
        good = isinstance(cases, list) and len(cases) <= MAX_CASES and all(map(_is_name, cases))
        if not good or reference.get("file") != REFERENCE:
            raise _bad_manifest("reference", f"null, or the file {REFERENCE} and a list of cases")


def _genai_files(manifest: dict[str, Any]) -> dict[str, FileInfo]:
    """The table under GENAI; none in bundles that were made before there was one."""
    if GENAI not in manifest:
        return {}
    files = manifest[GENAI]
    if not isinstance(files, dict) or set(files) != set(GENAI_FILES) or set(files) & set(manifest["files"]):
        raise _bad_manifest(GENAI, f"{' and '.join(GENAI_FILES)}, which `files` does not list")
    return file_table({"files": files}, (), source=MANIFEST, hint=RETRY)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME


def _tensor_infos(entries: Any, where: str) -> tuple[TensorInfo, ...]:
    if not isinstance(entries, list):
        raise _bad_manifest(where, "a list of tensors")
    infos = []
    for entry in entries:
        name, dtype, shape = (
            (entry.get("name"), entry.get("dtype"), entry.get("shape"))
            if isinstance(entry, dict)
            else (None,) * 3
        )
        good_shape = (
            isinstance(shape, list)
            and len(shape) <= MAX_RANK
            and all(
                (isinstance(dim, str) and len(dim) <= MAX_NAME)
                or (isinstance(dim, int) and not isinstance(dim, bool) and dim > 0)
                for dim in shape
            )
        )
        if not _is_name(name) or dtype not in _IO_DTYPES or not good_shape:
            raise _bad_manifest(where, "tensors with a name, a dtype and a shape")
        infos.append(TensorInfo(str(name), str(dtype), tuple(shape or ())))
    return tuple(infos)


def _fixed_part(tensors: tuple[TensorInfo, ...]) -> set[tuple[str, str, tuple[int | None, ...]]]:
    """What two descriptions must agree in: not the order, and not the names of sizes that vary."""
    return {
        (t.name, t.dtype, tuple(dim if isinstance(dim, int) else None for dim in t.shape)) for t in tensors
    }


def _differences(tensors: tuple[TensorInfo, ...], other: tuple[TensorInfo, ...]) -> str:
    known = _fixed_part(other)
    shown = list(islice((t for t in tensors if not _fixed_part((t,)) <= known), 3))
    return "; ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in shown) or "no such tensor"


def _bad_manifest(where: str, expected: str) -> BundleError:
    return BundleError(f"{MANIFEST} has a bad or missing value for {where}", expected=expected, hint=RETRY)
