"""What a bundle's graph may hold: the exporter's operators, and no more memory than they need."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.makers.toy_bundle import SPEC, external_tensor, make_bundle, toy_graph, write_manifest

from dijiang_engines.errors import BundleError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.graph_check import PREFILLS, STEPS, check_graph, most_elements
from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.formats.onnx_graph import OPERATORS, read_graph
from dijiang_engines.formats.onnx_shapes import infer_shapes
from dijiang_engines.spec import ModelSpec

PLACES = {"table": (0, np.zeros((260, 32), np.float32)), "head": (40960, np.zeros((32, 260), np.float32))}


def toy(*, step: bool = False) -> onnx.ModelProto:
    return toy_graph(SPEC, PLACES, step=step, all_logits=False)


def check(model: onnx.ModelProto, *, step: bool = False, file: str = "x.onnx") -> None:
    check_graph(model.SerializeToString(), file, SPEC, step=step, all_logits=False)


def with_nodes(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """The toy model, and nodes whose results nobody reads."""
    model = toy()
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    model.graph.node.extend(nodes)
    return model


def subgraph() -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Add", ["one", "one"], ["z"])], "g", [], [])


def looped() -> onnx.ModelProto:
    """2^60 turns."""
    turns = {"turns": np.int64(2**60), "yes": np.bool_(True)}
    return with_nodes(helper.make_node("Loop", ["turns", "yes"], ["loop"], body=subgraph()), **turns)


def in_function() -> onnx.ModelProto:
    model = toy()
    node = helper.make_node("Add", ["a", "a"], ["c"])
    model.functions.append(
        helper.make_function("", "Tanh", ["a"], ["c"], [node], [helper.make_opsetid("", 17)])
    )
    return model


FOREIGN: dict[str, Callable[[], onnx.ModelProto]] = {
    "loop": looped,
    "if": lambda: with_nodes(
        helper.make_node("If", ["yes"], ["y"], then_branch=subgraph(), else_branch=subgraph()),
        yes=np.bool_(True),
    ),
    "scan": lambda: with_nodes(helper.make_node("Scan", ["one"], ["y"], body=subgraph(), num_scan_inputs=1)),
    "subgraph of a known operator": lambda: with_nodes(
        helper.make_node("Tanh", ["hundredth"], ["y"], body=subgraph())
    ),
    "constant of shape": lambda: with_nodes(
        helper.make_node("ConstantOfShape", ["size"], ["y"]), size=np.array([3 << 30])
    ),
    "function": in_function,
    "custom domain": lambda: with_nodes(helper.make_node("Tanh", ["hundredth"], ["y"], domain="ai.onnx.ml")),
    "sequence": lambda: with_nodes(helper.make_node("SequenceEmpty", [], ["y"])),
    "constant": lambda: with_nodes(
        helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(np.zeros(3)))
    ),
    "com.microsoft": lambda: with_nodes(
        helper.make_node("LinearAttention", ["vectors"] * 5, ["y", "z"], domain="com.microsoft")
    ),
    "too many nodes": lambda: with_nodes(
        *(helper.make_node("Tanh", ["hundredth"], [f"y{i}"]) for i in range(256 * 3))
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_in_the_list_is_refused(kind: str) -> None:
    with pytest.raises(BundleError, match=r"may not hold|may use|too many nodes") as info:
        check(FOREIGN[kind]())
    assert len(str(info.value)) < 3000


def test_two_graphs_are_refused() -> None:
    data = toy().SerializeToString()
    with pytest.raises(BundleError, match="does not hold one graph"):
        check_graph(data * 2, "x.onnx", SPEC, step=False, all_logits=False)


@pytest.mark.parametrize("step", [False, True])
def test_the_toy_graph_is_fine(step: bool) -> None:
    check(toy(step=step), step=step)


# -- memory --------------------------------------------------------------------------------------------

BIG = 3 << 30
LARGE: dict[str, Callable[[], onnx.ModelProto]] = {
    "expand": lambda: with_nodes(
        helper.make_node("Expand", ["hundredth", "size"], ["y"]), size=np.array([BIG])
    ),
    "expand, many dimensions": lambda: with_nodes(
        helper.make_node("Expand", ["hundredth", "size"], ["y"]), size=np.array([200] * 5)
    ),
    "expand, computed": lambda: with_nodes(
        helper.make_node("Mul", ["size", "size"], ["square"]),
        helper.make_node("Expand", ["hundredth", "square"], ["y"]),
        size=np.array([1 << 16]),
    ),
    "expand, by the length": lambda: with_nodes(
        helper.make_node("Mul", ["length", "size"], ["long"]),
        helper.make_node("Expand", ["hundredth", "long"], ["y"]),
        size=np.array([1 << 24]),
    ),
    "expand, by a power of the length": lambda: with_nodes(
        helper.make_node("Concat", ["length"] * 3, ["cube"], axis=0),
        helper.make_node("Expand", ["hundredth", "cube"], ["y"]),
    ),
    "range": lambda: with_nodes(
        helper.make_node("Range", ["zero", "size", "one"], ["y"]), size=np.int64(BIG)
    ),
    "pad": lambda: with_nodes(
        helper.make_node("Pad", ["head", "size"], ["y"]), size=np.array([0, 0, BIG, 0])
    ),
    "gather": lambda: with_nodes(
        helper.make_node("Gather", ["table", "rows"], ["y"]), rows=np.zeros((1 << 16,), np.int64)
    ),
    "outer product": lambda: with_nodes(
        helper.make_node("Reshape", ["table", "column"], ["c"]),
        helper.make_node("Reshape", ["table", "row"], ["r"]),
        helper.make_node("Mul", ["c", "r"], ["y"]),
        column=np.array([-1, 1]), row=np.array([1, -1]),
    ),
    "matrix product": lambda: with_nodes(
        helper.make_node("Reshape", ["table", "column"], ["c"]),
        helper.make_node("Reshape", ["table", "row"], ["r"]),
        helper.make_node("MatMul", ["c", "r"], ["y"]),
        column=np.array([-1, 1]), row=np.array([1, -1]),
    ),
    "concat": lambda: with_nodes(helper.make_node("Concat", ["table"] * 2000, ["y"], axis=0)),
    "rank": lambda: with_nodes(
        helper.make_node("Unsqueeze", ["hundredth", "axes"], ["y"]), axes=np.arange(9)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_a_value_that_no_model_of_this_size_needs_is_refused(kind: str) -> None:
    start = time.process_time()
    with pytest.raises(BundleError, match="more than a model of this size can need"):
        check(LARGE[kind]())
    assert time.process_time() - start < 2


BY_DATA = {
    "expand": helper.make_node("Expand", ["hundredth", "seq_lens"], ["y"]),
    "range": helper.make_node("Range", ["zero", "positions", "one"], ["y"]),
    "a value of nowhere": helper.make_node("Tanh", ["nowhere"], ["y"]),
    "no common shape": helper.make_node("Add", ["table", "head"], ["y"]),
    "no product": helper.make_node("MatMul", ["table", "table"], ["y"]),
    "an axis that is not there": helper.make_node("Concat", ["table"], ["y"], axis=7),
    "an output too many": helper.make_node("Tanh", ["table"], ["y", "z"]),
    "an axis twice": helper.make_node("Unsqueeze", ["table", "twice"], ["y"]),
    "no input": helper.make_node("Add", [], ["y"]),
    "a name again": helper.make_node("Tanh", ["hundredth"], ["table"]),
}


@pytest.mark.parametrize("kind", BY_DATA)
def test_a_shape_that_cannot_be_told_is_refused(kind: str) -> None:
    with pytest.raises(BundleError, match=r"cannot be told|not there yet|there already"):
        check(with_nodes(BY_DATA[kind], twice=np.array([0, 0])))


def test_an_input_that_is_a_constant_too_is_refused() -> None:
    """The walk would take the constant's value, a runtime the one that it is given."""
    expand = helper.make_node("Expand", ["hundredth", "positions"], ["y"])
    with pytest.raises(BundleError, match="a constant too"):
        check(with_nodes(expand, positions=np.array([1])))


def test_sizes_and_types_in_attributes_are_the_model_s() -> None:
    given = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "rotary_dim": 0}
    places = {"plugin": given, "linear": {"q_num_heads": 2, "kv_num_heads": 2}}
    for kind, attributes in places.items():
        for name in (None, *attributes):
            wrong = attributes | ({} if name is None else {name: 2**60})
            if kind == "plugin":
                node = helper.make_node(
                    "DijiangAttention", ["vectors", "vectors", "shaped0"], ["y"], domain="dijiang", **wrong
                )
            else:
                inputs = ["vectors", "vectors", "vectors", "shaped0", "vectors"]
                node = helper.make_node("LinearAttention", inputs, ["y"], domain="com.microsoft", **wrong)
            file = "x.trt.onnx" if kind == "plugin" else "x.ort.onnx"
            if name is None:
                check(with_nodes(node), file=file)
            else:
                with pytest.raises(BundleError, match=f"attribute {name} of"):
                    check(with_nodes(node), file=file)
    with pytest.raises(BundleError, match="makes a type"):
        check(with_nodes(helper.make_node("Cast", ["zero"], ["y"], to=TensorProto.STRING)))
    with pytest.raises(BundleError, match="element type"):
        check(with_nodes(words=np.array(["a", "b"], dtype=object)))


def test_another_output_is_refused() -> None:
    model = toy()
    model.graph.output.pop()
    with pytest.raises(BundleError, match="other outputs"):
        check(model)
    model = toy()
    last = model.graph.node[-1]
    last.output[0] = "wide"
    model.graph.node.append(helper.make_node("Concat", ["wide", "wide"], ["logits"], axis=-1))
    with pytest.raises(BundleError, match="another shape"):
        check(model)


def test_a_constant_of_100000_dimensions_is_refused_at_once() -> None:
    tensor = external_tensor("t", np.zeros(1, np.float32), 0)
    del tensor.dims[:]
    tensor.dims.extend([2**62] * 100_000)
    inline = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2**62] * 100_000)
    for bad in (tensor, inline):
        model = toy()
        model.graph.initializer.append(bad)
        start = time.process_time()
        with pytest.raises(BundleError, match="dimensions"):
            check(model)
        assert time.process_time() - start < 2


def test_a_bundle_with_such_a_graph_does_not_open(tmp_path: Path) -> None:
    make_bundle(tmp_path / "toy.bundle")
    open_bundle(tmp_path / "toy.bundle")
    for name, model in (("prefill", looped()), ("prefill", LARGE["expand"]()), ("other", looped())):
        make_bundle(tmp_path / "toy.bundle")
        (tmp_path / "toy.bundle" / f"{name}.onnx").write_bytes(model.SerializeToString())
        write_manifest(tmp_path / "toy.bundle", SPEC)
        with pytest.raises(BundleError, match=f"{name}.onnx: "):
            open_bundle(tmp_path / "toy.bundle")
        (tmp_path / "toy.bundle" / f"{name}.onnx").unlink()


# -- against what makes graphs, and what runs them -------------------------------------------------------


def lowered() -> list[tuple[str, ModelSpec, bool, Any]]:
    """(file, spec, step, model) of every lowering, over the choices that decide about operators."""
    import torch
    from support.makers import random_models as rm

    from dijiang_export.graph import lower, trace, write

    def one(spec: ModelSpec, **changes: Any) -> ModelSpec:
        return dataclasses.replace(spec, num_layers=1, **changes)

    result = []
    for spec, dtype in (
        (one(rm.with_tables(rm.NEOX, 40)), torch.float16),
        (one(rm.LLAMA), torch.float32),
        (one(rm.OPT_350M), torch.float32),
        (one(rm.with_tables(rm.with_heads(rm.LLAMA, 1, 1, 256, 64), 40)), torch.bfloat16),
        (one(rm.NEOX, activation="gelu_tanh", rotary_dim=0), torch.float32),
    ):
        prefill = trace.trace(spec, dtype, all_logits=False)
        traced = {"prefill": prefill, "step": trace.step_of(prefill)}
        for made in write.graph_files(("ort", "capture")):
            model = traced[made.kind].clone()
            if made.target in ("standard", "ort"):
                (lower.lower_to_standard if made.target == "standard" else lower.lower_to_ort)(
                    model, made.kind
                )
            else:
                (lower.lower_to_capture if made.target == "capture" else lower.lower_to_tensorrt)(model)
            result.append((made.file, spec, made.kind == "step", model))
    return result


def test_the_list_is_what_the_exporter_writes() -> None:
    import onnx_ir as ir

    used: dict[str, set[tuple[str, str]]] = {}
    for file, spec, step, model in lowered():
        graph = read_graph(ir.to_proto(model).SerializeToString())
        end = next(end for end in OPERATORS if file.endswith(end))
        used.setdefault(end, set()).update(node.operator for node in graph.nodes)
        # the weights are inputs still
        weights = {
            value.name: tuple(value.shape) for value in list(model.graph.inputs)[3 + spec.num_layers :]
        }
        for batch, length in (*STEPS, (5, 1)) if step else (*PREFILLS, (3, 200), (2, 1000)):
            infos, outputs = graph_io(spec, step=step, all_logits=False)
            sizes = {"batch": batch, "sequence": length}
            shapes = {t.name: tuple(sizes.get(n, n) for n in t.shape) for t in infos}
            found = infer_shapes(graph, shapes | weights, most_elements(spec, batch, length))
            assert all(found[t.name] == tuple(sizes.get(n, n) for n in t.shape) for t in outputs)
    everywhere = used[".onnx"] | used[".trt.onnx"] | used[".ort.onnx"]
    assert everywhere == OPERATORS[".trt.onnx"] | OPERATORS[".ort.onnx"]
    earlier = {("", "GatherElements"), ("", "Expand")}  # bundles of 0.1.0 have them in prefill.onnx
    assert used[".onnx"] == OPERATORS[".onnx"] - earlier
    assert all(used[end] <= OPERATORS[end] for end in used)


@pytest.mark.parametrize("name", ["NEOX", "LLAMA", "OPT_350M", "tables"])
@pytest.mark.parametrize("kind", ["prefill", "step"])
def test_shapes_are_those_that_onnxruntime_makes(kind: str, name: str) -> None:
    """Every value of a graph, made an output and run."""
    import onnx_ir as ir
    from support.makers import random_models as rm

    spec = rm.with_tables(rm.LLAMA, 400) if name == "tables" else getattr(rm, name)
    proto = ir.to_proto(rm.graph_model(spec, rm.random_model(spec), kind))
    graph = read_graph(proto.SerializeToString())
    names = [output for node in graph.nodes for output in node.outputs]
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 1)) if kind == "step" else ((1, 1), (2, 150)):
        rng = np.random.default_rng(0)
        feed = rm.feed(
            rng.integers(0, spec.vocab_size, (batch, length)), np.arange(batch), np.full(batch, length),
            [np.zeros((batch, *spec.state_shape), np.float32)] * spec.num_layers,
        )  # fmt: skip
        most = most_elements(spec, batch, length)
        shapes = infer_shapes(graph, {key: value.shape for key, value in feed.items()}, most)
        for value, array in zip(names, session.run(names, feed), strict=True):
            assert shapes[value] == array.shape, value


# -- fuzz ------------------------------------------------------------------------------------------------

SAMPLE = toy().SerializeToString()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_graphs_raise_nothing_but_bundle_errors(data: st.DataObject) -> None:
    raw = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BundleError):
        check_graph(bytes(raw), "x.onnx", SPEC, step=False, all_logits=False)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rewired_graphs_raise_nothing_but_bundle_errors(data: st.DataObject) -> None:
    """Well-formed nodes of listed operators with any inputs and attributes."""
    names = ["table", "hundredth", "axis1", "last", "end", "length", "input_ids", "zero", "state_shape", ""]
    nodes = []
    for index in range(data.draw(st.integers(1, 4))):
        _, kind = data.draw(st.sampled_from(sorted(OPERATORS[".onnx"])))
        inputs = data.draw(st.lists(st.sampled_from(names), max_size=4))
        values = st.one_of(
            st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3), st.just([1, 0]), st.just("x")
        )
        attributes = data.draw(
            st.dictionaries(
                st.sampled_from(["axis", "perm", "start", "end", "to", "keepdims", "axes"]), values
            )
        )
        outputs = [f"y{index}", f"z{index}"][: data.draw(st.integers(1, 2))]
        nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        names.append(f"y{index}")
    with suppress(BundleError):
        check(with_nodes(*nodes))
