"""A step plan's network of one plugin layer as TensorRT is given it, packed and computed on the host.

`make` puts a random model's step into a network that only remembers, through the product's own code: graph
and weights are files, packing is the project's own on fake CUDA memory. `computed` runs the kernel, compiled
for the host (tests/kernels/step_emulation), on nothing but what the network holds. Of TensorRT it proves
orchestration only: that it takes such a layer is shown elsewhere.
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
from support.fakes import cuda as fake_cuda
from support.makers.random_models import random_model, traced
from support.quantised_models import formats_of, quantise_model
from support.step_models import EmulatedKernels, torch_dtype

from dijiang_engines.building.step.one_launch import add_step
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.library import Device
from dijiang_engines.kernels.step import StepModel, StepSize
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.spec import ModelSpec
from dijiang_export.graph import lower, weights
from dijiang_export.graph.quantised import Quantiser
from dijiang_export.quantise.recipe import Recipe
from dijiang_export.reference.model import ReferenceModel


class OnAStream(EmulatedKernels):
    """Packs when its stream gets to it, as a GPU does, and for a device that is described."""

    device: Device | None = None

    def step_size(self, model: StepModel, rows: int, device: Device | None = None) -> StepSize:
        return super().step_size(model, rows, device or self.device)

    def call(self, name: str, *arguments: Any) -> None:
        if not name.startswith("dijiang_step_pack"):
            super().call(name, *arguments)
            return
        *rest, stream = arguments
        fake_cuda.DEVICE.stream(stream).enqueue(lambda: super(OnAStream, self).call(name, *rest, 0))


def write_graph(
    folder: Path, spec: ModelSpec, model: ReferenceModel, dtype: str, kind: str | None = None
) -> Path:
    """step.trt.onnx and weights.data, as the exporter writes them; `kind`: of `STORED_KINDS`."""
    graph = traced(spec, torch_dtype(dtype), "step")
    recipe = None if kind is None else Recipe("int4", formats_of(spec, kind))
    layout = places = weights.layout_of(spec, torch_dtype(dtype), recipe)
    if recipe is not None:
        places = Quantiser(graph, recipe, layout, "plugin", "float").run()
    lower.lower_to_tensorrt(graph)
    state = model.state_dict()
    source: Any = SimpleNamespace(row_blocks=lambda name, most=0: [(0, state[name])])
    extra = {"inv_freq": model.get_buffer("inv_freq")}
    weights.write(folder / weights.FILE_NAME, layout, source, extra, recipe, on_bytes=lambda count: None)
    weights.attach(graph.graph, places, folder)
    ir.save(graph, folder / "step.trt.onnx")
    return folder / "step.trt.onnx"


# -- a network -----------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Tensor:
    name: str
    kind: str = ""
    shape: tuple[int, ...] = ()
    array: Any = None


class Network:
    """INetworkDefinition of TensorRT 8.6, as far as a step of one layer takes it."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Any] = []

    def add_input(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        self.inputs.append(Tensor(name, kind, shape))
        return self.inputs[-1]

    def add_constant(self, shape: tuple[int, ...], array: Any) -> Any:
        assert array.shape == shape and array.flags["C_CONTIGUOUS"] and array.dtype == np.int32
        tensor = Tensor("constant", array=array)
        return SimpleNamespace(get_output=lambda index: [tensor][index])

    def add_plugin_v2(self, inputs: list[Tensor], plugin: dict[str, Any]) -> Any:
        outputs = [Tensor(f"unnamed {index}") for index in range(1 + int(plugin["layers"][0]))]
        self.layers.append(SimpleNamespace(inputs=inputs, fields=plugin, get_output=outputs.__getitem__))
        return self.layers[-1]

    def mark_output(self, tensor: Tensor) -> None:
        self.outputs.append(tensor)


class ModernNetwork(Network):
    """Of TensorRT 10 and 11."""

    def add_plugin_v3(self, inputs: list[Tensor], shape_inputs: list[Any], plugin: dict[str, Any]) -> Any:
        assert shape_inputs == []
        return self.add_plugin_v2(inputs, plugin)


class Creator:
    def create_plugin(self, name: str, fields: Any, *phase: str) -> Any:
        assert name == "DijiangStep" and phase in ((), ("BUILD",))
        return dict(fields)


def trt(modern: bool) -> Any:
    def find(name: str, version: str, namespace: str) -> Creator:
        assert (name, version, namespace) == ("DijiangStep", "1", "dijiang")
        return Creator()

    def field(name: str, value: Any, kind: str) -> tuple[str, Any]:
        assert kind == str(value.dtype) and (value.shape == (1,) or name == "weight_formats")
        return name, value

    integers = {"INT32": "int32"} | ({"INT64": "int64"} if modern else {})
    return SimpleNamespace(
        PluginFieldType=SimpleNamespace(INT32="int32", FLOAT32="float32"), PluginField=field,
        PluginFieldCollection=list, Weights=lambda array: array, TensorRTPhase=SimpleNamespace(BUILD="BUILD"),
        get_plugin_registry=lambda: SimpleNamespace(get_plugin_creator=find, get_creator=find),
        DataType=SimpleNamespace(FLOAT="float32", **integers),
    )  # fmt: skip


def make(
    folder: Path, spec: ModelSpec, dtype: str, rows: int, kernels: OnAStream, cuda: Cuda,
    modern: bool = False, kind: str | None = None,
) -> tuple[Network, ReferenceModel, Any]:  # fmt: skip
    """The network of a random model, that model, and what became of it; `kind`: of `STORED_KINDS`, then the
    model has the weights as they are stored."""
    model = random_model(spec, 1, torch_dtype(dtype))
    graph = write_graph(folder, spec, model, dtype, kind)
    parts = None if kind is None else quantise_model(spec, model, kind).parts
    network = ModernNetwork() if modern else Network()
    done = add_step(trt(modern), network, spec, dtype, rows, kernels, cuda, graph, parts)
    return network, model, done


def at_a_line(array: Any) -> Any:
    """In memory that begins at a multiple of 128 bytes, as TensorRT's constants do."""
    memory = np.empty(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    placed = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    placed[...] = array
    return placed


def computed(network: Network, given: dict[str, Any], kernels: OnAStream) -> list[Any]:
    """The network's outputs as the plugin computes them: from its fields, its tensors and nothing else."""
    (layer,) = network.layers
    fields = {name: value[0].item() for name, value in layer.fields.items() if name != "weight_formats"}
    blocks, most = fields.pop("blocks"), fields.pop("rows")
    struct = abi.StepModelStruct(**fields)
    formats = layer.fields.get("weight_formats", np.zeros(1, np.int32)).tolist()
    if len(formats) > 1:
        struct.quantised, struct.head_format, struct.embedding_format = 1, *formats[:2]
        struct.int8_matrices[: fields["layers"]] = formats[2:]
    size = abi.StepSizeStruct()
    kernels.call("dijiang_step_sizes", ctypes.byref(struct), most, None, ctypes.byref(size))
    assert blocks == size.blocks
    arrays = [
        at_a_line(np.asarray(given[t.name], t.kind) if t.array is None else t.array) for t in layer.inputs
    ]
    layers = fields["layers"]
    ids, positions, lens, *states = arrays[: 3 + layers]
    packed, embedding, *others = arrays[3 + layers :]
    scales, learned = (others[:1], others[1:]) if struct.embedding_format else ([], others)
    sync = at_a_line(np.zeros(size.sync, np.uint8))
    logits = np.full((len(ids), 1, fields["vocabulary"]), np.nan, np.float32)
    assert packed.nbytes == size.packed and bool(learned) == bool(fields["position_rows"])
    pointers = (ctypes.c_void_p * layers)(*(state.ctypes.data for state in states))
    buffers = abi.StepBuffersStruct(
        packed=packed.ctypes.data, embedding=embedding.ctypes.data,
        embedding_scales=scales[0].ctypes.data if scales else 0,
        position_embedding=learned[0].ctypes.data if learned else 0, input_ids=ids.ctypes.data,
        positions=positions.ctypes.data, seq_lens=lens.ctypes.data, states=pointers,
        logits=logits.ctypes.data, sync=sync.ctypes.data, sync_size=size.sync, rows=len(ids),
        integers=abi.INTEGERS[str(ids.dtype)],
    )  # fmt: skip
    kernels.call("dijiang_step", ctypes.byref(struct), ctypes.byref(buffers), 0)
    return [logits, *states]


def as_onnx(network: Network) -> ir.Model:
    """The same network as a graph, for a builder whose bindings can put no plugin into one.

    A node's `plugin_namespace` and `plugin_version` are what parsers look it up by (docs/op-contract.md).
    """
    (layer,) = network.layers
    kinds = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32}
    inputs = [
        ir.Value(
            name=tensor.name, type=ir.TensorType(kinds[tensor.kind]),
            shape=ir.Shape(["batch" if size == -1 else size for size in tensor.shape]),
        )
        for tensor in network.inputs
    ]  # fmt: skip
    by_name = {value.name: value for value in inputs}
    constants, values = [], []
    for index, tensor in enumerate(layer.inputs):
        if tensor.array is None:
            values.append(by_name[tensor.name])
            continue
        constants.append(ir.Value(name=f"constant.{index}", const_value=ir.tensor(tensor.array)))
        values.append(constants[-1])
    attributes = {n: v[0].item() if v.size == 1 else v.tolist() for n, v in layer.fields.items()}
    node = ir.node(
        "DijiangStep", values, attributes | {"plugin_namespace": "dijiang", "plugin_version": "1"},
        domain="dijiang", num_outputs=len(network.outputs), name="step",
    )  # fmt: skip
    for tensor, value in zip(network.outputs, node.outputs, strict=True):
        value.name, value.type = tensor.name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": 17, "dijiang": 1},
        name="step",
    )  # fmt: skip
    return ir.Model(graph, ir_version=8)
