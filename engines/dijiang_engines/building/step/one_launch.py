"""A step plan's network of one layer: the plugin DijiangStep stands for everything between token and logits.

Inputs and outputs are those of the bundle's step graph (`io_names`), so nothing that runs a plan can tell.
TensorRT is not given the graph to parse: all that would remain of it is their names, and its parser would
hold, and in 8.6 widen, weights that are then thrown away. What the layer reads besides is constant: weights
packed for this GPU, the embedding, with its scales if it is quantised, and learned positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dijiang_engines.building.plugin_layers import add_constant, add_plugin
from dijiang_engines.building.step.packing import StepConstants, pack_step
from dijiang_engines.building.step.tensors import StepTensors
from dijiang_engines.io_names import INPUT_IDS, LOGITS, POSITIONS, SEQ_LENS, past_state, present_state
from dijiang_engines.kernels.step import StepKernels, StepModel
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix

NAME = "DijiangStep"
_NOT_FIELDS = ("reserved", "quantised", "head_format", "embedding_format", "int8_matrices")
"""Of dijiang_step_model: the formats of quantised weights are one field, `weight_formats`."""


@dataclass(frozen=True)
class OneLaunch:
    """What became of a step."""

    blocks: int
    packed_bytes: int
    kept: list[Any]
    """What must live until the engine is built."""

    def to_json(self) -> dict[str, int]:
        """For the engine's manifest."""
        return {"launches": 1, "blocks": self.blocks, "packed_bytes": self.packed_bytes}


def add_step(
    trt: Any,
    network: Any,
    spec: ModelSpec,
    dtype: str,
    rows: int,
    kernels: StepKernels,
    cuda: Cuda,
    graph: Any,
    quantised: Mapping[str, Sequence[Matrix]] | None = None,
) -> OneLaunch:
    """Make an empty network a step's.

    Args:
        trt: the tensorrt module, with the plugin registered.
        network: TensorRT's INetworkDefinition, with nothing in it.
        spec: the model.
        dtype: of its weights, or of what is not quantised.
        rows: sequences of the largest step.
        kernels: the plugin's library.
        cuda: the GPU that is built for.
        graph: step.trt.onnx, weights.data beside it.
        quantised: None, or canonical name -> stored matrices (`Quantisation.parts` of the bundle's manifest).

    Raises:
        KernelError: the kernel has no step for this model, so many rows or this GPU.
        RunnerError, BundleError: the weights are not the model's, do not fit, or the plugin refuses them.
    """
    model = StepModel.of(spec, dtype, quantised)
    constants = pack_step(kernels, cuda, model, StepTensors(graph, spec, dtype, quantised), rows)
    kept: list[Any] = []
    inputs = _inputs(trt, network, spec)
    for array in (
        constants.packed, constants.embedding, constants.embedding_scales, constants.position_embedding,
    ):  # fmt: skip
        if array is not None:
            inputs.append(add_constant(trt, network, array, kept))
    layer = add_plugin(trt, network, NAME, inputs, fields(model, rows, constants), kept)
    layer.name = NAME
    names = [LOGITS, *(present_state(index) for index in range(spec.num_layers))]
    for index, name in enumerate(names):
        tensor = layer.get_output(index)
        tensor.name = name
        network.mark_output(tensor)
    return OneLaunch(constants.size.blocks, constants.size.packed, kept)


def fields(model: StepModel, rows: int, constants: StepConstants) -> dict[str, Any]:
    """The plugin's, by name (docs/tensorrt-plugin.md)."""
    struct = model.struct()
    values = {name: getattr(struct, name) for name, *_ in struct._fields_ if name not in _NOT_FIELDS}
    values |= {"rows": rows, "blocks": constants.size.blocks}
    made = {n: np.array([v], np.float32 if isinstance(v, float) else np.int32) for n, v in values.items()}
    if model.quantised:
        formats = [struct.head_format, struct.embedding_format, *model.int8_matrices]
        made["weight_formats"] = np.array(formats, np.int32)
    return made


def _inputs(trt: Any, network: Any, spec: ModelSpec) -> list[Any]:
    """Those of the step graph, in its order; a parser of 8.6 has int32 where the graph has int64."""
    integer = getattr(trt.DataType, "INT64", trt.DataType.INT32)
    found = [network.add_input(INPUT_IDS, integer, (-1, 1))]
    found += [network.add_input(name, integer, (-1,)) for name in (POSITIONS, SEQ_LENS)]
    return found + [
        network.add_input(past_state(layer), trt.DataType.FLOAT, (-1, *spec.state_shape))
        for layer in range(spec.num_layers)
    ]
