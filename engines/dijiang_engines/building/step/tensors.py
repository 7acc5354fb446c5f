"""The tensors of a step graph as dijiang_step's packing takes them, read from the bundle's weights.

Quantised matrices are taken as they are stored (`weight_formats`), a matrix of the kernel's at a time.

They come from the files, not from a network that TensorRT parsed: its bindings cannot show bfloat16, 8.6
widens 16-bit weights, and here they stay where they are until they are needed. What they are called and how
they lie is docs/bundle-format.md. That the graph computes what the spec says is the exporter's word, as it is
for the model's geometry everywhere, and the recorded cases show it of every engine; a graph with other
weights than the spec's is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.manifest import WEIGHTS
from dijiang_engines.formats.onnx_external import ExternalTensor, check_external_data
from dijiang_engines.formats.onnx_graph import PLUGIN, read_graph
from dijiang_engines.formats.safe_files import LIMITS, read_bounded
from dijiang_engines.kernels.step import StepPart, step_parts
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import Matrix

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

LAYER_TENSORS = {
    "qkv": "attention.qkv.weight", "gate": "attention.gate.weight", "dense": "attention.dense.weight",
    "up": "mlp.up.weight", "mlp_gate": "mlp.gate.weight", "down": "mlp.down.weight",
    "qkv_bias": "attention.qkv.bias", "dense_bias": "attention.dense.bias", "up_bias": "mlp.up.bias",
    "mlp_gate_bias": "mlp.gate.bias", "down_bias": "mlp.down.bias",
    "attention_norm_weight": "attention_norm.weight", "attention_norm_bias": "attention_norm.bias",
    "mlp_norm_weight": "mlp_norm.weight", "mlp_norm_bias": "mlp_norm.bias", "proj": "attention.proj",
    "norm_weight": "attention.norm_weight", "norm_bias": "attention.norm_bias",
    "log_decay": "attention.log_decay", "gain": "attention.gain", "read_scale": "attention.read_scale",
}  # fmt: skip
"""dijiang_step_layer's tensors, and a bundle's names for them behind `layers.{i}.`"""
_MATRICES = ("qkv", "gate", "dense", "up", "mlp_gate", "down")
_EMBEDDING, _POSITIONS, _HEAD = "embed_tokens.weight", "embed_positions.weight", "lm_head.weight"
_FLOAT32, _INT32, _FLOAT16, _BFLOAT16 = 1, 6, 10, 16  # TensorProto.DataType
_TYPES = {"float16": _FLOAT16, "bfloat16": _BFLOAT16}


def layer_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shapes of a layer's tensors, a matrix as [out, in], by the names of LAYER_TENSORS; of those it has."""
    h, m, width, qkv, d = (
        spec.hidden_size, spec.intermediate_size, spec.attention_size, spec.qkv_size, spec.head_dim,
    )  # fmt: skip
    terms: Shape = (spec.decay_rows, spec.num_heads) if spec.decay == "tables" else (spec.num_heads,)
    shapes: dict[str, Shape] = {
        "qkv": (qkv, h), "gate": (width, h), "dense": (h, width), "up": (m, h), "down": (h, m),
        "attention_norm_weight": (h,), "mlp_norm_weight": (h,), "proj": (d, d), "norm_weight": (width,),
        "norm_bias": (width,), "log_decay": terms,
    }  # fmt: skip
    optional: list[tuple[bool, dict[str, Shape]]] = [
        (spec.gated_mlp, {"mlp_gate": (m, h)}),
        (spec.gated_mlp and spec.mlp_bias, {"mlp_gate_bias": (m,)}),
        (spec.attention_bias, {"qkv_bias": (qkv,)}),
        (spec.dense_bias, {"dense_bias": (h,)}),
        (spec.mlp_bias, {"up_bias": (m,), "down_bias": (h,)}),
        (spec.norm == "layer_norm", {"attention_norm_bias": (h,), "mlp_norm_bias": (h,)}),
        (spec.decay == "tables", {"gain": terms, "read_scale": terms}),
    ]
    for there, some in optional:
        shapes |= some if there else {}
    return shapes


class StepTensors:
    """A step graph's weights.

    Args:
        graph: step.trt.onnx, weights.data beside it.
        spec: of the model.
        dtype: of its matrices, or of what is not quantised: float16 or bfloat16.
        quantised: None, or canonical name -> stored matrices (`Quantisation.parts` of the bundle's manifest).

    Raises:
        RunnerError: its weights are not those of such a model.
        BundleError: it is no graph of a bundle, or cannot be read.
    """

    def __init__(
        self,
        graph: Path,
        spec: ModelSpec,
        dtype: str,
        quantised: Mapping[str, Sequence[Matrix]] | None = None,
    ) -> None:
        self.spec, self._quantised = spec, quantised
        self._kind = _TYPES[dtype]
        path = graph.parent / WEIGHTS
        model = read_bounded(graph, LIMITS["graph"])
        tensors = check_external_data(model, location=WEIGHTS, file_bytes=path.stat().st_size)
        self._places: dict[str, ExternalTensor] = {tensor.name: tensor for tensor in tensors}
        self._data = np.memmap(path, np.uint8, "r")
        self._check(model)

    def layer(self, index: int) -> dict[str, Array]:
        """dijiang_step_layer's tensors: matrices as 16-bit words [out, in], everything else float32.
        Quantised matrices are not among them, but `parts`."""
        shapes = layer_shapes(self.spec)
        names = {name: f"layers.{index}.{LAYER_TENSORS[name]}" for name in shapes}
        return {
            name: self._matrix(source) if name in _MATRICES else self._floats(source)
            for name, source in names.items()
            if self._quantised is None or name not in _MATRICES
        }

    def ends(self) -> dict[str, Array]:
        """dijiang_step_ends' tensors, likewise."""
        names = {"norm_weight": "final_norm.weight", "norm_bias": "final_norm.bias", "inv_freq": "inv_freq"}
        found = {n: self._floats(s) for n, s in names.items() if s in self._places}
        if self._quantised is not None:
            return found
        return found | {"head": self._words(_EMBEDDING) if self.spec.tied_embeddings else self._matrix(_HEAD)}

    def parts(self) -> list[StepPart]:
        """The quantised matrices that are packed."""
        return [] if self._quantised is None else step_parts(self.spec, self._quantised)

    def part(self, part: StepPart) -> tuple[Array, Array]:
        """Its rows as they are stored: elements, uint8 [rows, K/32, 32 or 16], and scales, uint16 words
        [rows, K/32]."""
        rows = slice(part.first_row, part.first_row + part.rows)
        elements, scales = self._stored(part.stored)
        return np.array(elements[rows]), np.array(scales[rows])

    def embedding(self) -> Array:
        """16-bit words [V, h]; quantised, elements as they are stored."""
        if self._quantised is None:
            return self._words(_EMBEDDING)
        elements = np.array(self._stored(self._embedding_matrix())[0])
        return elements.reshape(len(elements), -1)

    def embedding_scales(self) -> Array | None:
        """Of a quantised embedding: 16-bit words [V, h/32]."""
        return None if self._quantised is None else np.array(self._stored(self._embedding_matrix())[1])

    def position_embedding(self) -> Array | None:
        """16-bit words [rows, h]; None: positions are not learned."""
        return self._words(_POSITIONS) if self.spec.position_embeddings else None

    # -- reading ---------------------------------------------------------------------------------------

    def _check(self, model: bytes) -> None:
        """Are they the spec's, all of them and no others?"""
        spec = self.spec
        expected: dict[str, Shape] = {}
        if spec.position_embeddings:
            expected[_POSITIONS] = (spec.position_embeddings + spec.position_offset, spec.hidden_size)
        if self._quantised is None:
            expected[_EMBEDDING] = (spec.vocab_size, spec.hidden_size)
            if not spec.tied_embeddings:
                expected[_HEAD] = (spec.hidden_size, spec.vocab_size)
        for stored in (it for parts in (self._quantised or {}).values() for it in parts):
            rows, blocks, width = stored.stored_shape
            expected[stored.stored_name] = (rows, blocks, width // 4)
            expected[stored.scale_name] = stored.scale_shape
        expected |= {"final_norm.weight": (spec.hidden_size,), "inv_freq": (max(spec.rotary_dim // 2, 1),)}
        if spec.norm == "layer_norm":
            expected["final_norm.bias"] = (spec.hidden_size,)
        for layer in range(spec.num_layers):
            for name, shape in layer_shapes(spec).items():
                source = f"layers.{layer}.{LAYER_TENSORS[name]}"
                if name not in _MATRICES:
                    expected[source] = shape
                elif self._quantised is None:
                    expected[source] = shape[::-1]
        found = {name: tensor.dims for name, tensor in self._places.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise RunnerError(
                    f"the step graph's weight {name} is not what the model has",
                    got=list(found[name]) if name in found else "none",
                    expected=list(expected[name]) if name in expected else "none",
                )
        layers = sum(node.operator == PLUGIN for node in read_graph(model).nodes)
        if layers != spec.num_layers:
            raise RunnerError(
                "the step graph has another number of layers than the model",
                got=layers,
                expected=spec.num_layers,
            )

    def _bytes(self, name: str, kinds: tuple[int, ...]) -> tuple[ExternalTensor, Array]:
        place = self._places[name]
        if place.data_type not in kinds:
            raise RunnerError(
                f"the step graph's weight {name} has another type than the model",
                got=f"TensorProto.DataType {place.data_type}",
                expected=" or ".join(map(str, kinds)),
            )
        return place, self._data[place.offset : place.offset + place.length]

    def _embedding_matrix(self) -> Matrix:
        assert self._quantised is not None
        (matrix,) = self._quantised[_EMBEDDING]
        return matrix

    def _stored(self, matrix: Matrix) -> tuple[Array, Array]:
        """Elements and scales of a quantised matrix, where they lie in the file."""
        _, elements = self._bytes(matrix.stored_name, (_INT32,))
        _, scales = self._bytes(matrix.scale_name, (_FLOAT16,))
        return elements.reshape(matrix.stored_shape), scales.view(np.uint16).reshape(matrix.scale_shape)

    def _words(self, name: str) -> Array:
        """As it is stored, in memory of its own."""
        place, data = self._bytes(name, (self._kind,))
        return np.array(data).view(np.uint16).reshape(place.dims)

    def _matrix(self, name: str) -> Array:
        """Stored as [in, out]."""
        place, data = self._bytes(name, (self._kind,))
        return np.ascontiguousarray(data.view(np.uint16).reshape(place.dims).T)

    def _floats(self, name: str) -> Array:
        place, data = self._bytes(name, (_FLOAT32, self._kind))
        data = np.array(data)
        if place.data_type == _FLOAT16:
            return data.view(np.float16).astype(np.float32)
        if place.data_type == _BFLOAT16:
            return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return data.view(np.float32)
