"""What a bundle and an engine share: one model in a folder, its identity, its files, its recorded cases."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.file_table import CONFIG, REFERENCE, TOKENIZER, FileInfo
from dijiang_engines.formats.opened_files import OpenedFiles
from dijiang_engines.formats.quantised.manifest import Quantisation
from dijiang_engines.formats.reference_cases import Reference
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Activations, Matrix


@dataclass(frozen=True)
class ModelIdentity:
    """What a saved state belongs to: the same numbers mean something else in another model.

    Two models of the same identity compute the same function, whatever their graphs or plans.
    """

    spec_sha256: str
    weights_sha256: str


def spec_sha256(spec: ModelSpec) -> str:
    """The hash of a model spec, hexadecimal."""
    text = json.dumps(spec.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Wording:
    """How messages speak of one kind of folder."""

    kind: str
    manifest: str
    retry: str
    """What to do about a file that is not right."""
    record: str
    """How to get recorded cases into it."""


class Model(ABC):
    """A folder that holds a model, opened: a `Bundle` or an `EngineFolder`.

    Attributes:
        path: the folder.
        opened: through which files are read, so that they are those that were opened.
        manifest: the JSON object that describes it, read-only by convention.
        spec: the model's geometry.
        dtype: of the weights and activations: float32, float16 or bfloat16.
        logits: "last" or "all": of which tokens a prefill returns logits.
        files: name -> FileInfo of every file but the manifest.
        cases: names of the recorded cases, None without any.
        identity: what the model is, wherever it came from.
        quantisation: of the weights; None if they are floats.
    """

    wording: ClassVar[Wording]

    def __init__(
        self,
        path: Path,
        opened: OpenedFiles,
        manifest: dict[str, Any],
        *,
        spec: ModelSpec,
        files: Mapping[str, FileInfo],
        cases: list[str] | None,
        identity: ModelIdentity,
        quantisation: Quantisation | None = None,
    ) -> None:
        self.path = path
        self.opened = opened
        self.manifest = manifest
        self.spec = spec
        self.dtype: str = manifest["dtype"]
        self.logits: str = manifest["logits"]
        self.files: Mapping[str, FileInfo] = MappingProxyType(dict(files))
        self.cases = cases
        self.identity = identity
        self.quantisation = quantisation
        self._verified: set[str] = set()
        opened.expect(self.files)

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the model, for people."""

    @property
    def quantised(self) -> Mapping[str, Sequence[Matrix]] | None:
        """Canonical name -> stored matrices of what is quantised; None: nothing is."""
        return None if self.quantisation is None else self.quantisation.parts

    @property
    def weight_format(self) -> str:
        """float, int8 or int4."""
        return "float" if self.quantisation is None else self.quantisation.weight_format

    @property
    def activations(self) -> Mapping[str, Activations] | None:
        """What products of quantised matrices multiply with, for "prefill" and "step"; None: with activations
        in `dtype`."""
        return None

    @property
    def all_logits(self) -> bool:
        """True if a prefill returns logits of every token."""
        return self.logits == "all"

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
        """reference.safetensors, unless the model was exported with `--cases none`."""
        return self.path / REFERENCE if self.cases is not None else None

    def reference(self) -> Reference:
        """The recorded cases, after their file's hash has been checked; tensors are read when asked for.

        Raises:
            BundleError: there are none, or the file is not what the manifest or the spec says.
        """
        path, wording = self.reference_path, self.wording
        if path is None:
            raise BundleError(f"the {wording.kind} {self.path} holds no recorded cases", hint=wording.record)
        self.opened.verify(REFERENCE)
        with self.opened.unchanged(REFERENCE) as root:
            reference = Reference(path, self.spec, root / REFERENCE, lambda: self.opened.check(REFERENCE))
        if list(reference.cases) != self.cases:
            raise BundleError(
                f"{REFERENCE} holds other cases than {wording.manifest} says",
                got=list(reference.cases), expected=self.cases, hint=wording.retry,
            )  # fmt: skip
        return reference

    def verify(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Check the hash of every file, also of those that opening leaves for later.

        Args:
            on_bytes: called with the size of each block that was read, for a progress bar.

        Raises:
            BundleError: a file is missing or differs.
        """
        self.verify_files(self.files, on_bytes)

    def verify_files(self, names: Iterable[str], on_bytes: Callable[[int], None] | None = None) -> None:
        """As `verify`, for some files."""
        for name in names:
            self.opened.verify(name, on_bytes)
            self._verified.add(name)
