"""Engine folders for tests: made by hand around any bytes, or built on a fake machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import cuda as fake_cuda
from support.fakes import tensorrt as fake_tensorrt
from support.fakes.tensorrt import FakeMachine
from support.makers.toy_bundle import SPEC
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines import io_names
from dijiang_engines.building.build import BuildResult, build_engine
from dijiang_engines.building.recipes import load_recipe
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.formats.engine import LAYOUTS, write_engine_manifest
from dijiang_engines.formats.folder import spec_sha256
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner

SMALL = {"max_batch": 6, "max_length": 8}

Exported = Callable[..., tuple[Path, NumpyRunner]]
Made = Callable[..., tuple[Path, NumpyRunner, FakeMachine]]
Open = Callable[..., tuple[TensorRTRunner, NumpyRunner]]


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


def visible(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too, but not the machine's own."""
    return sorted(path.name for path in folder.iterdir() if path.name != "machine")


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, length))


def spoil(monkeypatch: pytest.MonkeyPatch, *, layer: int, row: int, after: int) -> None:
    """From the call after `after` on, one layer makes a NaN in its state and so in the logits."""
    original, calls = fake_tensorrt._run, []

    def run(facts: Any, integers: str, shapes: Any, addresses: dict[str, int]) -> None:
        original(facts, integers, shapes, addresses)
        calls.append(1)
        if len(calls) > after and shapes[io_names.SEQ_LENS][0] > row:
            bad = np.full(256, np.nan, np.float32)
            size = int(np.prod(shapes[io_names.past_state(layer)][1:]))
            fake_cuda.DEVICE.write(addresses[io_names.present_state(layer)] + 4 * row * size, bad)
            fake_cuda.DEVICE.write(addresses[io_names.LOGITS] + 4 * row * 256, bad)

    monkeypatch.setattr(fake_tensorrt, "_run", run)
