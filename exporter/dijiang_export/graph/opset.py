"""Take a graph from opset 18 to 17 and IR 8, the newest that every targeted TensorRT parses (8.6: <= 17).

The onnx version converter needs weight values; these graphs have none while they are made. Only the
differences that can occur are handled, and anything else that changed between 17 and 18 is an error.
"""

from __future__ import annotations

import onnx_ir as ir

OPSET = 17
IR_VERSION = 8
PORTABLE_OPSET = 21
"""Has DequantizeLinear in blocks, and 4-bit integers,"""
PORTABLE_IR_VERSION = 10
"""which this version of the file knows."""

# Reductions whose `axes` moved from attribute (<= 17) to input (18). ReduceSum moved at 13 already.
_REDUCTIONS = {
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
}  # fmt: skip
# Changed at 18 in ways that these graphs do not use, or new at 18: must not occur.
_UNSUPPORTED = {
    "ScatterElements", "ScatterND", "Resize", "BitwiseAnd", "BitwiseOr", "BitwiseNot", "BitwiseXor",
    "CenterCropPad", "Col2Im", "Mish", "OptionalGetElement", "GroupNormalization",
}  # fmt: skip


def downgrade_to_17(model: ir.Model) -> None:
    """Rewrite in place.

    Raises:
        AssertionError: an operator without a rule; a change in tracing brought it in.
    """
    graph = model.graph
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _UNSUPPORTED:
            raise AssertionError(f"no rule to take {node.op_type} ({node.name}) from opset 18 to {OPSET}")
        if node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
        elif node.op_type == "Pad" and len(node.inputs) > 3:
            raise AssertionError(f"Pad with axes ({node.name}) does not exist in opset {OPSET}")
        elif node.op_type in _REDUCTIONS and len(node.inputs) > 1:
            _axes_to_attribute(node)
    graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION


def raise_to_21(model: ir.Model) -> None:
    """Rewrite a graph of opset 17 in place.

    Of the operators that these graphs use only reductions changed: their axes are an input.
    """
    for node in list(model.graph):
        if node.domain == "" and node.op_type in _REDUCTIONS and "axes" in node.attributes:
            axes = node.attributes.pop("axes").as_ints()
            name = f"{node.name}/axes"
            tensor = ir.tensor(list(axes), dtype=ir.DataType.INT64, name=name)
            value = ir.Value(
                name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)
            )
            model.graph.register_initializer(value)
            node.resize_inputs(2)
            node.replace_input_with(1, value)
    model.graph.opset_imports[""] = PORTABLE_OPSET
    model.ir_version = PORTABLE_IR_VERSION


def _axes_to_attribute(node: ir.Node) -> None:
    axes = node.inputs[1]
    if axes is not None:
        constant = ir.convenience.get_const_tensor(axes)
        if constant is None:
            raise AssertionError(f"{node.op_type} ({node.name}) has axes that are not constant")
        node.attributes["axes"] = ir.AttrInt64s("axes", constant.numpy().tolist())
    node.attributes.pop("noop_with_empty_axes", None)
    node.replace_input_with(1, None)
    node.resize_inputs(1)
