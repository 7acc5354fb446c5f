"""Engine folders for tests: made by hand around any bytes, or built on a fake machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import FakeMachine
from toy_bundle import SPEC

from dijiang_engines.build import BuildResult, build_engine
from dijiang_engines.bundle import Bundle, open_bundle
from dijiang_engines.engine_folder import LAYOUTS, spec_sha256, write_engine_manifest
from dijiang_engines.recipes import load_recipe


def facts(layout: str = "one", **changes: Any) -> dict[str, Any]:
    """What engine.json says besides the files."""
    return {
        "source": {"name": "toy", "spec_sha256": spec_sha256(SPEC), "weights_sha256": "0" * 64},
        "spec": SPEC.to_json(),
        "dtype": "float32",
        "logits": "last",
        "layout": layout,
        "profiles": {"max_batch": 4, "max_length": 64, "opt_batch": 1, "opt_length": 16},
        "made_for": {
            "tensorrt": "8.6.0", "gpu": "NVIDIA Test", "compute_capability": 90, "plugin_sources": "a" * 64,
            "plugin_version": "0.1.0",
        },
        "reference": None,
        "validated": None,
    } | changes  # fmt: skip


def write_engine(folder: Path, layout: str = "one", **changes: Any) -> Path:
    """A folder that is right in everything but what its plans hold."""
    folder.mkdir()
    for index, name in enumerate(LAYOUTS[layout]):
        (folder / name).write_bytes(bytes([index]) * 1000)
    (folder / "config.json").write_text("{}")
    write_engine_manifest(folder, facts(layout, **changes))
    return folder


def edit_manifest(folder: Path, change: Any, value: Any = None) -> None:
    """Change engine.json: by a function of it, or at a path such as "files.model.plan" parts in a tuple."""
    path = folder / "engine.json"
    manifest = json.loads(path.read_text())
    if callable(change):
        change(manifest)
    else:
        inner = manifest
        for key in change[:-1]:
            inner = inner[key]
        inner[change[-1]] = value
    path.write_text(json.dumps(manifest))


def build(
    machine: FakeMachine,
    bundle: Path | Bundle,
    output: Path,
    *,
    recipe: dict[str, Any] | None = None,
    **options: Any,
) -> BuildResult:
    """`build_engine` on a fake machine; afterwards this process is where it was."""
    with pytest.MonkeyPatch.context() as patch:
        machine.enter(patch)
        chosen = load_recipe("datacenter").with_changes(**(recipe or {}))
        source = open_bundle(bundle) if isinstance(bundle, Path) else bundle
        return build_engine(source, output, chosen, **options)
