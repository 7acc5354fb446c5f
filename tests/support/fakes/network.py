"""TensorRT's network API as far as plugin_products.py uses it, in NumPy.

Nothing here is invented about what TensorRT's parser makes of a graph: `replay` follows a description of a
network that TensorRT for RTX parsed (tests/data/networks; tests/support/probes/rtx_network.py wrote it, and
tests/building/test_rtx_network.py compares it with a new one). Plugins only remember their fields, and
networks are evaluated in float64 by the definitions of their layers. It proves orchestration only: that
TensorRT computes such a network is not shown here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from support.oracles.packed_weights import unpacked


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
    axes = property(lambda self: self.own["axes"])
    epsilon = property(lambda self: self.own["epsilon"])


class Registry:
    def __init__(self, found: bool = True, accepts: bool = True) -> None:
        self.found, self.accepts = found, accepts

    def get_plugin_creator(self, name: str, version: str, namespace: str) -> Any:
        assert (name, version, namespace) == ("DijiangLinear", "1", "dijiang")
        return self if self.found else None

    get_creator = get_plugin_creator

    def create_plugin(self, name: str, fields: list[Any], *phase: str) -> Any:
        assert phase in ((), ("TensorRTPhase.BUILD",))
        return {field[0]: field[1] for field in fields} if self.accepts else None


class Trt:
    """The module."""

    LayerType = Enum("LayerType")
    PluginFieldType = Enum("PluginFieldType")
    TensorRTPhase = Enum("TensorRTPhase")
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


_POINTWISE: dict[str, Callable[..., Any]] = {
    "SUM": np.add, "PROD": np.multiply, "SUB": np.subtract, "DIV": np.divide, "POW": np.power,
    "MAX": np.maximum, "MIN": np.minimum, "FLOOR_DIV": np.floor_divide, "RECIP": np.reciprocal,
    "ERF": np.vectorize(math.erf, otypes=[float]), "SQRT": np.sqrt, "NEG": np.negative, "EXP": np.exp,
    "RELU": lambda x: np.maximum(x, 0), "SIGMOID": lambda x: 1 / (1 + np.exp(-x)), "TANH": np.tanh,
}  # fmt: skip


class Network:
    """INetworkDefinition of a step graph, of TensorRT 8.6."""

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
        named = [(n or f"{label}_output", s) for n, s in zip(names, shapes, strict=True)]
        outputs = [self.tensors.get(n) or Tensor(n, s) for n, s in named]
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
            packed = plugin.get("output_width")
            widths[output] = inputs[place + 1].shape[0] if packed is None else int(packed[output])
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


class ModernNetwork(Network):
    """Of TensorRT 10 and 11."""

    def add_plugin_v3(
        self, inputs: list[Tensor], shape_inputs: list[Tensor], plugin: dict[str, Any]
    ) -> ILayer:
        assert shape_inputs == []
        return self.add_plugin_v2(inputs, plugin)


def _run(layer: ILayer, values: list[Any]) -> list[Any]:
    own = layer.own
    if "weights" in own:
        return [own["weights"]]
    if layer.kind == "SHUFFLE" and "function" not in own:
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
    if "stored" in own:
        return [np.asarray(values[0], np.float64) @ _stored(values[1], values[2]).T]
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
    for t, bias in enumerate(fields["term_bias"]):
        x, words = np.asarray(next(rest), np.float64), next(rest)
        assert words.dtype == np.int32
        terms.append((x, _weight(fields, t, words, x.shape[-1]), next(rest) if bias else 0))
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


def _stored(words: Any, scales: Any) -> Any:
    """Weights as a bundle has them: docs/bundle-format.md."""
    u = np.ascontiguousarray(words).view(np.uint8)
    if words.shape[2] == 4:
        u = np.stack([u & 15, u >> 4], -1).reshape(*u.shape[:2], 32)
    q = u.astype(np.float64) - (8 if words.shape[2] == 4 else 128)
    return (q * scales.astype(np.float64)[..., None]).reshape(len(words), -1)


def _weight(fields: dict[str, Any], term: int, words: Any, inner: int) -> Any:
    if "term_weight_format" not in fields:
        return words.view(np.float16).astype(np.float64)
    width = int(fields["output_width"][fields["term_output"][term]])
    form = {1: "int8", 2: "int4"}[int(fields["term_weight_format"][term])]
    q, scales = unpacked(form, words.reshape(-1).view(np.uint8), width, inner)
    return (q * scales)[:width, :inner]


def _activated(activation: int, sums: list[Any]) -> Any:
    x = sums[0] if activation == 5 else sum(sums)
    if activation == 2:
        return x * (1 + _POINTWISE["ERF"](x / 2**0.5)) / 2
    if activation == 3:
        return x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    silu = x * _POINTWISE["SIGMOID"](x)
    return {0: x, 1: np.maximum(x, 0), 4: silu, 5: silu * sums[-1]}[activation]


# -- as a parser made it -----------------------------------------------------------------------------


def replay(document: dict[str, Any], arrays: dict[str, Any]) -> Network:
    """The network that tests/support/probes/rtx_network.py described, layer by layer.

    Args:
        document: of a graph that TensorRT for RTX parsed.
        arrays: the graph's initializers, by their names, which the parser gives to its constants.
    """
    network = ModernNetwork()
    made = [tensor for layer in document["layers"] for tensor in layer["outputs"]]
    for tensor in [*document["inputs"], *made]:  # first, because some layers come before what they read
        network.tensors[tensor["name"]] = Tensor(tensor["name"], tuple(tensor["shape"]))
    for layer in document["layers"]:
        inputs = [None if name is None else network.tensors[name] for name in layer["inputs"]]
        names = [tensor["name"] for tensor in layer["outputs"]]
        shapes = [tuple(tensor["shape"]) for tensor in layer["outputs"]]
        network.add(layer["kind"], inputs, shapes, names, **_own(layer, arrays)).name = layer["name"]
    network.outputs = [network.tensors[name] for name in document["outputs"]]
    return network


def _own(layer: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """What the layer holds, and what it computes if that is not in `_run`."""
    kind = layer["kind"]
    if kind == "CONSTANT":
        return {"weights": _constant(layer, arrays)}
    if kind == "MATRIX_MULTIPLY":
        assert (layer["op0"], layer["op1"]) in (("NONE", "NONE"), ("NONE", "TRANSPOSE"))
        return {} if layer["op1"] == "NONE" else {"transposed": True}
    if kind == "NORMALIZATION":
        return {"epsilon": layer["epsilon"], "axes": layer["axes"]}
    if kind == "ACTIVATION":
        return {"op": layer["type"]}
    if kind in ("ELEMENTWISE", "UNARY"):
        return {"op": layer["op"]}
    return {"function": _FUNCTIONS[kind](layer)}


def _constant(layer: dict[str, Any], arrays: dict[str, Any]) -> Any:
    (tensor,) = layer["outputs"]
    kind = {"HALF": np.float16, "FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}[tensor["dtype"]]
    if layer["name"] in arrays:
        array = arrays[layer["name"]]
        assert array.dtype == kind, (
            f"{layer['name']}: TensorRT has {tensor['dtype']}, the graph {array.dtype}"
        )
    else:
        array = np.array(layer["values"], kind)
    return array.reshape(tensor["shape"])


def _attention(layer: dict[str, Any]) -> Callable[..., list[Any]]:
    """Any function of all that may change."""
    width = layer["outputs"][0]["shape"][-1]

    def attention(qkv: Any, gate: Any, past: Any, *_: Any) -> list[Any]:
        q = np.asarray(qkv, np.float64)[..., :width]
        return [np.tanh(q) * gate + qkv.mean(-1, keepdims=True), past + q.mean()]

    return attention


def _reduced(layer: dict[str, Any]) -> Callable[..., list[Any]]:
    assert (layer["op"], layer["keep_dims"]) == ("AVG", True)
    axes = tuple(axis for axis in range(8) if layer["axes"] >> axis & 1)
    return lambda x: [np.asarray(x, np.float64).mean(axes, keepdims=True)]


def _sliced(layer: dict[str, Any]) -> Callable[..., list[Any]]:
    (start,), (size,), (stride,) = layer["start"], layer["shape"], layer["stride"]
    return lambda x: [x[start : start + size * stride : stride]]


def _reshaped(layer: dict[str, Any]) -> Callable[..., list[Any]]:
    unmoved = list(range(8))
    assert layer["first_transpose"] == layer["second_transpose"] == unmoved
    given = layer["reshape_dims"]
    return lambda x, *shape: [np.reshape(x, [int(n) for n in shape[0]] if shape else given)]


_FUNCTIONS: dict[str, Callable[[dict[str, Any]], Callable[..., list[Any]]]] = {
    "PLUGIN_V3": _attention, "REDUCE": _reduced, "SLICE": _sliced, "SHUFFLE": _reshaped,
    "CAST": lambda layer: lambda x: [x],
    "SHAPE": lambda layer: lambda x: [np.array(x.shape)],
    "SQUEEZE": lambda layer: lambda x, *_: [np.squeeze(x)],
    "UNSQUEEZE": lambda layer: lambda x, axes: [np.expand_dims(x, tuple(int(a) for a in axes))],
    "CONCATENATION": lambda layer: lambda *parts: [np.concatenate(parts, layer["axis"])],
    "FILL": lambda layer: lambda size, start, step: [start + step * np.arange(int(size[0]))],
    "GATHER": lambda layer: lambda table, ids: [np.take(table, np.asarray(ids, np.int64), layer["axis"])],
}  # fmt: skip
