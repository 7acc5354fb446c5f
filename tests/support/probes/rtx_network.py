"""Parse an ONNX graph with TensorRT for RTX, which needs no GPU: `rtx_network.py SITE GRAPH.onnx OUT.json`.

OUT gets what the parser made, and with `--products` also what plugin_products.py finds in it; with
`--prefill` as in a plan that reads prompts. SITE holds the unpacked wheels tensorrt_rtx_cu13_bindings and
tensorrt_rtx_cu13_libs. The plugin DijiangAttention is stood in for by one that knows its fields and its
shapes. A process of its own: when the parser meets a plugin it opens libtensorrt_rtx.so by that name, which
the wheel does not have, and ends the process if it cannot (`environment`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

LIBRARY = "libtensorrt_rtx.so"
SMALL = 8
"""Constants of so many elements are written with their values."""

_CLASSES = {
    "ACTIVATION": "IActivationLayer", "CONSTANT": "IConstantLayer", "CAST": "ICastLayer",
    "CONCATENATION": "IConcatenationLayer", "ELEMENTWISE": "IElementWiseLayer", "GATHER": "IGatherLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "NORMALIZATION": "INormalizationLayer",
    "REDUCE": "IReduceLayer", "SHUFFLE": "IShuffleLayer", "SLICE": "ISliceLayer", "UNARY": "IUnaryLayer",
}  # fmt: skip
_ATTRIBUTES = {
    "ACTIVATION": ("type",), "CAST": ("to_type",), "CONCATENATION": ("axis",), "ELEMENTWISE": ("op",),
    "GATHER": ("axis", "mode"), "MATRIX_MULTIPLY": ("op0", "op1"), "NORMALIZATION": ("axes", "epsilon"),
    "REDUCE": ("op", "axes", "keep_dims"), "SHUFFLE": ("first_transpose", "reshape_dims", "second_transpose"),
    "SLICE": ("start", "shape", "stride", "mode"), "UNARY": ("op",),
}  # fmt: skip


def environment(site: Path, links: Path) -> dict[str, str]:
    """What a process needs to run this; `links` is a folder for the library's other name."""
    links.mkdir(parents=True, exist_ok=True)
    link = links / LIBRARY
    if not link.exists():
        link.symlink_to((site / "tensorrt_rtx_libs" / f"{LIBRARY}.1").resolve())
    path = (str(links), os.environ.get("LD_LIBRARY_PATH", ""))
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, path))}


def load(site: Path) -> Any:
    """The bindings' module."""
    sys.path.insert(0, str(site))
    return importlib.import_module("tensorrt_rtx_bindings")


# -- plugins that are only shapes ------------------------------------------------------------------------


def register(trt: Any) -> list[Any]:
    """Register the stand-in for DijiangAttention; what must be kept alive."""
    interfaces = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Attention(*interfaces):  # type: ignore[misc]
        def __init__(self, fields: dict[str, Any]) -> None:
            for interface in interfaces:
                interface.__init__(self)
            self.fields, self.num_outputs = fields, 2
            self.plugin_name, self.plugin_version, self.plugin_namespace = "DijiangAttention", "1", "dijiang"

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, inputs: list[Any]) -> list[Any]:
            return [inputs[0], inputs[2]]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: Any, expressions: Any) -> list[Any]:
            output = trt.DimsExprs(3)
            output[0], output[1] = inputs[0][0], inputs[0][1]
            output[2] = expressions.constant(self.fields["num_heads"] * self.fields["head_dim"])
            return [output, trt.DimsExprs(inputs[2])]

        def supports_format_combination(self, place: int, tensors: list[Any], inputs: int) -> bool:
            return True

        def configure_plugin(self, inputs: Any, outputs: Any) -> None: ...

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def clone(self) -> Any:
            return Attention(self.fields)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = "DijiangAttention", "1", "dijiang"
            kinds = dict.fromkeys(("num_heads", "num_kv_heads", "head_dim", "rotary_dim"), "INT32")
            fields = (kinds | {"epsilon": "FLOAT32"}).items()
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, np.array([]), getattr(trt.PluginFieldType, kind))
                    for name, kind in fields
                ]
            )
            self.made: list[Any] = []

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            self.made.append(Attention({field.name: np.array(field.data)[0].item() for field in fields}))
            return self.made[-1]

    creator = Creator()
    assert trt.get_plugin_registry().register_creator(creator, "dijiang")
    return [creator]


# -- parsing and writing ---------------------------------------------------------------------------------


def parse(trt: Any, graph: Path) -> tuple[Any, list[Any]]:
    """(network, what must be kept alive)."""
    logger = trt.Logger(trt.Logger.ERROR)
    kept = [logger, *register(trt)]
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return network, [*kept, builder, parser]


def describe(trt: Any, network: Any) -> dict[str, Any]:
    """The network as JSON."""
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).rpartition(".")[2]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        described = {
            "name": layer.name, "kind": kind, "inputs": [None if t is None else t.name for t in inputs],
            "outputs": [_tensor(layer.get_output(i)) for i in range(layer.num_outputs)],
        }  # fmt: skip
        if kind in _CLASSES:
            layer.__class__ = getattr(trt, _CLASSES[kind])
        described |= {name: _plain(getattr(layer, name)) for name in _ATTRIBUTES.get(kind, ())}
        if kind == "CONSTANT" and np.asarray(layer.weights).size <= SMALL:
            described["values"] = np.asarray(layer.weights).reshape(-1).tolist()
        layers.append(described)
    return {
        "parser": f"TensorRT for RTX {trt.__version__}",
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [network.get_output(i).name for i in range(network.num_outputs)],
        "layers": layers,
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).rpartition(".")[2], "shape": list(tensor.shape)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (int, float, bool)):
        return value
    try:
        return list(value)
    except TypeError:  # an enumeration's member
        return str(value).rpartition(".")[2]
    except ValueError:  # dimensions that are not known
        return None


def write(document: dict[str, Any], path: Path) -> None:
    """A layer a line, so that a difference is a readable one."""
    lines = ",\n".join("  " + json.dumps(layer) for layer in document["layers"])
    rest = {key: value for key, value in document.items() if key != "layers"}
    path.write_text(json.dumps(rest)[:-1] + ',\n"layers": [\n' + lines + "\n]}\n", encoding="utf-8")


# -- products --------------------------------------------------------------------------------------------


class Layer:
    """An added plugin's."""

    def __init__(self, outputs: list[Any]) -> None:
        self.name, self.outputs = "", outputs

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class WithPlugins:
    """The network with the method that TensorRT for RTX's bindings lack.

    What the plugin would give is stood in for by constants of its shape: so layers of the real network get
    new inputs, and refuse those that do not fit.
    """

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.network = trt, network
        self.launches: list[dict[str, Any]] = []
        self.kept: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], fields: dict[str, Any]) -> Any:
        self.launches.append({name: value.tolist() for name, value in fields.items()})
        place, widths = 0, {}
        for output, bias in zip(fields["term_output"], fields["term_bias"], strict=True):
            widths[int(output)] = inputs[place + 1].shape[0]
            place += 2 + (bias != 0)
        return Layer([self.stand_in(widths[o]) for o in sorted(widths)])

    def stand_in(self, width: int) -> Any:
        array = np.zeros((1, 1, width), np.float16)
        self.kept.append(array)
        return self.network.add_constant(array.shape, self.trt.Weights(array)).get_output(0)


def products(trt: Any, network: Any, few: bool) -> dict[str, Any]:
    """What `plugin_products.rewrite` did to a really parsed network."""
    from dijiang_engines.building.plugin_products import rewrite

    changed = WithPlugins(trt, network)
    creator = SimpleNamespace(
        create_plugin=lambda name, fields, phase: {f.name: np.array(f.data) for f in fields}
    )
    registry = SimpleNamespace(get_creator=lambda name, version, namespace: creator)
    with mock.patch.object(trt, "get_plugin_registry", return_value=registry):
        done = rewrite(trt, changed, norms=few, whole=not few)
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return done.to_json() | {"fields": changed.launches, "outputs": [_tensor(t) for t in outputs]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(",")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--prefill", action="store_true")
    options = parser.parse_args()
    trt = load(options.site)
    network, kept = parse(trt, options.graph)
    document = describe(trt, network)
    if options.products:
        document["products"] = products(trt, network, not options.prefill)
    write(document, options.out)
    del network, kept
    return 0


if __name__ == "__main__":
    sys.exit(main())
