"""The bundle: one folder that holds everything that a model needs to run, checked before it is used.

    manifest.json                       format, model spec, graphs' inputs and outputs, file hashes
    prefill.onnx  step.onnx             standard ONNX operators            } all weights in
    prefill.trt.onnx  step.trt.onnx     DijiangAttention as plugin nodes   } weights.data
    reference.safetensors               recorded cases for `validate`
    config.json, tokenizer files        copied from the checkpoint
    genai_config.json  adapter.onnx     what ONNX Runtime GenAI runs the standard graphs with

`open_bundle` trusts nothing: sizes and nesting are bounded before anything is parsed, every file that
the manifest lists must be there with the right size and hash and be an ordinary file, and the graphs may
name no data but `weights.data`, inside its bounds. Hashes find corruption, not tampering: whoever can
change a file can change the manifest. Nothing in a bundle is executed by opening it.

docs/bundle-format.md describes the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.file_table import CONFIG, MANIFEST, REFERENCE
from dijiang_engines.formats.folder import Model, ModelIdentity, Wording, spec_sha256
from dijiang_engines.formats.graph_check import check_graph
from dijiang_engines.formats.manifest import RETRY, WEIGHTS, GraphInfo, Manifest, read_manifest
from dijiang_engines.formats.onnx_external import check_external_data
from dijiang_engines.formats.opened_files import OpenedFiles
from dijiang_engines.formats.safe_files import LIMITS
from dijiang_engines.weight_formats import Activations


class Bundle(Model):
    """An opened bundle. Make one with `open_bundle`.

    Attributes:
        graphs: name ("prefill", "step", "prefill_trt", ...) -> GraphInfo; and those of `Model`.
    """

    wording = Wording(
        kind="bundle",
        manifest="the manifest",
        retry=RETRY,
        record="export the checkpoint again with `--cases short` or `--cases full`",
    )

    def __init__(self, path: Path, manifest: Manifest, opened: OpenedFiles) -> None:
        identity = ModelIdentity(spec_sha256(manifest.spec), manifest.files[WEIGHTS].sha256)
        super().__init__(
            path, opened, manifest.raw,
            spec=manifest.spec, files=manifest.files | manifest.genai, cases=manifest.cases,
            identity=identity, quantisation=manifest.quantisation,
        )  # fmt: skip
        self.graphs: Mapping[str, GraphInfo] = MappingProxyType(manifest.graphs)
        self._genai = frozenset(manifest.genai)

    @property
    def name(self) -> str:
        """The name of what the bundle was made from, or the folder's."""
        source = self.manifest.get("source")
        name = source.get("name") if isinstance(source, dict) else None
        return name if isinstance(name, str) and name else self.path.name

    @property
    def runs_with_genai(self) -> bool:
        """Whether ONNX Runtime GenAI's files are there. Nothing here reads them."""
        return bool(self._genai)

    @property
    def activations(self) -> Mapping[str, Activations] | None:
        """As of every `Model`."""
        return None if self.quantisation is None else self.quantisation.activations

    def graph_path(self, name: str) -> Path:
        """The file of graph `name`.

        Raises:
            BundleError: the bundle has no such graph.
        """
        if name not in self.graphs and self.quantisation is not None and name.endswith("_trt"):
            raise BundleError(
                f"the bundle {self.path} has no graphs for TensorRT",
                got=f"{self.quantisation.weight_format} weights with float32 activations",
                hint="ONNX Runtime runs it; for TensorRT export with `--dtype float16`",
            )
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

    def _check_graph(self, name: str) -> None:
        """Hash a graph and check where its weights are, in one reading."""
        data = self.opened.read(name, LIMITS["graph"])
        try:
            check_external_data(data, location=WEIGHTS, file_bytes=self.files[WEIGHTS].bytes)
            check_graph(
                data, name, self.spec, step=self._is_step(name), all_logits=self.all_logits,
                quantised=self.quantised,
            )  # fmt: skip
        except BundleError as error:
            error.args = (f"{name}: {error.what}",)
            error.what = f"{name}: {error.what}"
            raise

    def _is_step(self, file: str) -> bool:
        """By the key that the manifest gives it, or by its name where it has none."""
        key = next((key for key, graph in self.graphs.items() if graph.file == file), file)
        return key.startswith("step")

    def check_files(self, verify: bool) -> None:
        """Check that every file is there with the right size, and all graphs that are run here; hash all but
        the cases, the weights if `verify`."""
        for name in self.files:
            self.opened.note(name)
        for name in self.files:
            if name.endswith(".onnx") and name not in self._genai:
                self._check_graph(name)
            elif name not in (WEIGHTS, REFERENCE) or (name == WEIGHTS and verify):
                self.verify_files((name,))


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
    bundle.check_files(verify)
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
