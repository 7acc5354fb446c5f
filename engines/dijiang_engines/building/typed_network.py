"""TensorRT 8.6 only: hold the builder to the types that a float16 graph has.

8.6 has no strongly typed networks: its parser reports float32 for every tensor between layers, its FP16 flag
lets the builder run any layer in either type, and without constraints a normalisation's sums may become
float16 too. So matrix products are constrained to float16, normalisations and the logits' cast to float32.

Which other layers are held decides how the builder fuses, and some fusions of 8.6 are broken: the plan is
made, and no execution context can be made of it. So there are several `ATTEMPTS`, of which the first that
works counts.
"""

from __future__ import annotations

from typing import Any

_NORM = "norm/"
"""Part of the names that the exporter gives to the layers of an RMSNorm. LayerNorm is one layer of TensorRT
that computes in float32 whatever the flags are, unless told otherwise (NvInfer.h, setComputePrecision)."""

_EMBEDDING = "embed"
"""Likewise of the layers that look rows of embeddings up. No other lookup is held: tables are float32."""

HELD = {
    "embeddings": ("MATRIX_MULTIPLY", "GATHER"),
    "products": ("MATRIX_MULTIPLY",),
    "arithmetic": ("MATRIX_MULTIPLY", "ELEMENTWISE", "UNARY", "ACTIVATION"),
}
"""Kinds of layers that are held to float16, by the name that the engine's manifest has for them."""

ATTEMPTS = (("products", "obey"), ("arithmetic", "obey"), ("arithmetic", "prefer"))
"""What is held, and whether the builder must obey or may prefer another type; the fastest steps first."""

PLUGIN_ATTEMPTS = (("embeddings", "obey"), *ATTEMPTS)
"""Likewise where norms and products are the plugin's, so that little else is left: without the first, 8.6
looked embeddings up in float32, which kept them in memory at twice their size and cost a copy."""


def type_network(trt: Any, network: Any, held: str = "products") -> dict[str, int]:
    """Constrain the layers of a parsed float16 network.

    Args:
        trt: the tensorrt module.
        network: TensorRT's INetworkDefinition.
        held: a key of HELD.

    Returns:
        How many layers were held to which type.
    """
    numbers = (trt.DataType.FLOAT, trt.DataType.HALF)
    kinds = [getattr(trt.LayerType, name) for name in HELD[held]]
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    count = {"float16": 0, "float32": 0}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs == 0 or layer.get_output(0).dtype not in numbers:
            continue
        if layer.get_output(0).name in outputs and layer.type != trt.LayerType.PLUGIN_V2:
            layer.set_output_type(0, trt.DataType.FLOAT)
            count["float32"] += 1
        elif _NORM in layer.name and layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHUFFLE):
            layer.precision = trt.DataType.FLOAT
            count["float32"] += 1
        elif layer.type in kinds and (layer.type != trt.LayerType.GATHER or _EMBEDDING in layer.name):
            layer.precision = trt.DataType.HALF
            layer.set_output_type(0, trt.DataType.HALF)
            count["float16"] += 1
    return count


def fix_sizes(network: Any, profiles: list[dict[str, list[list[int]]]]) -> int:
    """Make input dimensions static that have one size in all profiles; how many tensors became static.

    The builder finds better kernels for a network without dynamic dimensions than for one whose profile
    happens to allow a single size.
    """
    static = 0
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [set() for _ in tensor.shape]  # type: list[set[int]]
        for shapes in profiles:
            for shape in shapes[tensor.name]:
                for found, size in zip(sizes, shape, strict=True):
                    found.add(size)
        tensor.shape = tuple(next(iter(found)) if len(found) == 1 else -1 for found in sizes)
        static += all(len(found) == 1 for found in sizes)
    return static
