"""Finding external data in ONNX files: everywhere it can hide, and nothing that can be read two ways."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.makers.toy_bundle import SPEC, external_tensor, toy_graph

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.onnx_external import MAX_DEPTH, check_external_data, external_tensors

ARRAY = np.zeros((2, 3), np.float32)


def model_with(*nodes: onnx.NodeProto, tensors: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", [], [], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor)


def nested_in_if(model: onnx.ModelProto) -> onnx.ModelProto:
    return model_with(helper.make_node("If", ["x"], ["y"], then_branch=model.graph, else_branch=model.graph))


def in_function() -> onnx.ModelProto:
    model = model_with()
    node = constant(external_tensor("hidden", ARRAY, 0))
    function = helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 17)])
    model.functions.append(function)
    return model


def in_sparse() -> onnx.ModelProto:
    model = model_with()
    values = external_tensor("hidden", np.zeros(6, np.float32), 0)
    indices = numpy_helper.from_array(np.arange(6), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10]))
    return model


def in_training() -> onnx.ModelProto:
    model = model_with()
    model.training_info.add().algorithm.initializer.append(external_tensor("hidden", ARRAY, 0))
    return model


def in_tensor_list() -> onnx.ModelProto:
    node = helper.make_node("Custom", [], ["c"], domain="x")
    node.attribute.append(helper.make_attribute("many", [external_tensor("hidden", ARRAY, 0)]))
    return model_with(node)


HIDING_PLACES = {
    "initializer": lambda: model_with(tensors=(external_tensor("hidden", ARRAY, 0),)),
    "constant": lambda: model_with(constant(external_tensor("hidden", ARRAY, 0))),
    "subgraph": lambda: nested_in_if(model_with(tensors=(external_tensor("hidden", ARRAY, 0),))),
    "function": in_function,
    "sparse": in_sparse,
    "training": in_training,
    "tensor list": in_tensor_list,
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_external_data_is_found_wherever_it_hides(place: str) -> None:
    found = external_tensors(HIDING_PLACES[place]().SerializeToString())
    assert {t.name for t in found} == {"hidden"}
    assert {(t.location, t.offset, t.length, t.data_type) for t in found} == {("weights.data", 0, 24, 1)}


def test_matches_what_the_onnx_package_reads() -> None:
    places = {
        "table": (4096, np.zeros((260, 32), np.float32)),
        "head": (40960, np.zeros((32, 260), np.float32)),
    }
    model = toy_graph(SPEC, places, step=False, all_logits=False)
    expected = {
        t.name: ({e.key: e.value for e in t.external_data}, tuple(t.dims))
        for t in model.graph.initializer
        if t.data_location == TensorProto.EXTERNAL
    }
    found = {
        t.name: ({"location": t.location, "offset": str(t.offset), "length": str(t.length)}, t.dims)
        for t in external_tensors(model.SerializeToString())
    }
    assert found == expected
    assert len(found) == 2


def test_inline_tensors_are_not_external() -> None:
    assert (
        external_tensors(model_with(tensors=(numpy_helper.from_array(ARRAY, "inline"),)).SerializeToString())
        == []
    )


@pytest.mark.parametrize(
    "location",
    ["../weights.data", "/etc/passwd", "./weights.data", "weights.data\0", "", "weights.dat",
     "*/_ORT_MEM_ADDR_/*", "WEIGHTS.DATA", "sub/weights.data"],
)  # fmt: skip
def test_only_the_exact_location_is_accepted(location: str) -> None:
    model = model_with(tensors=(external_tensor("t", ARRAY, 0, location),))
    with pytest.raises(BundleError, match="outside the bundle's weights"):
        check_external_data(model.SerializeToString(), location="weights.data", file_bytes=1000)


def test_bounds_are_exact() -> None:
    data = model_with(tensors=(external_tensor("t", ARRAY, 76),)).SerializeToString()
    assert len(check_external_data(data, location="weights.data", file_bytes=100)) == 1
    with pytest.raises(BundleError, match=r"lies outside weights\.data"):
        check_external_data(data, location="weights.data", file_bytes=99)


def test_length_must_be_the_shape_s() -> None:
    tensor = external_tensor("t", ARRAY, 0)
    tensor.dims[0] = 5
    with pytest.raises(BundleError, match="another length than its shape"):
        check_external_data(
            model_with(tensors=(tensor,)).SerializeToString(), location="weights.data", file_bytes=1000
        )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "weights.data"}, "does not say where"),
        ({}, "does not say where"),
        ({"location": "weights.data", "offset": "-1", "length": "24"}, "bad offset"),
        ({"location": "weights.data", "offset": "0x10", "length": "24"}, "bad offset"),
        ({"location": "weights.data", "offset": "0", "length": "9" * 30}, "bad length"),
        ({"location": "weights.data", "offset": "0", "length": "٢٤"}, "bad length"),
        ({"location": "weights.data", "offset": "0", "length": "24", "basepath": "/etc"}, "unknown way"),
    ],
)
def test_odd_statements_are_refused(entries: dict[str, str], message: str) -> None:
    tensor = TensorProto(
        name="t", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL
    )
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(BundleError, match=message):
        external_tensors(model_with(tensors=(tensor,)).SerializeToString())


def test_a_repeated_key_is_refused() -> None:
    tensor = external_tensor("t", ARRAY, 0)
    tensor.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(BundleError, match="unknown way"):
        external_tensors(model_with(tensors=(tensor,)).SerializeToString())


def test_entries_without_the_external_mark_count_as_external() -> None:
    tensor = external_tensor("t", ARRAY, 0, "/etc/passwd")
    tensor.data_location = TensorProto.DEFAULT
    with pytest.raises(BundleError, match="outside the bundle's weights"):
        check_external_data(
            model_with(tensors=(tensor,)).SerializeToString(), location="weights.data", file_bytes=1000
        )


def test_deep_nesting_is_refused_without_recursion() -> None:
    model = model_with(tensors=(external_tensor("t", ARRAY, 0),))
    for _ in range(MAX_DEPTH // 3 + 1):
        model = nested_in_if_once(model)
    with pytest.raises(BundleError, match="too deeply"):
        external_tensors(model.SerializeToString())


def nested_in_if_once(model: onnx.ModelProto) -> onnx.ModelProto:
    return model_with(helper.make_node("If", ["x"], ["y"], then_branch=model.graph))


SAMPLE = nested_in_if(in_function()).SerializeToString() + in_function().SerializeToString()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_but_bundle_errors(data: st.DataObject) -> None:
    raw = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        found = external_tensors(bytes(raw))
    except BundleError:
        return
    assert all(t.offset >= 0 and t.length >= 0 for t in found)


@pytest.mark.parametrize("data", [b"", b"\x00", b"hello", b"\xff" * 40, b"\x0b\x0c", b"\x3a\x7f"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"well-formed|no graph"):
        external_tensors(data)
