"""Make the four graphs of a bundle, and variants for one runtime, and check them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch

from dijiang_engines.op_contract import DOMAIN, OP_VERSION
from dijiang_engines.spec import ModelSpec
from dijiang_engines.version import __version__
from dijiang_engines.weight_formats import Activations
from dijiang_export.graph import custom_op, lower, opset, trace, weights
from dijiang_export.graph.quantised import DOMAIN as MICROSOFT
from dijiang_export.graph.quantised import DOMAIN_VERSION as MICROSOFT_VERSION
from dijiang_export.graph.quantised import Form, Quantiser
from dijiang_export.quantise.recipe import Recipe

Target = Literal["standard", "trt", "ort", "capture", "portable"]


@dataclass(frozen=True)
class GraphFile:
    """One of the bundle's graphs: its key in the manifest, its file, and how it is made."""

    key: str
    file: str
    kind: trace.GraphName
    target: Target


GRAPHS = (
    GraphFile("prefill", "prefill.onnx", "prefill", "standard"),
    GraphFile("step", "step.onnx", "step", "standard"),
    GraphFile("prefill_trt", "prefill.trt.onnx", "prefill", "trt"),
    GraphFile("step_trt", "step.trt.onnx", "step", "trt"),
)
VARIANTS = {
    "ort": (
        GraphFile("prefill_ort", "prefill.ort.onnx", "prefill", "ort"),
        GraphFile("step_ort", "step.ort.onnx", "step", "ort"),
    ),
    "capture": (GraphFile("step_capture", "step.capture.onnx", "step", "capture"),),
    "portable": (
        GraphFile("prefill_portable", "prefill.portable.onnx", "prefill", "portable"),
        GraphFile("step_portable", "step.portable.onnx", "step", "portable"),
    ),
}
"""Graphs that a bundle has only if they are asked for, by name."""


_FORMS: Mapping[Target, Form] = {"portable": "portable", "trt": "plugin"}
"""Of products of quantised matrices; of all others MatMulNBits."""


@dataclass(frozen=True)
class Quantisation:
    """What graphs with quantised weights are made by."""

    recipe: Recipe
    activations: Mapping[trace.GraphName, Activations]
    """Of each graph's products."""


def graph_files(variants: Sequence[str] = (), *, tensorrt: bool = True) -> tuple[GraphFile, ...]:
    """GRAPHS, then those of `variants`; without those for TensorRT's plugin if it cannot have them."""
    files = (*GRAPHS, *(graph_file for name in variants for graph_file in VARIANTS[name]))
    return tuple(one for one in files if tensorrt or one.target != "trt")


def has_tensorrt(dtype: torch.dtype, *, quantised: bool) -> bool:
    """Whether there are graphs for the plugin, whose quantised products have no float32 activations."""
    return not quantised or dtype != torch.float32


def make_graphs(
    spec: ModelSpec,
    dtype: torch.dtype,
    layout: weights.Layout,
    *,
    all_logits: bool,
    variants: Sequence[str] = (),
    quantisation: Quantisation | None = None,
) -> dict[str, tuple[ir.Model, weights.Layout]]:
    """Trace once, lower to each kind and target: by manifest key the model, and where its weights are.

    The models still have their weights as inputs; `save` attaches them.
    """
    prefill = trace.trace(spec, dtype, all_logits=all_logits)
    traced = {"prefill": prefill, "step": trace.step_of(prefill)}
    plain = layout if quantisation is None else weights.layout_of(spec, dtype)
    weights.check_layout(plain, trace.weight_inputs(prefill.graph, spec))
    models = {}
    for graph_file in graph_files(variants, tensorrt=has_tensorrt(dtype, quantised=quantisation is not None)):
        model, places = traced[graph_file.kind].clone(), layout
        if quantisation is not None:
            activations = quantisation.activations[graph_file.kind]
            form = _FORMS.get(graph_file.target, "nbits")
            places = Quantiser(model, quantisation.recipe, layout, form, activations).run()
        _lower(model, graph_file)
        models[graph_file.key] = model, places
    return models


def _lower(model: ir.Model, graph_file: GraphFile) -> None:
    if graph_file.target in ("standard", "portable"):
        lower.lower_to_standard(model, graph_file.kind)
    elif graph_file.target == "ort":
        lower.lower_to_ort(model, graph_file.kind)
    elif graph_file.target == "capture":
        lower.lower_to_capture(model)
    else:
        lower.lower_to_tensorrt(model)
    if graph_file.target == "portable":
        opset.raise_to_21(model)


def save(model: ir.Model, layout: weights.Layout, folder: Path, graph_file: GraphFile) -> dict[str, Any]:
    """Attach the weights, write the graph beside them, and return its manifest entry."""
    model.producer_name, model.producer_version = "dijiang-export", __version__
    model.graph.name = graph_file.kind
    weights.attach(model.graph, layout, folder)
    _remove_unused_initializers(model.graph)
    ir.save(model, folder / graph_file.file)
    return {
        "file": graph_file.file,
        "inputs": [_describe(value) for value in model.graph.inputs],
        "outputs": [_describe(value) for value in model.graph.outputs],
    }


def check(path: Path, target: Target) -> None:
    """onnx.checker with strict shape inference; opset and IR are what every target reads.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError, AssertionError: a defect here.
    """
    if target == "trt":
        _register_schema()
    onnx.checker.check_model(str(path), full_check=True, check_custom_domain=target == "trt")
    model = onnx.load(path, load_external_data=False)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    portable = target == "portable"
    expected = {"": opset.PORTABLE_OPSET if portable else opset.OPSET}
    if target == "trt":
        expected[DOMAIN] = OP_VERSION
    if any(node.domain == MICROSOFT for node in model.graph.node):
        assert not portable, f"{path.name} has operators of one runtime"
        expected[MICROSOFT] = MICROSOFT_VERSION
    assert versions == expected, f"{path.name} imports {versions}"
    ir_version = opset.PORTABLE_IR_VERSION if portable else opset.IR_VERSION
    assert model.ir_version == ir_version, f"{path.name} has IR version {model.ir_version}"
    assert not model.functions, f"{path.name} carries function bodies"


def _register_schema() -> None:
    """The checker looks custom ops up in onnx's registry."""
    for schema in (custom_op.onnx_schema(), custom_op.linear_schema()):
        if not onnx.defs.has(schema.name, DOMAIN):
            onnx.defs.register_schema(schema)


def _remove_unused_initializers(graph: ir.Graph) -> None:
    """Constants that lost their reader, and inv_freq in a standard graph without RoPE."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _describe(value: ir.Value) -> dict[str, Any]:
    assert value.shape is not None and value.dtype is not None
    shape = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    names = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64", ir.DataType.INT32: "int32"}
    return {"name": value.name, "dtype": names[value.dtype], "shape": shape}
