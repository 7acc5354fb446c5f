"""Bundles with float weights are, byte for byte, what they were before there were quantised ones.

The digests of tests/data/float-bundles.json were made with the code of commit 80f58e2, the last one without
quantised weights, and those of ONNX Runtime GenAI's two files when they came, by this file:
`PYTHONPATH=tests:OLD/exporter:OLD/engines python tests/export/test_float_bundles.py >
tests/data/float-bundles.json`. A change of them is a change of what every user's export gives: make them anew
only where that is meant, and say so in the changelog.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.checkpoints import RandomCheckpoint, llama, neox
from support.makers.weight_files import load_tensors, save_tensors
from support.paths import ROOT

RECORD = ROOT / "tests/data/float-bundles.json"
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")
"""They name nodes and order fields; constraints.txt pins them."""
SMALL: dict[str, Any] = {"layers": 1, "vocab": 97}
MODELS: dict[str, tuple[RandomCheckpoint, dict[str, Any]]] = {
    "gpt-neox float32, all graphs": (neox(**SMALL), {"dtype": "float32", "variants": ("ort", "capture")}),
    "llama float16, tied": (
        llama(kv_heads=2, **SMALL).with_config(tie_word_embeddings=True), {"dtype": "float16"}
    ),
}  # fmt: skip
COMPUTED = ("log_decay", "inv_freq", "attention.proj")
"""Tensors that are results of logarithms or powers, whose last bit may be another on another processor."""


def even(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Weights that no random generator and no processor has a say in: multiples of 1/256."""
    if name.endswith((".D1", ".D2")):
        return tensor
    start = len(name)
    values = (torch.arange(tensor.numel()) * 37 + start) % 251 - 125
    return (values / 256).reshape(tensor.shape).to(tensor.dtype)


def digests(model: RandomCheckpoint, options: dict[str, Any], folder: Path) -> dict[str, str]:
    """SHA-256 of each graph as it lies there, of genai_config.json, and of weights.data without what is
    `COMPUTED`."""
    import onnx

    from dijiang_export.export.to_onnx import export_bundle

    checkpoint = model.save(folder / "checkpoint")
    save_tensors(checkpoint, {n: even(n, t) for n, t in load_tensors(checkpoint).items()}, "safetensors")
    export_bundle(checkpoint, folder / "bundle", cases="none", **options)
    data = bytearray((folder / "bundle/weights.data").read_bytes())
    for tensor in onnx.load(folder / "bundle/prefill.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and tensor.name.endswith(COMPUTED):
            start, length = int(place["offset"]), int(place["length"])
            data[start : start + length] = bytes(length)
    files = [*sorted((folder / "bundle").glob("*.onnx")), folder / "bundle/genai_config.json"]
    found = {path.name: path.read_bytes() for path in files}
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in (found | {"weights.data": bytes(data)}).items()
    }


def installed() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def test_float_bundles_are_what_they_were(tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    if record["packages"] != installed():
        pytest.skip(f"the record was made with {record['packages']}; here are {installed()}")
    found = {
        name: digests(model, options, tmp_path / str(index))
        for index, (name, (model, options)) in enumerate(MODELS.items())
    }
    assert found == record["digests"]


def record(show: Callable[[str], None]) -> None:
    """Print the digests that the code which is imported gives."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: digests(model, options, Path(folder) / str(index))
            for index, (name, (model, options)) in enumerate(MODELS.items())
        }
    show(json.dumps({"packages": installed(), "digests": found}, indent=1))


if __name__ == "__main__":
    record(lambda text: print(text, file=sys.stdout))
