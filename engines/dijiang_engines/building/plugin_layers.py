"""Layers of this project's plugins in a network of TensorRT's, whichever version's."""

from __future__ import annotations

from typing import Any

from dijiang_engines.errors import RunnerError
from dijiang_engines.op_contract import DOMAIN

VERSION = "1"
"""Of all of them: plans name it, so it never changes."""


def add_plugin(
    trt: Any, network: Any, name: str, inputs: list[Any], values: dict[str, Any], kept: list[Any]
) -> Any:
    """Add a layer.

    Args:
        trt: the tensorrt module, with the plugin registered.
        network: TensorRT's INetworkDefinition.
        name: the plugin's.
        inputs: the layer's.
        values: its fields, arrays of int32 or float32.
        kept: gets what must live until the engine is built.

    Raises:
        RunnerError: the plugin is not registered, or refuses the fields.
    """
    kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
    fields = [trt.PluginField(field, value, kinds[str(value.dtype)]) for field, value in values.items()]
    collection = trt.PluginFieldCollection(fields)
    kept += [values, fields, collection]
    registry = trt.get_plugin_registry()
    modern = hasattr(network, "add_plugin_v3")
    find = registry.get_creator if modern else registry.get_plugin_creator
    creator = find(name, VERSION, DOMAIN)
    if creator is None:
        raise RunnerError(
            f"the plugin {name} is not registered",
            hint="build the plugin again: `dijiang-export build-plugin`",
        )
    if modern:
        plugin = _create_v3(trt, creator, name, collection)
    else:
        plugin = creator.create_plugin(name, collection)
    if plugin is None:
        raise RunnerError(f"the plugin {name} refuses a layer; the builder's log says why")
    kept.append(plugin)
    return network.add_plugin_v3(inputs, [], plugin) if modern else network.add_plugin_v2(inputs, plugin)


def add_constant(trt: Any, network: Any, array: Any, kept: list[Any]) -> Any:
    """A constant's tensor; `kept` gets the array, which must live until the engine is built."""
    kept.append(array)
    return network.add_constant(array.shape, trt.Weights(array)).get_output(0)


def _create_v3(trt: Any, creator: Any, name: str, collection: Any) -> Any:
    """From 10 on a creator is told what the plugin is for."""
    return creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)
