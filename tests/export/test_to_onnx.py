"""`export_bundle`: what a bundle holds, that it is whole or absent, and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.makers.checkpoints import neox
from support.makers.weight_files import load_tensors, save_tensors

from dijiang_engines.errors import CheckpointError, DijiangError, OutputError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dijiang_export.export.to_onnx import export_bundle
from dijiang_export.graph import opset, weights, write

GRAPH_FILES = ("prefill.onnx", "step.onnx", "prefill.trt.onnx", "step.trt.onnx")


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return neox(vocab=300).with_tokenizer().save(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def bundle_folder(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tiny.bundle"
    export_bundle(checkpoint_folder, folder)
    return folder


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_bundle_holds_what_its_manifest_says(bundle_folder: Path, checkpoint_folder: Path) -> None:
    bundle = open_bundle(bundle_folder)
    manifest = json.loads((bundle_folder / "manifest.json").read_text())
    files = manifest["files"] | manifest["genai"]
    assert set(files) == {p.name for p in bundle_folder.iterdir()} - {"manifest.json"} == set(bundle.files)
    for name, entry in files.items():
        data = (bundle_folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    source = manifest["source"]
    assert source["name"] == "tiny"
    stored = (checkpoint_folder / "model.safetensors").read_bytes()
    assert source["files"]["model.safetensors"]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert manifest["created_by"]["torch"] == importlib.metadata.version("torch")
    assert (manifest["opset"], manifest["ir_version"]) == (17, 8)
    with open_checkpoint(checkpoint_folder) as checkpoint:
        assert bundle.spec == checkpoint.spec
    assert (bundle_folder / "tokenizer.json").read_bytes() == (
        checkpoint_folder / "tokenizer.json"
    ).read_bytes()
    assert {oct(p.stat().st_mode & 0o444) for p in bundle_folder.iterdir()} == {"0o444"}


def test_all_graphs_share_one_file_of_weights(bundle_folder: Path, checkpoint_folder: Path) -> None:
    with open_checkpoint(checkpoint_folder) as checkpoint:
        expected = checkpoint.load_state_dict(torch.float32)
    places: dict[str, set[tuple[str, ...]]] = {}
    for name in GRAPH_FILES:
        model = onnx.load(bundle_folder / name)
        assert model.ir_version == opset.IR_VERSION
        for initializer in model.graph.initializer:
            if initializer.name not in expected:
                assert initializer.name == "inv_freq" or initializer.name.startswith("constant.")
                continue
            array = onnx.numpy_helper.to_array(initializer, base_dir=str(bundle_folder))
            tensor = expected[initializer.name].numpy()
            if initializer.doc_string:
                assert "transposed" in initializer.doc_string
                tensor = tensor.T
            assert np.array_equal(array, tensor), initializer.name
        raw = onnx.load(bundle_folder / name, load_external_data=False)
        for initializer in raw.graph.initializer:
            if initializer.name in expected:
                place = {e.key: e.value for e in initializer.external_data}
                assert place["location"] == weights.FILE_NAME
                places.setdefault(initializer.name, set()).add(tuple(sorted(place.items())))
    assert set(places) == set(expected)
    assert all(len(found) == 1 for found in places.values())


def test_large_linear_weights_are_written_in_blocks(
    checkpoint_folder: Path, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    export_bundle(checkpoint_folder, tmp_path / "blocks.bundle", cases="none")
    written = (tmp_path / "blocks.bundle" / weights.FILE_NAME).read_bytes()
    assert written == (bundle_folder / weights.FILE_NAME).read_bytes()
    manifest = json.loads((tmp_path / "blocks.bundle" / "manifest.json").read_text())
    assert manifest["reference"] is None


def test_logits_of_all_tokens(checkpoint_folder: Path, tmp_path: Path) -> None:
    export_bundle(checkpoint_folder, tmp_path / "all.bundle", logits="all", cases="none")
    for name, length in (("prefill.onnx", "sequence"), ("step.trt.onnx", 1)):
        output = onnx.load(tmp_path / "all.bundle" / name, load_external_data=False).graph.output[0]
        dims = [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim]
        assert dims == ["batch", length, 300]


def test_an_existing_folder_is_replaced_only_with_force(bundle_folder: Path, checkpoint_folder: Path) -> None:
    before = (bundle_folder / "manifest.json").stat().st_ino
    with pytest.raises(OutputError, match="exists") as caught:
        export_bundle(checkpoint_folder, bundle_folder)
    assert "--force" in str(caught.value)
    assert (bundle_folder / "manifest.json").stat().st_ino == before
    export_bundle(checkpoint_folder, bundle_folder, force=True)
    assert (bundle_folder / "manifest.json").stat().st_ino != before
    assert leftovers(bundle_folder.parent) == [bundle_folder.name]


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("logits", "none"), ("cases", "many")])
def test_unknown_choices(checkpoint_folder: Path, tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(UsageError, match=value):
        export_bundle(checkpoint_folder, tmp_path / "x.bundle", **{option: value})
    assert leftovers(tmp_path) == []


def spoil(folder: Path, name: str, value: float) -> None:
    tensors = load_tensors(folder)
    tensors[name].view(-1)[-1] = value
    save_tensors(folder, tensors)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "float32", "NaN|nan|finite"),
        (float("inf"), "float32", "inf|finite"),
        (1e6, "float16", "float16"),
    ],
)
def test_weights_that_cannot_be_exported_leave_nothing(
    tmp_path: Path, value: float, dtype: str, message: str
) -> None:
    folder = neox().save(tmp_path / "model")
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    spoil(folder, name, value)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        export_bundle(folder, tmp_path / "out" / "x.bundle", dtype=dtype)
    assert "mlp" in str(caught.value)
    assert leftovers(tmp_path / "out") == []


def test_a_vanilla_checkpoint_is_pointed_to_convert(tmp_path: Path) -> None:
    folder = neox().vanilla().save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="vanilla") as caught:
        export_bundle(folder, tmp_path / "x.bundle")
    assert "dijiang-export convert" in str(caught.value)


LIMITED = """
import resource, sys
from dijiang_engines.errors import DijiangError
from dijiang_export.export.to_onnx import export_bundle
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails like a full disk
try:
    export_bundle(sys.argv[1], sys.argv[2])
except DijiangError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_leaves_nothing(checkpoint_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(checkpoint_folder), str(tmp_path / "x.bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OutputError" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path) == []


SLOW = """
import os, sys, time
from dijiang_export.export import to_onnx
def forever(*_, **__):
    os.write(1, b"writing\\n")  # sys.stdout is tracing's meanwhile
    time.sleep(60)
to_onnx.weights.write = forever
to_onnx.export_bundle(sys.argv[1], sys.argv[2])
"""


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    checkpoint_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "x.bundle"
    command = [sys.executable, "-c", SLOW, str(checkpoint_folder), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert not target.exists()
        assert len(leftovers(tmp_path)) == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.05)
    assert not target.exists()
    export_bundle(checkpoint_folder, target, cases="none")
    assert leftovers(tmp_path) == ["x.bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_stops_writing_and_leaves_nothing(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    started = threading.Event()
    blocks = Checkpoint.row_blocks

    def slow(self: Checkpoint, *arguments: object) -> Iterator[object]:
        started.set()
        time.sleep(0.02)
        yield from blocks(self, *arguments)  # type: ignore[arg-type]

    def interrupted(*_: object, **__: object) -> None:
        assert started.wait(10)
        raise error

    monkeypatch.setattr(Checkpoint, "row_blocks", slow)
    monkeypatch.setattr(write, "make_graphs", interrupted)
    with pytest.raises(error):
        export_bundle(checkpoint_folder, tmp_path / "x.bundle")
    assert leftovers(tmp_path) == []
    assert threading.active_count() == 1 + sum(t.daemon for t in threading.enumerate())


def test_a_flush_that_fails_is_an_error(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "FLUSH_BYTES", 0)
    monkeypatch.setattr(weights.os, "fdatasync", full)
    with pytest.raises(OutputError, match="no space"):
        export_bundle(checkpoint_folder, tmp_path / "x.bundle", cases="none")
    assert leftovers(tmp_path) == []


def test_read_only_parents(checkpoint_folder: Path) -> None:
    with pytest.raises(DijiangError, match="cannot write"):
        export_bundle(checkpoint_folder, "/proc/x.bundle")
