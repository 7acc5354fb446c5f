"""TensorRT's network API as far as step_products.py uses it, in NumPy.

Networks as 8.6's parser makes them of ONNX, plugins that only remember their fields, and an evaluation in
float64 by the definitions of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir


class Enum:
    """An enumeration of TensorRT's bindings: its members print as Kind.NAME."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> str:
        return f"{self._kind}.{name}"


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...] = ()) -> None:
        self.name, self.shape = name, shape


class ILayer:
    def __init__(self, kind: str, name: str, inputs: list[Any], outputs: list[Tensor]) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.compute: Callable[..., Any] | None = None
        self.kind = kind
        self.own: dict[str, Any] = {}

    type: Any = property(lambda self: f"LayerType.{self.kind}")
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def set_input(self, index: int, tensor: Tensor) -> None:
        self.inputs[index] = tensor


class IConstantLayer(ILayer):
    weights = property(lambda self: self.own["weights"].reshape(-1))  # as TensorRT: numbers without a shape


class IMatrixMultiplyLayer(ILayer):
    op0 = "MatrixOperation.NONE"
    op1 = property(lambda self: "MatrixOperation." + ("TRANSPOSE" if "transposed" in self.own else "NONE"))


class IElementWiseLayer(ILayer):
    op = property(lambda self: "ElementWiseOperation." + self.own["op"])


class IUnaryLayer(ILayer):
    op = property(lambda self: "UnaryOperation." + self.own["op"])


class IActivationLayer(ILayer):
    type = property(lambda self: "ActivationType." + self.own["op"])


class INormalizationLayer(ILayer):
    axes = 1 << 2
    epsilon = property(lambda self: self.own["epsilon"])


class Registry:
    def __init__(self, found: bool = True, accepts: bool = True) -> None:
        self.found, self.accepts = found, accepts

    def get_plugin_creator(self, name: str, version: str, namespace: str) -> Any:
        assert (name, version, namespace) == ("DijiangLinear", "1", "dijiang")
        return self if self.found else None

    def create_plugin(self, name: str, fields: list[Any]) -> Any:
        return {field[0]: field[1] for field in fields} if self.accepts else None


class Trt:
    """The module."""

    LayerType = Enum("LayerType")
    PluginFieldType = Enum("PluginFieldType")
    IConstantLayer, IMatrixMultiplyLayer, IElementWiseLayer = (
        IConstantLayer,
        IMatrixMultiplyLayer,
        IElementWiseLayer,
    )
    IUnaryLayer, IActivationLayer, INormalizationLayer = IUnaryLayer, IActivationLayer, INormalizationLayer

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = registry or Registry()

    def get_plugin_registry(self) -> Registry:
        return self.registry

    Weights: Any = staticmethod(lambda array: array)
    PluginFieldCollection: Any = staticmethod(list)

    @staticmethod
    def PluginField(name: str, data: Any, kind: str) -> tuple[str, Any, str]:
        assert kind == "PluginFieldType." + {"int32": "INT32", "float32": "FLOAT32"}[str(data.dtype)]
        return name, data, kind


_ELEMENTWISE = {"Add": "SUM", "Mul": "PROD", "Sub": "SUB", "Div": "DIV", "Pow": "POW"}
_UNARY = {"Erf": "ERF", "Sqrt": "SQRT", "Neg": "NEG", "Exp": "EXP"}
_ACTIVATION = {"Relu": "RELU", "Sigmoid": "SIGMOID", "Tanh": "TANH"}
_POINTWISE: dict[str, Callable[..., Any]] = {
    "SUM": np.add, "PROD": np.multiply, "SUB": np.subtract, "DIV": np.divide, "POW": np.power,
    "ERF": np.vectorize(math.erf, otypes=[float]), "SQRT": np.sqrt, "NEG": np.negative, "EXP": np.exp,
    "RELU": lambda x: np.maximum(x, 0), "SIGMOID": lambda x: 1 / (1 + np.exp(-x)), "TANH": np.tanh,
}  # fmt: skip


class Network:
    """INetworkDefinition of a step graph."""

    def __init__(self) -> None:
        self.layers: list[ILayer] = []
        self.outputs: list[Tensor] = []
        self.tensors: dict[str, Tensor] = {}

    num_layers = property(lambda self: len(self.layers))
    num_outputs = property(lambda self: len(self.outputs))

    def get_layer(self, index: int) -> ILayer:
        layer = self.layers[index]  # the bindings show every layer as an ILayer first
        layer.__class__ = ILayer
        return layer

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    def add(
        self, kind: str, inputs: list[Any], shapes: list[tuple[int, ...]], names: list[str], **own: Any
    ) -> ILayer:
        label = f"(Unnamed Layer* {len(self.layers)}) [{kind}]"
        outputs = [Tensor(n or f"{label}_output", s) for n, s in zip(names, shapes, strict=True)]
        self.layers.append(ILayer(kind, label, inputs, outputs))
        self.layers[-1].own = own
        self.tensors |= {tensor.name: tensor for tensor in outputs}
        return self.layers[-1]

    def constant(self, array: Any, name: str = "") -> Tensor:
        return self.add("CONSTANT", [], [array.shape], [name], weights=array).outputs[0]

    def shuffled(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self.add("SHUFFLE", [tensor], [shape], [""]).outputs[0]

    def add_constant(self, shape: tuple[int, ...], weights: Any) -> ILayer:
        assert weights.shape == shape and weights.flags["C_CONTIGUOUS"]
        self.constant(weights)
        return self.layers[-1]

    def add_plugin_v2(self, inputs: list[Tensor], plugin: dict[str, Any]) -> ILayer:
        widths = {}
        place = 0
        for output, bias in zip(plugin["term_output"], plugin["term_bias"], strict=True):
            widths[output] = inputs[place + 1].shape[0]
            place += 2 + bias
        shapes = [(*inputs[0].shape[:-1], widths[o]) for o in range(len(plugin["output_norm"]))]
        names = [f"linear.{len(self.layers)}.{o}" for o in range(len(shapes))]
        return self.add("PLUGIN_V2", list(inputs), shapes, names, linear=plugin)

    # -- evaluation ----------------------------------------------------------------------------------

    def evaluate(self, given: dict[str, Any]) -> list[Any]:
        """The outputs in float64; layers that no output needs are not looked at."""
        makers = {tensor.name: layer for layer in self.layers for tensor in layer.outputs}
        known = dict(given)

        def value(tensor: Tensor) -> Any:
            if tensor.name not in known:
                layer = makers[tensor.name]
                results = _run(layer, [None if t is None else value(t) for t in layer.inputs])
                known.update({out.name: result for out, result in zip(layer.outputs, results, strict=True)})
            return known[tensor.name]

        return [value(tensor) for tensor in self.outputs]


def _run(layer: ILayer, values: list[Any]) -> list[Any]:
    own = layer.own
    if "weights" in own:
        return [own["weights"]]
    if layer.kind == "SHUFFLE":
        return [values[0].reshape(layer.outputs[0].shape)]
    if "op" in own:
        return [_POINTWISE[own["op"]](*(np.asarray(v, np.float64) for v in values))]
    if layer.kind == "MATRIX_MULTIPLY":
        second = np.asarray(values[1], np.float64)
        return [np.asarray(values[0], np.float64) @ (second.T if "transposed" in own else second)]
    if layer.kind == "NORMALIZATION":
        return [_norm(values[0], values[1], values[2], own["epsilon"], centred=True)]
    if "linear" in own:
        return _linear(own["linear"], values)
    results: list[Any] = own["function"](*values)
    return results


def _norm(x: Any, weight: Any, bias: Any, epsilon: float, *, centred: bool) -> Any:
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * np.asarray(weight, np.float64) + bias


def _linear(fields: dict[str, Any], values: list[Any]) -> list[Any]:
    """plugins/include/dijiang/linear.h, without its roundings."""
    rest = iter(values)
    terms = []
    for bias in fields["term_bias"]:
        x, packed = next(rest), next(rest)
        assert packed.dtype == np.int32
        terms.append(
            (np.asarray(x, np.float64), packed.view(np.float16).astype(np.float64), next(rest) if bias else 0)
        )
    results = []
    for o, norm in enumerate(fields["output_norm"]):
        mine = [term for term, output in zip(terms, fields["term_output"], strict=True) if output == o]
        if norm:
            weight = next(rest)
            shift = next(rest) if fields["output_norm_bias"][o] else 0.0
            epsilon = float(fields["output_epsilon"][o])
            mine = [(_norm(x, weight, shift, epsilon, centred=norm == 1), w, b) for x, w, b in mine]
        sums = [x @ w.T + b for x, w, b in mine]
        y = _activated(int(fields["output_activation"][o]), sums)
        results.append(y + next(rest) if fields["output_residual"][o] else y)
    assert next(rest, None) is None
    return results


def _activated(activation: int, sums: list[Any]) -> Any:
    x = sums[0] if activation == 5 else sum(sums)
    if activation == 2:
        return x * (1 + _POINTWISE["ERF"](x / 2**0.5)) / 2
    if activation == 3:
        return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    silu = x * _POINTWISE["SIGMOID"](x)
    return {0: x, 1: np.maximum(x, 0), 4: silu, 5: silu * sums[-1]}[activation]


# -- from ONNX ---------------------------------------------------------------------------------------


def parse(model: ir.Model) -> Network:
    """As TensorRT 8.6's parser does: constants are shuffled to the rank of what they meet."""
    network = Network()
    arrays = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    ranks: dict[str, int] = {}
    for value in model.graph.inputs:
        network.tensors[str(value.name)] = Tensor(str(value.name))
    for name, array in arrays.items():
        network.constant(array, str(name))
    for node in model.graph:
        inputs = [None if v is None else network.tensors[str(v.name)] for v in node.inputs]
        names = [str(v.name) for v in node.outputs]
        kind = node.op_type
        shapes = [tuple(d if isinstance(d, int) else -1 for d in (v.shape or ())) for v in node.outputs]
        ranks.update(zip(names, map(len, shapes), strict=True))

        def met(tensor: Any, rank: int) -> Any:
            if tensor.name not in arrays or len(tensor.shape) >= rank:
                return tensor
            return network.shuffled(tensor, (1,) * (rank - len(tensor.shape)) + tensor.shape)

        rank = max([len(s) for s in shapes] + [len(t.shape) for t in inputs if t is not None])
        if kind == "MatMul":
            network.add("MATRIX_MULTIPLY", [met(t, rank) for t in inputs], shapes, names)
        elif kind == "Gemm":  # of a tied head: the second matrix is transposed
            assert len(inputs) == 2 and node.attributes["transB"].as_int() == 1
            network.add("MATRIX_MULTIPLY", inputs, shapes, names, transposed=True)
        elif kind in _ELEMENTWISE:
            network.add("ELEMENTWISE", [met(t, rank) for t in inputs], shapes, names, op=_ELEMENTWISE[kind])
        elif kind in _UNARY:
            network.add("UNARY", inputs, shapes, names, op=_UNARY[kind])
        elif kind in _ACTIVATION:
            network.add("ACTIVATION", inputs, shapes, names, op=_ACTIVATION[kind])
        elif kind == "LayerNormalization":
            epsilon = node.attributes["epsilon"].as_float()
            network.add(
                "NORMALIZATION", [inputs[0], *(met(t, 3) for t in inputs[1:])], shapes, names, epsilon=epsilon
            )
        else:
            network.add(kind.upper(), inputs, shapes, names, function=_other(node))
    network.outputs = [network.tensors[str(v.name)] for v in model.graph.outputs]
    return network


def _other(node: ir.Node) -> Callable[..., list[Any]]:
    kind = node.op_type
    if kind == "Gather":
        return lambda table, ids: [np.asarray(table, np.float64)[np.asarray(ids, np.int64)]]
    if kind == "Cast":
        return lambda x: [x]
    if kind == "ReduceMean":
        return lambda x, *_: [np.asarray(x, np.float64).mean(-1, keepdims=True)]
    simple: dict[str, Callable[..., Any]] = {
        "Unsqueeze": lambda x, axes: np.expand_dims(x, tuple(int(a) for a in axes)),
        "Squeeze": lambda x, *axes: np.squeeze(x),
        "Reshape": lambda x, shape: x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)]),
        "Shape": lambda x: np.array(x.shape)[_part(node)],
        "Range": lambda first, end, step: np.arange(int(first), int(end), int(step)),
        "Clip": lambda x, least, *most: np.clip(x, least, *(most or [None])),
        "Concat": lambda *parts: np.concatenate([np.atleast_1d(part) for part in parts]),
        "Reciprocal": lambda x: 1 / np.asarray(x, np.float64),
    }
    if kind in simple:
        return lambda *values: [simple[kind](*values)]
    if kind == "DijiangAttention":  # any function of all that may change
        heads, d = (node.attributes[n].as_int() for n in ("num_heads", "head_dim"))

        def attention(qkv: Any, gate: Any, past: Any, *_: Any) -> list[Any]:
            q = np.asarray(qkv, np.float64)[..., : heads * d]
            return [np.tanh(q) * gate + qkv.mean(-1, keepdims=True), past + q.mean()]

        return attention

    def missing(*_: Any) -> list[Any]:
        raise NotImplementedError(kind)

    return missing


def _part(node: ir.Node) -> slice:
    """Which dimensions a Shape node gives."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return slice(start.as_int() if start else None, end.as_int() if end else None)
