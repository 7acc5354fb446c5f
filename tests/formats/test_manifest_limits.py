"""Manifests of strangers: any value may be anything, and whatever is too much is refused at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.makers.engine_folders import write_engine
from support.makers.record_mutants import mutants
from support.makers.toy_bundle import SPEC, make_bundle, write_manifest

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.formats.manifest import graph_io, read_manifest
from dijiang_engines.inspection import inspect_bundle
from dijiang_engines.sizes import weight_bytes
from dijiang_engines.spec import ModelSpec

HUGE = 2**31 - 1


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "toy.bundle")
    return tmp_path / "toy.bundle"


def write(folder: Path, manifest: Any, name: str = "manifest.json") -> None:
    (folder / name).write_text(json.dumps(manifest))


def test_any_value_of_a_bundle_s_manifest_may_be_anything(toy: Path) -> None:
    whole = write_manifest(toy, SPEC)
    refused = 0
    for _, _, document in mutants(whole):
        write(toy, document)
        try:
            manifest = read_manifest(toy)
        except BundleError as error:
            refused += 1
            assert "\x1b" not in str(error) and len(str(error)) < 9000  # noqa: PT017
            continue
        assert manifest.spec.state_bytes > 0
    assert refused > 700


def test_any_value_of_an_engine_s_manifest_may_be_anything(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "toy.engine")
    whole = json.loads((folder / "engine.json").read_text())
    refused = 0
    for _, _, document in mutants(whole):
        write(folder, document, "engine.json")
        try:
            engine = open_engine(folder, verify=False)
        except BundleError as error:
            refused += 1
            assert "\x1b" not in str(error) and len(str(error)) < 9000  # noqa: PT017
            continue
        assert engine.spec.state_bytes > 0
    assert refused > 700


def spec_of(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """The manifest with other values in its spec, and the graphs' inputs and outputs that follow from it."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["spec"] |= changes

    return change


def with_io(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["spec"] |= changes
        layers = min(manifest["spec"]["num_layers"], 20_000)
        for name, graph in manifest["graphs"].items():
            spec = ModelSpec(**{**manifest["spec"], "num_layers": layers})
            inputs, outputs = graph_io(spec, step=name == "step", all_logits=False)
            graph["inputs"] = [t.to_json() for t in inputs]
            graph["outputs"] = [t.to_json() for t in outputs]

    return change


def shape_of(shape: list[Any]) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["step"]["inputs"][3]["shape"] = shape

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a million layers": spec_of(num_layers=10**6),
    "20,000 layers, consistent": with_io(num_layers=20_000),
    "layers without weights": with_io(num_layers=4000),
    "a large vocabulary": with_io(vocab_size=HUGE),
    "large heads": with_io(head_dim=HUGE),
    "many heads": with_io(num_heads=HUGE, num_kv_heads=HUGE),
    "a wide model": spec_of(hidden_size=HUGE, intermediate_size=HUGE),
    "long tables": spec_of(decay="tables", decay_rows=HUGE),
    "many positions": spec_of(position_embeddings=HUGE),
    "100,000 dimensions": shape_of([2**62] * 100_000),
    "100,000 named dimensions": shape_of(["batch"] * 100_000),
    "a long name": lambda m: m["graphs"]["step"]["inputs"][0].update(name="x" * 10**6),
    "a name of a dimension": shape_of(["x" * 10**6]),
    "100,000 inputs": lambda m: m["graphs"]["step"].update(inputs=m["graphs"]["step"]["inputs"] * 20_000),
    "many graphs": lambda m: m["graphs"].update({f"g{i}": m["graphs"]["step"] for i in range(1000)}),
    "many files": lambda m: m["files"].update({f"f{i}": m["files"]["config.json"] for i in range(1000)}),
    "many cases": lambda m: m.update(reference={"file": "reference.safetensors", "cases": ["x"] * 10**5}),
    "cases that are no names": lambda m: m.update(reference={"file": "reference.safetensors", "cases": [[]]}),
    "many end tokens": spec_of(eos_token_ids=[1] * 10**6),
    "many settings": spec_of(rope_scaling={str(i): i for i in range(10**5)}),
    "settings of lists": spec_of(rope_scaling={"a": [[1]]}),
    "settings of settings": spec_of(rope_scaling={"a": {"b": 1}}),
    "a long setting": spec_of(rope_scaling={"a": "x" * 10**6}),
    "a family of a million letters": spec_of(family="x" * 10**6),
    "heads that do not divide": spec_of(num_kv_heads=3),
    "more turned than there is": spec_of(rotary_dim=6),
    "tables without rows": spec_of(decay="tables"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_too_much_is_refused_at_once(kind: str, toy: Path) -> None:
    manifest = write_manifest(toy, SPEC)
    HOSTILE[kind](manifest)
    write(toy, manifest)
    start = time.process_time()
    with pytest.raises(BundleError) as info:
        open_bundle(toy)
    assert time.process_time() - start < 3
    assert len(str(info.value)) < 9000


TEXTS = {
    "deep": b'{"format": ' + b"[" * 100_000,
    "deep objects": b'{"a": ' * 100_000,
    "33 levels": b'{"format": ' + b"[" * 33 + b"]" * 33 + b"}",
    "400 digits": b'{"format": 1' + b"0" * 400 + b"}",
    "a million digits": b'{"format": 1' + b"0" * 10**6 + b"}",
    "too large a float": b'{"format": 1e999}',
    "infinity": b'{"format": Infinity}',
    "NaN": b'{"format": NaN}',
    "millions of values": b'{"format": [' + b"0," * 4_000_000 + b"0]}",
    "millions of lists": b'{"format": [' + b"[]," * 4_000_000 + b"0]}",
    "a key twice": b'{"format": 1, "format": 1}',
    "17 MiB": b" " * (17 << 20),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["manifest.json", "engine.json"])
def test_hostile_json_is_refused_at_once(kind: str, name: str, toy: Path) -> None:
    (toy / name).write_bytes(TEXTS[kind])
    start = time.process_time()
    with pytest.raises(BundleError) as info:
        (open_bundle if name == "manifest.json" else open_engine)(toy)
    assert time.process_time() - start < 3
    assert len(str(info.value)) < 9000


@pytest.mark.parametrize(
    "name", ["manifest.json", "step.onnx", "weights.data", "config.json", "tokenizer.json"]
)
def test_a_pipe_in_a_bundle_is_not_waited_for(name: str, toy: Path) -> None:
    (toy / name).unlink()
    os.mkfifo(toy / name)
    with pytest.raises(BundleError, match="is not an ordinary file"):
        open_bundle(toy)


def test_a_pipe_in_an_engine_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "toy.engine")
    for name in ("model.plan", "engine.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(BundleError, match="is not an ordinary file"):
            open_engine(folder, verify=False)


def test_weights_that_are_just_enough(toy: Path) -> None:
    manifest = write_manifest(toy, SPEC)
    room = manifest["files"]["weights.data"]["bytes"]
    needed = weight_bytes(SPEC, "float32")
    assert needed <= room
    width = SPEC.intermediate_size
    each = (weight_bytes(ModelSpec.from_json(SPEC.to_json() | {"intermediate_size": width + 1}), "float32")
            - needed)  # fmt: skip
    most = width + (room - needed) // each
    inspect_bundle(open_bundle(toy))
    for size, good in ((most, True), (most + 1, False)):
        manifest["spec"]["intermediate_size"] = size
        write(toy, manifest)
        if good:
            read_manifest(toy)
        else:
            with pytest.raises(BundleError, match="more parameters than"):
                read_manifest(toy)
