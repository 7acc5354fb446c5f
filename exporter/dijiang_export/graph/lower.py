"""Lower DijiangAttention to what a target runs: standard operators, ONNX Runtime's own, TensorRT's plugin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import onnx_ir as ir

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
    _replace(model.graph, step_body if kind == "step" else prefill_body)


def lower_to_capture(model: ir.Model) -> None:
    """The step graph in standard ONNX operators that a CUDA graph can hold, in place."""
    _replace(model.graph, body_ort.capture_step_body)


def lower_to_ort(model: ir.Model, kind: Literal["prefill", "step"]) -> None:
    """Replace every DijiangAttention by ONNX Runtime's LinearAttention and standard operators, in place."""
    _replace(model.graph, partial(body_ort.ort_body, kind=kind))
    if any(node.domain == body_ort.DOMAIN for node in model.graph):  # not for heads that are too wide
        model.graph.opset_imports[body_ort.DOMAIN] = body_ort.DOMAIN_VERSION


def _replace(graph: ir.Graph, body: Callable[[Builder, Op], tuple[ir.Value, ir.Value]]) -> None:
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
    nodes = [node for node in graph if node.domain == DOMAIN]
    assert nodes, f"no {OP_NAME} in the graph"
    return nodes
