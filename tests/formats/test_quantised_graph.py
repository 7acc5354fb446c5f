"""Quantised matrices in graphs that somebody else may have made: what is read is what the manifest says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.onnx_external import check_external_data
from dijiang_engines.formats.onnx_graph import check_operators, read_graph
from dijiang_engines.formats.onnx_shapes import infer_shapes
from dijiang_engines.formats.quantised.graph import check_quantised
from dijiang_engines.op_contract import linear_fields
from dijiang_engines.weight_formats import Matrix

N, K = 24, 64
PRODUCTS = ("MatMulNBits", "DequantizeLinear", "DijiangLinear")
MATRICES = [Matrix("a.weight", "a.weight", 0, N, K, "int4"), Matrix("b.weight", "b.weight", 0, N, K, "int8")]


def tensor(name: str, kind: int, shape: list[int], nbytes: int) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, shape, bytes(nbytes), raw=True)


def nbits() -> onnx.ModelProto:
    """x [2, 3, 64] times both matrices, scales cast to float32."""
    nodes, initial = [], []
    for matrix in MATRICES:
        name = matrix.name
        nodes += [
            helper.make_node("Cast", [f"{name}.scale"], [f"{name}.s"], to=TensorProto.FLOAT),
            helper.make_node(
                "MatMulNBits", ["x", matrix.stored_name, f"{name}.s"], [f"{name}.y"], domain="com.microsoft",
                K=K, N=N, bits=matrix.bits, block_size=32, accuracy_level=4,
            ),
        ]  # fmt: skip
        initial += [
            tensor(
                matrix.stored_name, TensorProto.UINT8, list(matrix.stored_shape), N * K * matrix.bits // 8
            ),
            tensor(matrix.scale_name, TensorProto.FLOAT16, [N, K // 32], 2 * N * K // 32),
        ]
    return model(nodes, initial)


def portable() -> onnx.ModelProto:
    """The same by DequantizeLinear, Transpose and MatMul, the int4 matrix alone."""
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["a.weight.int4", "a.weight.scale", "z"], ["w"], axis=1, block_size=32
        ),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["a.weight.y"]),
    ]
    initial = [
        tensor("a.weight.int4", TensorProto.UINT4, [N, K], N * K // 2),
        tensor("a.weight.scale", TensorProto.FLOAT16, [N, K // 32], 2 * N * K // 32),
        tensor("z", TensorProto.UINT4, [N, K // 32], N * K // 64),
    ]
    return model(nodes, initial)


def plugin() -> onnx.ModelProto:
    """The same by a node of TensorRT's plugin, the int4 matrix alone."""
    inputs = ["x", "a.weight.int4", "a.weight.scale"]
    node = helper.make_node(
        "DijiangLinear", inputs, ["a.weight.y"], domain="dijiang", **linear_fields("int4", 1)
    )
    initial = [
        tensor("a.weight.int4", TensorProto.INT32, [N, K // 32, 4], N * K // 2),
        tensor("a.weight.scale", TensorProto.FLOAT16, [N, K // 32], 2 * N * K // 32),
    ]
    return model([node], initial)


def model(nodes: list[onnx.NodeProto], initial: list[onnx.TensorProto]) -> onnx.ModelProto:
    outputs = [node.output[0] for node in nodes if node.output[0].endswith(".y")]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, K])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs], initial,
    )  # fmt: skip
    return helper.make_model(graph)


def check(made: onnx.ModelProto, file: str = "step.onnx") -> dict[str, Any]:
    graph = read_graph(made.SerializeToString())
    check_operators(graph, file, 1, quantised=True)
    check_quantised(graph, MATRICES)
    return infer_shapes(graph, {"x": (2, 3, K)}, 10_000)


def test_what_the_exporter_writes_passes() -> None:
    shapes = check(nbits())
    assert shapes["a.weight.y"] == shapes["b.weight.y"] == (2, 3, N)
    assert check(portable(), "step.portable.onnx")["a.weight.y"] == (2, 3, N)
    assert check(plugin(), "step.trt.onnx")["a.weight.y"] == (2, 3, N)


def attribute(name: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(made: onnx.ModelProto) -> None:
        node = next(n for n in made.graph.node if n.op_type in PRODUCTS)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return change


def given(index: int, name: str) -> Callable[[onnx.ModelProto], None]:
    def change(made: onnx.ModelProto) -> None:
        node = next(n for n in made.graph.node if n.op_type in PRODUCTS)
        while len(node.input) <= index:
            node.input.append("")
        node.input[index] = name

    return change


def constant(name: str, kind: int, shape: list[int], nbytes: int) -> Callable[[onnx.ModelProto], None]:
    def change(made: onnx.ModelProto) -> None:
        kept = [t for t in made.graph.initializer if t.name != name]
        del made.graph.initializer[:]
        made.graph.initializer.extend([*kept, tensor(name, kind, shape, nbytes)])

    return change


HOSTILE: dict[str, tuple[Callable[[], onnx.ModelProto], Callable[[onnx.ModelProto], None]]] = {
    "more rows than there are": (nbits, attribute("N", N * 1000)),
    "more columns than there are": (nbits, attribute("K", K * 2)),
    "other bits": (nbits, attribute("bits", 8)),
    "2 bits": (nbits, attribute("bits", 2)),
    "bits as a real number": (nbits, attribute("bits", 4.0)),
    "no bits": (nbits, attribute("bits", None)),
    "blocks of 16": (nbits, attribute("block_size", 16)),
    "blocks of 0": (nbits, attribute("block_size", 0)),
    "negative rows": (nbits, attribute("N", -N)),
    "an unknown accuracy level": (nbits, attribute("accuracy_level", 5)),
    "an accuracy level in words": (nbits, attribute("accuracy_level", "4")),
    "an unknown attribute": (nbits, attribute("weight_prepacked", 1)),
    "another matrix": (nbits, given(1, "b.weight.int8")),
    "an activation for a matrix": (nbits, given(1, "x")),
    "another matrix's scales": (nbits, given(2, "b.weight.scale")),
    "an activation for scales": (nbits, given(2, "x")),
    "zero points": (nbits, given(3, "b.weight.int8")),
    "an order of columns": (nbits, given(4, "b.weight.int8")),
    "elements of another shape": (nbits, constant("a.weight.int4", 2, [N, 1, 32], N * 32)),
    "elements in 2 dimensions": (nbits, constant("b.weight.int8", 2, [N, K], N * K)),
    "elements of another type": (nbits, constant("a.weight.int4", 3, [N, 2, 16], N * 32)),
    "scales of another type": (nbits, constant("a.weight.scale", 1, [N, 2], 8 * N)),
    "scales of another shape": (nbits, constant("a.weight.scale", 10, [N, 1], 2 * N)),
    "dequantised along the other axis": (portable, attribute("axis", 0)),
    "dequantised in other blocks": (portable, attribute("block_size", 64)),
    "dequantised to another type": (portable, attribute("output_dtype", 10)),
    "zero points of another shape": (portable, constant("z", 21, [N, 1], N // 2)),
    "zero points of another type": (portable, constant("z", 22, [N, 2], N)),
    "an activation for zero points": (portable, given(2, "x")),
    "no zero points": (portable, given(2, "")),
    "another format of the plugin's": (plugin, attribute("term_weight_format", [3])),
    "packed weights": (plugin, attribute("term_weight_format", [2])),
    "a term more": (plugin, attribute("term_output", [0, 0])),
    "a bias": (plugin, attribute("term_bias", [1])),
    "a norm": (plugin, attribute("output_norm", [1])),
    "an epsilon": (plugin, attribute("output_epsilon", [1e-5])),
    "float32 activations": (plugin, attribute("dtype", [0])),
    "another namespace": (plugin, attribute("plugin_namespace", "other")),
    "no rows": (plugin, attribute("output_width", [N])),
    "a residual": (plugin, given(3, "x")),
    "another matrix for the plugin": (plugin, given(1, "b.weight.int8")),
    "words of another shape": (plugin, constant("a.weight.int4", 6, [N, 1, 8], N * 32)),
    "bytes for words": (plugin, constant("a.weight.int4", 2, [N, 2, 16], N * 32)),
    "bytes for 4-bit elements": (portable, constant("a.weight.int4", 2, [N, 2, 16], N * 32)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_it_never_writes_is_refused(kind: str) -> None:
    make, change = HOSTILE[kind]
    made = copy.deepcopy(make())
    change(made)
    with pytest.raises(BundleError):
        check(made, {portable: "step.portable.onnx", plugin: "step.trt.onnx"}.get(make, "step.onnx"))


def test_each_form_is_for_its_own_graphs_and_for_quantised_bundles() -> None:
    made = (("n", nbits), ("p", portable), ("t", plugin))
    graphs = {name: read_graph(make().SerializeToString()) for name, make in made}
    for name, file, quantised in (
        ("n", "step.portable.onnx", True), ("p", "step.onnx", True), ("n", "step.onnx", False),
        ("p", "step.portable.onnx", False), ("t", "step.onnx", True), ("t", "step.trt.onnx", False),
        ("n", "step.trt.onnx", True), ("p", "step.trt.onnx", True),
    ):  # fmt: skip
        with pytest.raises(BundleError, match="is not one that a bundle's graph may use"):
            check_operators(graphs[name], file, 1, quantised=quantised)


@pytest.mark.parametrize(("length", "good"), [(N * K // 2, True), (N * K, False), (N * K // 2 - 1, False)])
def test_the_length_of_4_bit_elements_in_another_file(length: int, good: bool) -> None:
    made = portable()
    stored = made.graph.initializer[0]
    stored.ClearField("raw_data")
    stored.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.data"), ("offset", "0"), ("length", str(length))):
        stored.external_data.add(key=key, value=value)
    if good:
        (found,) = check_external_data(
            made.SerializeToString(), location="weights.data", file_bytes=N * K // 2
        )
        assert found.length == length
        return
    with pytest.raises(BundleError):
        check_external_data(made.SerializeToString(), location="weights.data", file_bytes=N * K // 2)


def test_numbers_of_a_matrix() -> None:
    matrix = MATRICES[0]
    assert matrix.nbytes == np.prod(matrix.stored_shape) + 2 * np.prod(matrix.scale_shape)
