"""The engine folder: TensorRT plans that were built from one bundle, for one TensorRT and one or more GPUs.

    engine.json                          what it is, what made it, the hash of every other file
    model.plan                           layout "one": profile 0 reads prompts, profile 1 makes steps
    prefill.plan  step.plan              layout "two"
    reference.safetensors                the bundle's recorded cases, so that `validate` runs on the device
    config.json, tokenizer files         the bundle's

A plan is code for TensorRT: it is only handed over after its hash and its TensorRT, GPU and plugin were
compared with what is here. Hashes find corruption, not tampering; take plans only from whom you would take a
program. docs/engines.md describes the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.file_table import (
    ENGINE_MANIFEST,
    REFERENCE,
    FileInfo,
    check_format,
    file_entries,
    file_table,
)
from dijiang_engines.formats.folder import Model, ModelIdentity, Wording, spec_sha256
from dijiang_engines.formats.opened_files import OpenedFiles
from dijiang_engines.formats.quantised.manifest import KEY, read_quantisation
from dijiang_engines.formats.safe_files import LIMITS, parse_json, read_bounded
from dijiang_engines.op_contract import T_TYPES
from dijiang_engines.spec import ModelSpec

FORMAT = "dijiang-engine"
FORMAT_VERSION = 1
LAYOUTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"one": ("model.plan",), "two": ("prefill.plan", "step.plan")}
)
RUNTIMES = ("tensorrt", "tensorrt-rtx")
"""What may have built an engine; a manifest that does not say so is of the first."""
MOST_CAPABILITIES = 100
REBUILD = "build it again with `dijiang-export build-engine BUNDLE -o ENGINE --force`"


@dataclass(frozen=True)
class Profiles:
    """The sizes that an engine was built for."""

    max_batch: int
    max_length: int
    """Tokens of each row that one prefill call may take."""
    opt_batch: int = 1
    opt_length: int = 512
    """What the builder optimised for; everything up to the largest works."""

    def to_json(self) -> dict[str, int]:
        """As engine.json has it."""
        return asdict(self)


@dataclass(frozen=True)
class PlanPlace:
    """Where one of the two jobs, prefill or step, is found."""

    file: str
    profile: int
    """Index of the optimization profile in that plan."""


@dataclass(frozen=True)
class MadeFor:
    """What a plan can be loaded with: all of these must be the same."""

    runtime: str
    """One of RUNTIMES."""
    tensorrt: str
    """Version of its library, such as "8.6.0"."""
    gpu: str | None
    """The GPU's name; None: any of `compute_capabilities`, for it was built without one."""
    compute_capabilities: tuple[int, ...]
    """Each 10 * major + minor; one, unless the plan was built without a GPU."""
    plugin_sources: str | None
    """`plugin.cache.source_hash` of the plugin that it was built with; None: of standard operators alone."""
    plugin_version: str | None

    @property
    def graphs(self) -> str:
        """ "plugin" or "standard": which of the bundle's graphs the plans were made from."""
        return "standard" if self.plugin_sources is None else "plugin"

    def to_json(self) -> dict[str, Any]:
        """As engine.json has it."""
        values = asdict(self) | {"compute_capabilities": list(self.compute_capabilities)}
        single = {} if self.gpu is None else {"compute_capability": self.compute_capabilities[0]}
        return values | single | {"graphs": self.graphs}


class EngineFolder(Model):
    """An opened engine folder. Make one with `open_engine`.

    spec, dtype, logits, cases, identity and quantisation are those of the bundle that it was built from; but
    its products multiply with activations in dtype, whatever the bundle's do.

    Attributes:
        layout: "one" or "two".
        prefill, step: where these are.
        profiles: the sizes that it was built for.
        made_for: what it can be loaded with; and those of `Model`.
    """

    wording = Wording(
        kind="engine",
        manifest=ENGINE_MANIFEST,
        retry=REBUILD,
        record="export the checkpoint with `--cases short` or `--cases full`, and build again",
    )

    def __init__(self, path: Path, raw: Any, opened: OpenedFiles) -> None:
        manifest = _object(raw, ENGINE_MANIFEST)
        _check_header(manifest)
        spec = ModelSpec.from_json(manifest.get("spec", {}))
        self.layout: str = manifest["layout"]
        self.prefill = PlanPlace(self.plans[0], 0)
        self.step = PlanPlace(self.plans[-1], 1 if self.layout == "one" else 0)
        files = file_table(manifest, self.plans, source=ENGINE_MANIFEST, hint=REBUILD)
        self.profiles = _profiles(manifest.get("profiles"))
        self.made_for = _made_for(manifest.get("made_for"))
        source = _object(manifest.get("source"), "source")
        identity = ModelIdentity(
            _text(source, "source", "spec_sha256"), _text(source, "source", "weights_sha256")
        )
        if identity.spec_sha256 != spec_sha256(spec):
            raise _bad("source.spec_sha256", "the hash of the model spec beside it")
        self._name = _text(source, "source", "name")
        reference = manifest.get("reference")
        cases = None if reference is None else _case_names(reference, files)
        stored, quantisation = manifest.get(KEY), None
        if stored is not None:
            quantisation = read_quantisation(stored, spec, ENGINE_MANIFEST, REBUILD)
        super().__init__(
            path, opened, manifest, spec=spec, files=files, cases=cases, identity=identity,
            quantisation=quantisation,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Of the bundle that it was built from."""
        return self._name

    @property
    def plans(self) -> tuple[str, ...]:
        """The plan files."""
        return LAYOUTS[self.layout]

    def verified_plan(self, name: str) -> Path:
        """The path of a plan whose hash is right: checked now, unless opening the engine did that.

        Whoever loads it does so inside `opened.unchanged(name)`.

        Raises:
            BundleError: it is missing or differs.
        """
        if name not in self._verified:
            self.verify_files((name,))
        return self.path / name

    def check_files(self, verify: bool) -> None:
        """Check that every file is there with the right size; hash all but the cases, plans if `verify`."""
        for name in self.files:
            self.opened.note(name)
        self.verify_files(
            name for name in self.files if name != REFERENCE and (verify or not name.endswith(".plan"))
        )


def open_engine(path: str | Path, *, verify: bool = True) -> EngineFolder:
    """Open an engine folder and check it; loads nothing into TensorRT.

    Args:
        path: the folder.
        verify: hash the plans too, which takes about a second per gigabyte.

    Raises:
        BundleError: there is no engine, or it is incomplete, corrupt or of another version.
    """
    folder = Path(path)
    if not folder.is_dir() or not (folder / ENGINE_MANIFEST).exists():
        raise BundleError(
            f"there is no engine at {folder}",
            expected=f"a folder with {ENGINE_MANIFEST}",
            hint="make one with `dijiang-export build-engine BUNDLE -o ENGINE`",
        )
    opened = OpenedFiles(folder, "engine", f"copy the engine again, or {REBUILD}")
    with opened.named():
        raw = parse_json(read_bounded(opened.root / ENGINE_MANIFEST, LIMITS["manifest"]), ENGINE_MANIFEST)
        engine = EngineFolder(folder, raw, opened)
    engine.check_files(verify)
    return engine


def write_engine_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Hash every file in `folder` and write engine.json beside them.

    Args:
        folder: holds the plans and the copied files.
        facts: every key of engine.json but format, format_version and files.
    """
    data = {"format": FORMAT, "format_version": FORMAT_VERSION, **facts, "files": file_entries(folder)}
    (folder / ENGINE_MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


# -- checking engine.json ------------------------------------------------------------------------------


def _check_header(raw: dict[str, Any]) -> None:
    check_format(raw, "engine", FORMAT, (FORMAT_VERSION,), source=ENGINE_MANIFEST, again=REBUILD)
    for key, allowed in (("dtype", T_TYPES), ("logits", ("last", "all")), ("layout", tuple(LAYOUTS))):
        if raw.get(key) not in allowed:
            raise _bad(key, " | ".join(allowed))


def _profiles(raw: Any) -> Profiles:
    values = _object(raw, "profiles")
    names = ("max_batch", "max_length", "opt_batch", "opt_length")
    for name in names:
        value = values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise _bad(f"profiles.{name}", "a positive number")
    return Profiles(**{name: values[name] for name in names})


def _made_for(raw: Any) -> MadeFor:
    values = _object(raw, "made_for")
    runtime = values.get("runtime", RUNTIMES[0])
    if runtime not in RUNTIMES:
        raise _bad("made_for.runtime", " | ".join(RUNTIMES))
    with_plugin = values.get("graphs", "plugin")
    if with_plugin not in ("plugin", "standard"):
        raise _bad("made_for.graphs", "plugin | standard")

    def plugin_text(key: str) -> str | None:
        return _text(values, "made_for", key) if with_plugin == "plugin" else None

    return MadeFor(
        runtime,
        _text(values, "made_for", "tensorrt"),
        None if runtime != RUNTIMES[0] else _text(values, "made_for", "gpu"),
        _capabilities(values, runtime),
        plugin_text("plugin_sources"),
        plugin_text("plugin_version"),
    )


def _capabilities(values: dict[str, Any], runtime: str) -> tuple[int, ...]:
    """Of one GPU by name, or of all that a plan without one is for."""
    key, numbers = "compute_capabilities", values.get("compute_capabilities")
    if runtime == RUNTIMES[0]:
        key, numbers = "compute_capability", [values.get("compute_capability")]
    if not isinstance(numbers, list) or not 0 < len(numbers) <= MOST_CAPABILITIES:
        raise _bad(f"made_for.{key}", "numbers such as 86")
    if any(type(number) is not int or not 0 < number < 1000 for number in numbers):
        raise _bad(f"made_for.{key}", "numbers such as 86")
    return tuple(numbers)


def _case_names(reference: Any, files: Mapping[str, FileInfo]) -> list[str]:
    cases = _object(reference, "reference").get("cases")
    if not isinstance(cases, list) or REFERENCE not in files:
        raise _bad("reference", f"null, or a list of cases and the file {REFERENCE}")
    return [str(case) for case in cases]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(where, "an object")
    return value


def _text(values: dict[str, Any], where: str, key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not 0 < len(value) < 1000:
        raise _bad(f"{where}.{key}", "a text")
    return value


def _bad(where: str, expected: str) -> BundleError:
    return BundleError(
        f"{ENGINE_MANIFEST} has a bad or missing value for {where}", expected=expected, hint=REBUILD
    )
