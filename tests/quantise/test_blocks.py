"""Rounding of blocks: against the definition in NumPy, ONNX Runtime's own quantiser, and onnx's evaluator."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dijiang_engines.errors import CheckpointError
from dijiang_export.quantise.blocks import dequantise, pack, quantise, unpack

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "int4")


def by_definition(row: npt.NDArray[np.float32], kind: Format) -> npt.NDArray[np.float64]:
    """What a row of blocks becomes, one element after another, in float64 with the scale as it is stored."""
    out = np.zeros(len(row))
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        if kind == "int8":
            scale = np.float16(np.abs(block).max() / np.float32(127))
            low, high = -127, 127
        else:
            largest = max(block.tolist(), key=lambda x: (abs(x), x < 0))
            scale = np.float16(np.float32(largest) / np.float32(-8))
            low, high = -8, 7
        for i, value in enumerate(block):
            q = np.rint(value / np.float32(scale)) if scale else np.float32(0)
            out[start + i] = float(np.clip(q, low, high)) * float(scale)
    return out


@pytest.mark.parametrize("kind", FORMATS)
def test_is_what_is_defined(kind: Format) -> None:
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal((7, 96)) * 10.0 ** rng.integers(-3, 3, (7, 1))).astype(np.float32)
    weights[0, :32] = 0
    weights[1, 32:64] = 0.37  # constant
    weights[2, :32] = -2.5
    weights[3, 5], weights[3, 9] = 9.0, -9.0  # the largest magnitude with both signs
    q, scale = quantise(torch.from_numpy(weights), kind, "w")
    expected = np.stack([by_definition(row, kind) for row in weights])
    np.testing.assert_array_equal(dequantise(q, scale).double().numpy(), expected)
    assert scale.dtype == torch.float16 and q.dtype == torch.int8


@pytest.mark.parametrize("kind", FORMATS)
def test_error_is_at_most_half_a_step_and_extremes_are_kept(kind: Format) -> None:
    weights = torch.from_numpy(np.random.default_rng(2).standard_normal((64, 320)).astype(np.float32))
    q, scale = quantise(weights, kind, "w")
    error = (dequantise(q, scale) - weights).abs().reshape(64, -1, 32)
    step = scale.float().abs().unsqueeze(-1)
    cut = 1.0 if kind == "int4" else 0.5  # +8 becomes +7
    assert bool((error <= step * (cut + 0.07)).all())
    limit = {"int8": 127, "int4": 8}[kind]
    assert bool((q.abs().reshape(64, -1, 32).amax(-1) == limit).all())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [1e-9, 3e-8, 1e-7, 2e-6, 1e-4])
def test_weights_near_the_end_of_float16_are_not_cut_off(kind: Format, size: float) -> None:
    block = torch.linspace(-1, 1, 32).reshape(1, 32) * size
    q, scale = quantise(block, kind, "w")
    step = max(float(scale.abs()), 6e-8)
    assert float((dequantise(q, scale) - block).abs().max()) <= 1.1 * step


@pytest.mark.parametrize("kind", FORMATS)
def test_packing_is_undone(kind: Format) -> None:
    q, _ = quantise(torch.from_numpy(np.random.default_rng(3).standard_normal((5, 64))), kind, "w")
    stored = pack(q, kind)
    assert stored.shape == (5, 2, 32 if kind == "int8" else 16) and stored.dtype == torch.uint8
    assert torch.equal(unpack(stored, kind), q)
    if kind == "int4":
        assert int(stored[0, 0, 0]) & 15 == int(q[0, 0]) + 8 and int(stored[0, 0, 0]) >> 4 == int(q[0, 1]) + 8


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_refused(kind: Format, value: float) -> None:
    weights = torch.ones(3, 64)
    weights[1, 40] = value
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up\.weight holds NaN or infinity"):
        quantise(weights, kind, "layers.0.mlp.up.weight")


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_too_large_for_a_scale_is_refused(kind: Format) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be quantised to {kind}"):
        quantise(torch.full((1, 32), 1e8), kind, "w")


def test_int4_is_what_onnxruntime_makes() -> None:
    """Its MatMulNBits quantiser, symmetric. Scales fit float16; halves, which it rounds up, do not occur."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    rng = np.random.default_rng(4)
    weights = ((rng.integers(-1000, 1000, (24, 128)) + 0.5) / 1024).astype(np.float32)
    blocks = weights.reshape(24, -1, 32)
    blocks[..., 0] = np.where(rng.random(blocks.shape[:2]) < 0.5, 1, -1) * 2.0 ** rng.integers(
        0, 3, blocks.shape[:2]
    )
    initial = numpy_helper.from_array(np.ascontiguousarray(weights.T), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", k]) for n, k in (("x", 128), ("y", 24)))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [initial])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = quantizer.MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, bits=4)
    made.process()
    tensors = {t.name: numpy_helper.to_array(t) for t in made.model.model.graph.initializer}
    (stored,) = (t for t in tensors.values() if t.dtype == np.uint8)
    (scale,) = (t for t in tensors.values() if t.dtype == np.float32)
    q, ours = quantise(torch.from_numpy(weights), "int4", "w")
    np.testing.assert_array_equal(pack(q, "int4").numpy(), stored.reshape(24, 4, 16))
    np.testing.assert_array_equal(ours.float().numpy(), scale.reshape(24, 4))


@pytest.mark.parametrize("kind", FORMATS)
def test_onnx_dequantises_the_stored_bytes_to_the_same(kind: Format) -> None:
    weights = torch.from_numpy(np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32))
    q, scale = quantise(weights, kind, "w")
    data_type, zero = (TensorProto.UINT8, [0x80] * 12) if kind == "int8" else (TensorProto.UINT4, [0x88] * 6)
    stored = pack(q, kind).numpy().tobytes()
    elements = helper.make_tensor("q", data_type, [6, 64], stored, raw=True)
    zeros = helper.make_tensor("z", data_type, [6, 2], bytes(zero), raw=True)
    scales = numpy_helper.from_array(scale.float().numpy(), "s")
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1, block_size=32)
    out = helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 64])
    graph = helper.make_graph([node], "g", [], [out], [elements, scales, zeros])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    (found,) = ReferenceEvaluator(model).run(None, {})
    np.testing.assert_array_equal(found, dequantise(q, scale).numpy())
