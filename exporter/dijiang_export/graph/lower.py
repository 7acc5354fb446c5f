"""Lower DijiangAttention to what a target runs: standard operators, ONNX Runtime's own, TensorRT's plugin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common as passes

from dijiang_engines import io_names
from dijiang_engines.op_contract import DOMAIN, OP_NAME, OP_VERSION, PLUGIN_ATTRIBUTES
from dijiang_export.graph import body_ort
from dijiang_export.graph.body_common import Op
from dijiang_export.graph.body_prefill import prefill_body
from dijiang_export.graph.body_step import step_body
from dijiang_export.graph.builder import Builder


def lower_to_standard(model: ir.Model, kind: Literal["prefill", "step"]) -> None:
    """Replace every DijiangAttention by standard ONNX operators, in place: runs on any runtime.

    What does not depend on a layer's weights (masks, RoPE angles, chunk edges) is built once per graph.
    """
    builder = _replace(model.graph, step_body if kind == "step" else prefill_body)
    if kind == "prefill":
        _gather_last_rows(model, builder)


def lower_to_capture(model: ir.Model) -> None:
    """The step graph in standard ONNX operators that a CUDA graph can hold, in place."""
    _replace(model.graph, body_ort.capture_step_body)


def lower_to_ort(model: ir.Model, kind: Literal["prefill", "step"]) -> None:
    """Replace every DijiangAttention by ONNX Runtime's LinearAttention and standard operators, in place."""
    _replace(model.graph, partial(body_ort.ort_body, kind=kind))
    if any(node.domain == body_ort.DOMAIN for node in model.graph):  # not for heads that are too wide
        model.graph.opset_imports[body_ort.DOMAIN] = body_ort.DOMAIN_VERSION


def _replace(graph: ir.Graph, body: Callable[[Builder, Op], tuple[ir.Value, ir.Value]]) -> Builder:
    """Put `body` in the place of every op; the graph's builder, which knows its names and constants."""
    builder = Builder(graph)
    for node in _ops(graph):
        assert node.name is not None
        builder.scope = node.name.removesuffix(f"/{OP_NAME}")
        results = body(builder, Op.of(node))
        for old, new in zip(node.outputs, results, strict=True):
            new.shape, new.type = old.shape, old.type
            if old.is_graph_output():
                new.name = old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.insert_before(node, builder.nodes)
        builder.nodes = []
        graph.remove(node, safe=True)
    graph.opset_imports.pop(DOMAIN, None)
    return builder


def _gather_last_rows(model: ir.Model, b: Builder) -> None:
    """GatherElements of each row's last token -> Gather from all tokens in one list, the same numbers.

    GatherElements takes an index for every number that it copies, and runtimes limit it: ONNX's reference
    evaluator to as many tokens as NumPy's `choose` takes arrays.
    """
    graph = model.graph
    lens = next(value for value in graph.inputs if value.name == io_names.SEQ_LENS)
    for node in [node for node in graph if node.op_type == "GatherElements"]:
        hidden, chosen = node.inputs[0], node.outputs[0]
        assert hidden is not None and hidden.shape is not None
        b.scope = "/last_row"
        rows, length = (b.op("Shape", hidden, start=i, end=i + 1) for i in (0, 1))
        last = b.op("Max", b.op("Sub", lens, b.scalar(1)), b.scalar(0), label="last")  # [B]
        first = b.op("Mul", b.op("Range", b.scalar(0), b.op("Squeeze", rows), b.scalar(1)), length)
        index = b.op("Unsqueeze", b.op("Add", first, last), b.ints(1), label="index")  # [B, 1]
        width = hidden.shape[2]
        assert isinstance(width, int)
        tokens = b.reshape(hidden, -1, width, label="tokens")
        found = b.op("Gather", tokens, index, axis=0, label="Gather")  # [B, 1, h]
        found.shape, found.type = chosen.shape, chosen.type
        chosen.replace_all_uses_with(found)
        graph.insert_before(node, b.nodes)
        b.nodes = []
    passes.RemoveUnusedNodesPass()(model)


def lower_to_tensorrt(model: ir.Model) -> None:
    """Mark every DijiangAttention as a plugin node, in place, and say shapes as TensorRT's parsers read them.

    TensorRT's parsers differ in what they look a plugin up by: 8.6 reads the op type and the
    `plugin_version` and `plugin_namespace` attributes; later ones the node's domain too. All three are there.
    """
    for node in _ops(model.graph):
        values = (DOMAIN, str(OP_VERSION))
        for name, value in zip(PLUGIN_ATTRIBUTES, values, strict=True):
            node.attributes[name] = ir.AttrString(name, value)
    _gather_shapes(model.graph)


def _gather_shapes(graph: ir.Graph) -> None:
    """Shape of some dimensions -> Shape of all, Gather.

    The parser of TensorRT 8.6 does not look at `start` and `end` of Shape (opset 15): it goes on with all
    dimensions, and the builder says later that a reshape changes the volume.
    """
    builder = Builder(graph)
    for node in [node for node in graph if node.op_type == "Shape" and node.attributes]:
        builder.scope, _, label = (node.name or "").rpartition("/")
        x = node.inputs[0]
        assert x is not None and x.shape is not None
        span = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(x.shape)))
        taken = builder.ints(*range(len(x.shape))[span])
        whole = builder.op("Shape", x, label=f"{label}_whole")
        part = builder.op("Gather", whole, taken, label=f"{label}_part", axis=0)
        old = node.outputs[0]
        part.shape, part.type = old.shape, old.type
        old.replace_all_uses_with(part)
        graph.insert_before(node, builder.nodes)
        builder.nodes = []
        graph.remove(node, safe=True)


def _ops(graph: ir.Graph) -> list[ir.Node]:
    nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP_NAME)]
    assert nodes, f"no {OP_NAME} in the graph"
    return nodes
