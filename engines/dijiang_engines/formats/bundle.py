"""The bundle: one folder that holds everything that a model needs to run, checked before it is used.

    manifest.json                       format, model spec, graphs' inputs and outputs, file hashes
    prefill.onnx  step.onnx             standard ONNX operators            } all weights in
    prefill.trt.onnx  step.trt.onnx     DijiangAttention as plugin nodes   } weights.data
    reference.safetensors               recorded cases for `validate`
    config.json, tokenizer files        copied from the checkpoint

`open_bundle` trusts nothing: sizes and nesting are bounded before anything is parsed, every file that
the manifest lists must be there with the right size and hash and be an ordinary file, and the graphs may
name no data but `weights.data`, inside its bounds. Hashes find corruption, not tampering: whoever can
change a file can change the manifest. Nothing in a bundle is executed by opening it.

docs/bundle-format.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.graph_check import check_graph
from dijiang_engines.formats.manifest import (
    CONFIG,
    MANIFEST,
    REFERENCE,
    RETRY,
    TOKENIZER,
    WEIGHTS,
    FileInfo,
    GraphInfo,
    Manifest,
    TensorInfo,
    graph_io,
    read_manifest,
)
from dijiang_engines.formats.onnx_external import check_external_data
from dijiang_engines.formats.opened_files import OpenedFiles
from dijiang_engines.formats.reference_cases import Reference

__all__ = [
    "Bundle", "FileInfo", "GraphInfo", "ModelIdentity", "TensorInfo", "graph_io", "open_bundle",
]  # fmt: skip

MAX_GRAPH_BYTES = 256 << 20
"""A graph without its weights; 32 layers of standard operators take about 2 MB."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a saved state belongs to: the same numbers mean something else in another model."""

    spec_sha256: str
    weights_sha256: str


class Bundle:
    """An opened bundle. Make one with `open_bundle`.

    Attributes:
        path: the folder.
        manifest: manifest.json, read-only by convention.
        spec: the model's geometry.
        dtype: of the weights and activations: float32, float16 or bfloat16.
        logits: "last" or "all": what the graphs return.
        graphs: name ("prefill", "step", "prefill_trt", ...) -> GraphInfo.
        files: name -> FileInfo of every file but the manifest.
        cases: names of the recorded cases, None without any.
        opened: through which files are read, so that they are those that were opened.
    """

    def __init__(self, path: Path, manifest: Manifest, opened: OpenedFiles) -> None:
        self.path = path
        self.opened = opened
        self.manifest = manifest.raw
        self.spec = manifest.spec
        self.dtype = manifest.dtype
        self.logits = manifest.logits
        self.graphs: Mapping[str, GraphInfo] = MappingProxyType(manifest.graphs)
        self.files: Mapping[str, FileInfo] = MappingProxyType(manifest.files)
        self.cases = manifest.cases
        opened.files = self.files

    @property
    def name(self) -> str:
        """The name of what the bundle was made from, or the folder's."""
        source = self.manifest.get("source")
        name = source.get("name") if isinstance(source, dict) else None
        return name if isinstance(name, str) and name else self.path.name

    @property
    def all_logits(self) -> bool:
        """True if the graphs return logits of every token."""
        return self.logits == "all"

    def graph_path(self, name: str) -> Path:
        """The file of graph `name`.

        Raises:
            BundleError: the bundle has no such graph.
        """
        if name not in self.graphs:
            raise BundleError(
                f"the bundle {self.path} has no graph {name!r}",
                got=", ".join(self.graphs),
                hint="export the checkpoint again with this version of dijiang-export",
            )
        return self.path / self.graphs[name].file

    @property
    def weights_path(self) -> Path:
        """weights.data."""
        return self.path / WEIGHTS

    @property
    def tokenizer_path(self) -> Path | None:
        """tokenizer.json, if the checkpoint came with one."""
        return self.path / TOKENIZER if TOKENIZER in self.files else None

    @property
    def config_path(self) -> Path | None:
        """The checkpoint's config.json."""
        return self.path / CONFIG if CONFIG in self.files else None

    @property
    def reference_path(self) -> Path | None:
        """reference.safetensors, unless the bundle was exported with `--cases none`."""
        return self.path / REFERENCE if self.cases is not None else None

    @property
    def identity(self) -> ModelIdentity:
        """Two bundles with the same identity compute the same function, whatever their graphs."""
        spec = json.dumps(self.spec.to_json(), sort_keys=True, separators=(",", ":"))
        return ModelIdentity(hashlib.sha256(spec.encode()).hexdigest(), self.files[WEIGHTS].sha256)

    def reference(self) -> Reference:
        """The recorded cases, after their file's hash has been checked; tensors are read when asked for.

        Raises:
            BundleError: there are none, or the file is not what the manifest or the spec says.
        """
        if self.reference_path is None:
            raise BundleError(
                f"the bundle {self.path} holds no recorded cases",
                hint="export the checkpoint again with `--cases short` or `--cases full`",
            )
        self.opened.verify(REFERENCE)
        with self.opened.unchanged(REFERENCE) as root:
            reference = Reference(
                self.reference_path, self.spec, root / REFERENCE, lambda: self.opened.check(REFERENCE)
            )
        if list(reference.cases) != self.cases:
            raise BundleError(
                f"{REFERENCE} holds other cases than the manifest says",
                got=list(reference.cases),
                expected=self.cases,
                hint=RETRY,
            )
        return reference

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Check the hash of every file, also of those that `open_bundle` leaves for later.

        Args:
            on_bytes: called with the size of each block that was read, for a progress bar.

        Raises:
            BundleError: a file is missing or differs.
        """
        for name in self.files:
            self.opened.verify(name, on_bytes)

    def _check_graph(self, name: str) -> None:
        """Hash a graph and check where its weights are, in one reading."""
        data = self.opened.read(name, MAX_GRAPH_BYTES)
        try:
            check_external_data(data, location=WEIGHTS, file_bytes=self.files[WEIGHTS].bytes)
            check_graph(data, name, self.spec, step=self._is_step(name), all_logits=self.all_logits)
        except BundleError as error:
            error.args = (f"{name}: {error.what}",)
            error.what = f"{name}: {error.what}"
            raise

    def _is_step(self, file: str) -> bool:
        """By the key that the manifest gives it, or by its name where it has none."""
        key = next((key for key, graph in self.graphs.items() if graph.file == file), file)
        return key.startswith("step")

    def _check_files(self, verify: bool) -> None:
        for name in self.files:
            self.opened.note(name)
        for name in self.files:
            if name.endswith(".onnx"):
                self._check_graph(name)
            elif name not in (WEIGHTS, REFERENCE) or (name == WEIGHTS and verify):
                self.opened.verify(name)


def open_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Open a bundle and check it.

    Args:
        path: the folder. It may be reached through a symbolic link; what is inside it may not.
        verify: hash weights.data too. Every other file that running needs is always hashed; the recorded
            cases are hashed when `Bundle.reference` opens them.

    Raises:
        BundleError: there is no bundle, or it is incomplete, corrupt, of another version or unsafe.
    """
    folder = Path(path)
    if not folder.is_dir() or not (folder / MANIFEST).exists():
        raise _no_bundle(folder)
    opened = OpenedFiles(folder, "bundle", RETRY)
    with opened.named():
        bundle = Bundle(folder, read_manifest(opened.root), opened)
    bundle._check_files(verify)
    return bundle


def _no_bundle(folder: Path) -> BundleError:
    if not folder.exists():
        command = "dijiang-export to-onnx CHECKPOINT"
        if folder.name == "tiny-stdlib.bundle":  # the default: the sample needs no argument
            command = "dijiang-export to-onnx"
        return BundleError(f"there is no bundle at {folder}", hint=f"make one with `{command}`")
    if not folder.is_dir():
        return BundleError(f"{folder} is not a bundle", got="a file", expected="a folder with manifest.json")
    hint = None
    if (folder / CONFIG).exists():
        hint = f"this looks like a checkpoint: export it first with `dijiang-export to-onnx {folder}`"
    return BundleError(
        f"{folder} is not a bundle",
        got="a folder without manifest.json",
        expected="a folder with it",
        hint=hint,
    )
