"""A parsed TensorRT network as a graph: who makes a tensor, who reads it, what is constant, what is computed.

Layers come from the Python bindings as ILayer; what they hold (an operation, weights) shows after their class
is set to that of their kind, as TensorRT's documentation prescribes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PASSING = ("SHUFFLE", "IDENTITY", "CAST")
"""Kinds of layers through which a constant remains one."""
_CLASSES = {
    "CONSTANT": "IConstantLayer", "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "UNARY": "IUnaryLayer",
    "ELEMENTWISE": "IElementWiseLayer", "ACTIVATION": "IActivationLayer",
    "NORMALIZATION": "INormalizationLayer",
}  # fmt: skip

_ELEMENTWISE: dict[str, Any] = {
    "SUM": np.add, "PROD": np.multiply, "SUB": np.subtract, "DIV": np.divide, "POW": np.power,
    "MAX": np.maximum, "MIN": np.minimum,
}  # fmt: skip
_UNARY: dict[str, Any] = {
    "ERF": np.vectorize(math.erf), "EXP": np.exp, "SQRT": np.sqrt, "NEG": np.negative, "ABS": np.abs,
}  # fmt: skip
POINTWISE: dict[str, Callable[[Floats], Floats]] = {
    "RELU": lambda x: np.maximum(x, 0), "SIGMOID": lambda x: 1 / (1 + np.exp(-x)), "TANH": np.tanh,
    "GELU_ERF": lambda x: 0.5 * x * (1 + _UNARY["ERF"](x * 0.5**0.5)),
    "GELU_TANH": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
}  # fmt: skip


@dataclass(eq=False)
class Node:
    """One layer."""

    kind: str
    """Name of its LayerType."""
    layer: Any
    inputs: list[Any]
    """Tensors; None where an optional one is absent."""
    outputs: list[Any]
    operation: str = ""
    """Of elementwise, unary and activation layers."""


@dataclass
class Graph:
    """All layers of a network."""

    nodes: list[Node]
    makers: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[tuple[Node, int]]] = field(default_factory=lambda: defaultdict(list))
    outputs: set[str] = field(default_factory=set)

    def maker(self, tensor: Any) -> Node | None:
        """The layer whose output it is; None for inputs of the network."""
        return self.makers.get(tensor.name)

    def read_by(self, tensor: Any) -> list[tuple[Node, int]]:
        """The layers that read it, and as which input."""
        return self.readers.get(tensor.name, [])

    def order(self) -> dict[str, int]:
        """A number for every tensor that a layer makes, above those of all tensors that it depends on.

        TensorRT's parser lists some layers before what they read.
        """
        numbers: dict[str, int] = {}
        waiting = list(reversed(self.nodes))
        while waiting:
            node = waiting[-1]
            needed = [self.maker(tensor) for tensor in node.inputs if tensor is not None]
            before = [n for n in needed if n is not None and n.outputs[0].name not in numbers]
            if before:
                waiting += before
                continue
            waiting.pop()
            for tensor in node.outputs:
                numbers.setdefault(tensor.name, len(numbers))
        return numbers

    def constant(self, tensor: Any) -> Any:
        """The array of a constant tensor, in its own type and shape; None if it is not one NumPy can show."""
        node = self.maker(tensor)
        while node is not None and node.kind in PASSING:
            if any(extra is not None for extra in node.inputs[1:]):
                return None
            if node.kind == "SHUFFLE" and _moved(node):
                return None
            node = self.maker(node.inputs[0])
        if node is None or node.kind != "CONSTANT":
            return None
        weights = node.layer.weights
        try:
            array = weights if isinstance(weights, np.ndarray) else weights.numpy()
            return array.reshape(tuple(tensor.shape))  # TensorRT has weights as one row of numbers
        except (AttributeError, TypeError, ValueError):  # NumPy has no bfloat16
            return None

    def compute(self, wanted: Any, known: dict[str, Floats]) -> Floats | None:
        """What a tensor is, in float64, where others are `known`.

        Args:
            wanted: a tensor that depends on those and on scalar constants through pointwise layers only.
            known: arrays of one shape, by tensor name.

        Returns:
            An array of that shape; None if something else is in the way.
        """
        if wanted.name in known:
            return known[wanted.name]
        node = self.maker(wanted)
        if node is None:
            return None
        constant = self.constant(wanted)
        if constant is not None:
            return np.asarray(constant, np.float64).reshape(-1)[0] if constant.size == 1 else None
        tables: dict[str, dict[str, Any]]
        tables = {"ELEMENTWISE": _ELEMENTWISE, "UNARY": _UNARY, "ACTIVATION": POINTWISE}
        function = tables.get(node.kind, {}).get(node.operation)
        if function is None:
            return None
        values = [self.compute(tensor, known) for tensor in node.inputs]
        if any(value is None for value in values):
            return None
        with np.errstate(all="ignore"):
            return np.asarray(function(*values), np.float64)


def _moved(node: Node) -> bool:
    """Does a shuffle do more than add or take away dimensions of one element?"""
    before, after = ([n for n in t.shape if n != 1] for t in (node.inputs[0], node.outputs[0]))
    return before != after


def read_graph(trt: Any, network: Any) -> Graph:
    """Index a network.

    Args:
        trt: the tensorrt module.
        network: TensorRT's INetworkDefinition.
    """
    graph = Graph([])
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).rpartition(".")[
            2
        ]  # before its class is changed: IActivationLayer.type is another
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        node = Node(kind, layer, inputs, outputs)
        if kind in _CLASSES and hasattr(trt, _CLASSES[kind]):
            layer.__class__ = getattr(trt, _CLASSES[kind])
        if kind in ("ELEMENTWISE", "UNARY"):
            node.operation = str(layer.op).rpartition(".")[2]
        elif kind == "ACTIVATION":
            node.operation = str(layer.type).rpartition(".")[2]
        graph.nodes.append(node)
        for tensor in outputs:
            graph.makers[tensor.name] = node
        for place, tensor in enumerate(inputs):
            if tensor is not None:
                graph.readers[tensor.name].append((node, place))
    graph.outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    return graph
