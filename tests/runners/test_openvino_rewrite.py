"""What OpenVINO would compute otherwise than a graph says, and what stands there instead: exactly."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dijiang_engines.errors import RunnerError
from dijiang_engines.runners.openvino.library import openvino_module
from dijiang_engines.runners.openvino.rewrite import rewrite, rounded_to, turn_tables

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)
openvino = openvino_module()
A = np.array
DOUBLE = TensorProto.DOUBLE
POSITIONS = [0, 1, 2047, 2048, 2**22 - 1, 2**22, 10**6, 2**24 + 1, 10**9, 2**31 - 2, 2**31 - 1]


def model_of(
    nodes: list[Any], given: tuple[str, int, list[Any]], shape: list[Any], **constants: Any
) -> bytes:
    """An ONNX model of one input and the output y, float32, opset 17."""
    name, dtype, dims = given
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, dtype, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def run(data: bytes, x: np.ndarray, *, as_it_is: bool = False) -> np.ndarray:
    core = openvino.Core()
    model = core.read_model(data)
    if not as_it_is:
        rewrite(model)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([x])[0])


def angles(inv_freq: np.ndarray) -> bytes:
    """As the exporter's graph/body_common.py writes them."""
    nodes = [
        helper.make_node("Cast", ["p"], ["p64"], to=DOUBLE),
        helper.make_node("Unsqueeze", ["p64", "last"], ["wide"]),
        helper.make_node("Cast", ["inv_freq"], ["inv64"], to=DOUBLE),
        helper.make_node("Mul", ["inv64", "per_turn"], ["per_token"]),
        helper.make_node("Mul", ["wide", "per_token"], ["turns"]),
        helper.make_node("Floor", ["turns"], ["whole"]),
        helper.make_node("Sub", ["turns", "whole"], ["fraction"]),
        helper.make_node("Mul", ["fraction", "turn"], ["angle64"]),
        helper.make_node("Cast", ["angle64"], ["angle"], to=TensorProto.FLOAT),
        helper.make_node("Sin", ["angle"], ["y"]),
    ]
    return model_of(
        nodes, ("p", TensorProto.INT32, ["B", "L"]), ["B", "L", len(inv_freq)],
        inv_freq=inv_freq, last=A([-1]), per_turn=A(0.5 / np.pi), turn=A(2 * np.pi),
    )  # fmt: skip


def test_angles_are_exact_at_every_position() -> None:
    inv_freq = (10000.0 ** -np.linspace(0, 1, 16, endpoint=False)).astype(np.float32)
    positions = A(POSITIONS, np.int32)[:, None]
    # Turns as whole numbers of 2^-200: no rounding until the last step, to float64.
    per_turn = Fraction(A(0.5 / np.pi).item())
    turns = [[Fraction(p) * Fraction(float(w)) * per_turn % 1 for w in inv_freq] for p in POSITIONS]
    expected = np.sin(2 * np.pi * A(turns, np.float64))
    got = run(angles(inv_freq), positions)[:, 0]
    # The graph's own float64 is off by 2^-53 of 2^31 radians.
    assert np.abs(got - expected).max() < 1.5e-6
    # As it is, OpenVINO is off by anything: else there was nothing to replace.
    assert np.abs(run(angles(inv_freq), positions, as_it_is=True)[:, 0] - expected).max() > 0.1


def test_the_parts_of_a_position_cover_all() -> None:
    tables = turn_tables(A([2.0**-20, 0.15]))
    assert [table.shape for table in tables] == [(512, 2), (2048, 2), (2048, 2)]
    assert all(np.abs(table).max() <= 0.5 for table in tables)
    for position in POSITIONS:
        parts = (position >> 22, (position >> 11) & 2047, position & 2047)
        assert parts[0] * 2**22 + parts[1] * 2**11 + parts[2] == position
        found = sum(table[part, 0].astype(np.float64) for table, part in zip(tables, parts, strict=True))
        assert abs((found - position / 2**20 + 0.5) % 1 - 0.5) < 2**-24


def sums() -> bytes:
    """As the exporter's graph/body_prefill.py writes the gaps between chunks."""
    nodes = [
        helper.make_node("Cast", ["x"], ["x64"], to=DOUBLE),
        helper.make_node("CumSum", ["x64", "axis"], ["total"]),
        helper.make_node("Pad", ["total", "pads"], ["edges"]),
        helper.make_node("Transpose", ["edges"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("Sub", ["edges", "turned"], ["gap64"]),
        helper.make_node("Cast", ["gap64"], ["gap"], to=TensorProto.FLOAT),
        helper.make_node("Min", ["gap", "zero"], ["y"]),
    ]
    return model_of(
        nodes, ("x", TensorProto.FLOAT, ["B", 2, "n", 1]), ["B", 2, "m", "m"],
        axis=A(2), pads=A([0, 0, 1, 0, 0, 0, 0, 0]), zero=A(0, np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 33])
def test_short_gaps_between_long_sums_survive(count: int) -> None:
    rng = np.random.default_rng(count)
    x = -rng.uniform(1e-3, 1, (3, 2, count, 1)).astype(np.float32)
    x[:, :, : count // 2] *= 1920  # a chunk of the steepest decay
    edges = np.pad(np.cumsum(x.astype(np.float64), axis=2), ((0, 0), (0, 0), (1, 0), (0, 0)))
    expected = np.tril(edges - edges.swapaxes(2, 3), -1)
    got = run(sums(), x)
    below = np.tril(np.ones((count + 1, count + 1), bool), -1)
    error = np.abs(np.where(below, got - expected, 0) / np.where(below, expected, 1)).max()
    assert error < 1e-6
    if count == 33:
        as_it_is = run(sums(), x, as_it_is=True)
        assert np.abs(np.where(below, as_it_is - expected, 0) / np.where(below, expected, 1)).max() > 1e-4


@pytest.mark.parametrize(
    ("dtype", "onnx_type"), [("f16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)]
)
def test_constants_are_rounded_as_the_graph_says(dtype: str, onnx_type: int) -> None:
    rng = np.random.default_rng(4)
    p = rng.standard_normal((40, 50)).astype(np.float32)
    p[0, :4] = (1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-11), 1 - 2.0**-9)  # halfway
    kind = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    expected = p.astype(kind).astype(np.float32)
    np.testing.assert_array_equal(rounded_to(dtype, p), expected)
    nodes = [
        helper.make_node("Cast", ["p"], ["narrow"], to=onnx_type),
        helper.make_node("Cast", ["narrow"], ["rounded"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "rounded"], ["y"]),
    ]
    data = model_of(nodes, ("x", TensorProto.FLOAT, ["n", 50]), ["n", 50], p=p)
    np.testing.assert_array_equal(run(data, np.zeros((40, 50), np.float32)), expected)


def test_other_float64_is_refused() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["x64"], to=DOUBLE),
        helper.make_node("Sqrt", ["x64"], ["root"], name="a_root"),
        helper.make_node("Cast", ["root"], ["y"], to=TensorProto.FLOAT),
    ]
    data = model_of(nodes, ("x", TensorProto.FLOAT, [3]), [3])
    with pytest.raises(RunnerError, match="float32 what the graph computes in float64") as caught:
        run(data, np.ones(3, np.float32))
    assert caught.value.got == "Sqrt a_root"
    assert "onnxruntime-cpu" in str(caught.value.hint)


def test_what_looks_alike_is_refused() -> None:
    """Turns of something that is no position, and sums along another axis."""
    other = onnx.load_from_string(angles(A([1.0, 0.1], np.float32)))
    other.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    along = onnx.load_from_string(sums())
    next(one for one in along.graph.initializer if one.name == "axis").CopyFrom(
        numpy_helper.from_array(A(1), "axis")
    )
    for model in (other, along):
        with pytest.raises(RunnerError, match="float64"):
            rewrite(openvino.Core().read_model(model.SerializeToString()))
