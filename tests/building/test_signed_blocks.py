"""Graphs with signed weights for TensorRT for RTX: what ONNX Runtime computes with them, and every byte.

ONNX Runtime and `onnx` know DequantizeLinear and 4-bit integers by themselves. What the real builder makes of
such graphs is tests/building/test_rtx_builds.py's.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from support.makers.checkpoints import llama, neox

from dijiang_engines.building import signed_blocks
from dijiang_engines.building.signed_blocks import SignedWeights, copy_signed, write_signed
from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.onnx_external import ExternalTensor
from dijiang_engines.weight_formats import BLOCK, ZERO
from dijiang_export.graph.write import _register_schema

Export = Callable[..., tuple[Path, Any]]
SIZES = {"hidden": 64, "heads": 4, "intermediate": 96, "vocab": 97}
TIED = llama(kv_heads=2, **SIZES).with_config(tie_word_embeddings=True)
UNTIED = neox(**SIZES)
KINDS = {
    "tied-float32": (TIED, {"weight_format": "int4", "dtype": "float32", "cases": "none"}),
    "untied-float16": (UNTIED, {"weight_format": "int4", "dtype": "float16", "cases": "none"}),
    "tied-bfloat16": (TIED, {"weight_format": "int4", "dtype": "bfloat16", "cases": "none"}),
}
Array = npt.NDArray[Any]


def run(path: Path, length: int) -> list[Array]:
    """Two rows of `length` tokens from states that are not empty."""
    import onnxruntime as ort

    rng = np.random.default_rng(length)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs: dict[str, Array] = {
        "input_ids": rng.integers(0, 97, (2, length)), "positions": np.array([0, 3]),
        "seq_lens": np.array([length, 1]),
    }  # fmt: skip
    for tensor in session.get_inputs():
        if tensor.name not in inputs:
            inputs[tensor.name] = rng.normal(size=(2, *tensor.shape[1:])).astype(np.float32)
    results: list[Array] = session.run(None, inputs)
    return results


@pytest.mark.parametrize("kind", ["tied-float32", "untied-float16"])
def test_onnx_runtime_computes_the_same(kind: str, exported: Export, tmp_path: Path) -> None:
    """A step too: the bundle's own rounds activations, so it is compared with a prefill of one token."""
    model, options = KINDS[kind]
    bundle = open_bundle(exported(model, **options)[0])
    signed = write_signed(bundle, ["prefill", "step"], tmp_path)
    close = 1e-5 if bundle.dtype == "float32" else 2e-2
    for name, length in (("prefill", 5), ("step", 1)):
        for ours, theirs in zip(
            run(signed[name], length), run(bundle.graph_path("prefill"), length), strict=True
        ):
            assert np.abs(ours - theirs).max() <= close * np.abs(theirs).max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_element_and_nothing_but_standard_operators(
    kind: str, exported: Export, tmp_path: Path
) -> None:
    model, options = KINDS[kind]
    folder = exported(model, **options)[0]
    bundle = open_bundle(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = [name for name in bundle.graphs if name.startswith(("prefill", "step"))]
    _register_schema()
    parts = [part for parts in (bundle.quantised or {}).values() for part in parts]
    for name, path in write_signed(bundle, names, tmp_path).items():
        onnx.checker.check_model(str(path), full_check=True)
        found = onnx.load(path)
        stored = onnx.load(folder / path.name)
        assert {entry.version for entry in found.opset_import if entry.domain == ""} == {21}
        assert {node.domain for node in found.graph.node} == ({"", "dijiang"} if "trt" in name else {""})
        assert all(node.op_type != "DijiangLinear" for node in found.graph.node)
        signed, unsigned = ({t.name: t for t in m.graph.initializer} for m in (found, stored))
        products = {
            node.input[1] for node in stored.graph.node if node.op_type in ("MatMulNBits", "DijiangLinear")
        }
        assert {f"{name}.signed" for name in products} == {
            name for name in signed if name.endswith(".signed")
        }
        for part in parts:
            if part.stored_name not in products:
                continue
            u = np.frombuffer(unsigned[part.stored_name].raw_data, np.uint8)
            if part.format == "int4":
                u = np.stack((u & 15, u >> 4), -1)
            q = onnx.numpy_helper.to_array(signed[f"{part.stored_name}.signed"])
            expected = u.astype(np.int16) - ZERO[part.format]
            np.testing.assert_array_equal(np.asarray(q, np.int16).reshape(-1), expected.reshape(-1))
        (table,) = (t for t in found.graph.initializer if t.name.endswith(".words"))
        assert table.raw_data == unsigned["embed_tokens.weight.int8"].raw_data
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = (tmp_path / "weights.data").stat().st_size - len(before["weights.data"])
    tied = "lm_head.weight" not in {part.name for part in parts}
    assert extra == (97 * SIZES["hidden"] if tied else 0), "a table that is a head too is there twice"


def test_a_copy_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed_blocks, "PIECE", 7)
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    weights = SignedWeights(1000, {"table"})
    for name, offset, length, kind in (
        ("a", 64, 100, "int8"), ("table", 300, 33, "int8"), ("b", 200, 64, "int4"),
    ):  # fmt: skip
        weights.place(ExternalTensor(name, 2, (length,), "weights.data", offset, length), kind)
    target = io.BytesIO()
    copy_signed(io.BytesIO(data.tobytes()), target, weights)
    expected = np.concatenate((data, data[300:333] ^ 0x80))
    expected[64:164] ^= 0x80
    expected[200:264] ^= 0x88
    assert target.getvalue() == expected.tobytes() and weights.end == 1033


def test_weights_that_end_early() -> None:
    weights = SignedWeights(100)
    weights.place(ExternalTensor("a", 2, (BLOCK,), "weights.data", 80, BLOCK), "int8")
    with pytest.raises(BundleError, match="end before they should"):
        copy_signed(io.BytesIO(bytes(100)), io.BytesIO(), weights)
