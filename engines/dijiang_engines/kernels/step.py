"""A model's whole decoding step in one launch, from Python: plugins/include/dijiang/step.h.

    kernels = StepKernels(path)
    model = StepModel.of(spec, "float16")
    size = kernels.step_size(model, rows=1)
    packed, sync = ...  # size.packed bytes; size.sync bytes, zeroed once
    for layer, tensors in enumerate(...):
        kernels.pack_step_layer(model, layer, tensors, packed, size.packed, stream)
    kernels.pack_step_ends(model, ends, packed, size.packed, stream)
    for part in step_parts(spec, quantised):  # if weights are quantised: layers and ends come without them
        kernels.pack_step_matrix(model, part, values, scales, packed, size.packed, stream)
    kernels.step(model, StepCall(...), stream)

Addresses are the caller's word, as in `Kernels.attention`; the library checks what can be checked of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.library import Device, Library, device_argument
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import QKV, Matrix

MAX_ROWS = 8
"""Sequences that one step may serve: DIJIANG_STEP_MAX_ROWS."""


_MATRICES = {
    "attention.gate.weight": "gate", "attention.dense.weight": "dense", "mlp.up.weight": "up",
    "mlp.gate.weight": "mlp_gate", "mlp.down.weight": "down",
}  # fmt: skip


@dataclass(frozen=True)
class StepPart:
    """One matrix of a quantised model as the kernel takes it, and where a bundle has it."""

    layer: int
    """0 for the head."""
    matrix: str
    """Of `abi.STEP_MATRICES`."""
    stored: Matrix
    """Which has it."""
    first_row: int
    """Of `stored`."""
    rows: int


def step_parts(spec: ModelSpec, quantised: Mapping[str, Sequence[Matrix]]) -> list[StepPart]:
    """Every matrix that `StepKernels.pack_step_matrix` is to pack.

    Args:
        spec: of the model.
        quantised: canonical name -> stored matrices (`Quantisation.parts` of a bundle's manifest).
    """
    parts = []
    head = "embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    for stored in quantised[head]:
        parts.append(StepPart(0, "head", stored, 0, stored.rows))
    sizes = (spec.attention_size, *[spec.num_kv_heads * spec.head_dim] * 2)
    for layer in range(spec.num_layers):
        at, start = f"layers.{layer}.", 0
        for matrix, rows in zip(("q", "k", "v"), sizes, strict=True):
            (stored,) = (it for it in quantised[at + QKV] if it.first_row <= start < it.first_row + it.rows)
            parts.append(StepPart(layer, matrix, stored, start - stored.first_row, rows))
            start += rows
        for name, matrix in _MATRICES.items():
            for stored in quantised.get(at + name, ()):
                parts.append(StepPart(layer, matrix, stored, 0, stored.rows))
    return parts


@dataclass(frozen=True)
class StepModel:
    """A model's geometry: dijiang_step_model of the C ABI."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: str
    """T: float16 or bfloat16."""
    norm: str
    activation: str
    parallel_residual: bool
    table_rows: int
    position_rows: int
    position_offset: int
    norm_epsilon: float
    group_norm_epsilon: float
    quantised: bool = False
    """Matrices of layers and the head are int8 or int4."""
    head_format: str = "same"
    embedding_format: str = "same"
    int8_matrices: tuple[int, ...] = ()
    """Of each layer: a bit for each of `abi.STEP_MATRICES` that is int8; the others are int4."""

    @classmethod
    def of(
        cls, spec: ModelSpec, dtype: str, quantised: Mapping[str, Sequence[Matrix]] | None = None
    ) -> StepModel:
        """What a spec says, for weights of that type.

        Args:
            spec: of the model.
            dtype: float16 or bfloat16; with quantised matrices that of activations and all else.
            quantised: None, or canonical name -> stored matrices (`Quantisation.parts` of a manifest).

        Raises:
            KernelError: the kernel has no step for such a model.
        """
        refused = {
            "a norm behind the residual addition": spec.post_norm,
            "no final norm": not spec.final_norm,
            "embeddings of another width": spec.embedding_size != spec.hidden_size,
            f"a gated MLP with {spec.activation}": spec.gated_mlp and spec.activation != "silu",
            f"{'weights' if quantised is None else 'activations'} in {dtype}": (
                dtype not in ("float16", "bfloat16")
            ),
        }
        for what, found in refused.items():
            if found:
                raise KernelError(
                    "no step in one launch for this model", got=what, hint="use the kernels of its parts"
                )
        formats: dict[str, Any] = {}
        if quantised is not None:
            bits = [0] * spec.num_layers
            for part in step_parts(spec, quantised):
                if part.matrix != "head" and part.stored.format == "int8":
                    bits[part.layer] |= 1 << abi.STEP_MATRICES.index(part.matrix)
            (embedding,) = quantised["embed_tokens.weight"]
            head = embedding if spec.tied_embeddings else quantised["lm_head.weight"][0]
            formats = {
                "quantised": True, "head_format": head.format, "embedding_format": embedding.format,
                "int8_matrices": tuple(bits),
            }  # fmt: skip
        return cls(
            layers=spec.num_layers, hidden=spec.hidden_size, inner=spec.intermediate_size,
            vocabulary=spec.vocab_size, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim, rotary_dim=spec.rotary_dim, dtype=dtype, norm=spec.norm,
            activation="swiglu" if spec.gated_mlp else spec.activation,
            parallel_residual=spec.parallel_residual, table_rows=spec.decay_rows,
            position_rows=spec.position_embeddings + spec.position_offset if spec.position_embeddings else 0,
            position_offset=spec.position_offset, norm_epsilon=spec.norm_epsilon,
            group_norm_epsilon=spec.group_norm_epsilon, **formats,
        )  # fmt: skip

    def struct(self) -> abi.StepModelStruct:
        """As the C ABI takes it."""
        values = asdict(self) | {
            "dtype": abi.DTYPES[self.dtype],
            "norm": abi.NORMS[self.norm],
            "activation": abi.ACTIVATIONS[self.activation],
            "parallel_residual": int(self.parallel_residual),
            "quantised": int(self.quantised),
            "head_format": abi.WEIGHT_FORMATS[self.head_format],
            "embedding_format": abi.WEIGHT_FORMATS[self.embedding_format],
            "int8_matrices": (ctypes.c_uint8 * abi.STEP_MAX_LAYERS)(*self.int8_matrices),
        }
        return abi.StepModelStruct(**values)


@dataclass(frozen=True)
class StepSize:
    """What a model's step takes: dijiang_step_size."""

    packed: int
    """Bytes of the packed weights."""
    sync: int
    """Bytes of memory that its owner zeroes once."""
    blocks: int
    threads: int
    shared_memory: int
    """Bytes of a block's."""
    ring: int
    """Of those, for weights that are read ahead."""


@dataclass(frozen=True, kw_only=True)
class StepCall:
    """One step's addresses in GPU memory: dijiang_step_buffers."""

    packed: int
    embedding: int
    embedding_scales: int = 0
    position_embedding: int = 0
    input_ids: int
    positions: int
    seq_lens: int
    states: Sequence[int]
    """Of each layer: float32 [rows, H, d, d], read and written."""
    state_row_stride: int = 0
    logits: int
    """float32 [rows, V], written."""
    logits_row_stride: int = 0
    sync: int
    sync_size: int
    rows: int
    integers: str = "int64"
    """Type of input_ids, positions and seq_lens."""


class StepKernels(Library):
    """Steps in one launch; conventions as in `dijiang_engines.kernels.attention`."""

    def step_size(self, model: StepModel, rows: int, device: Device | None = None) -> StepSize:
        """Sizes for steps of up to `rows` rows.

        Args:
            model: its geometry.
            rows: up to `MAX_ROWS`.
            device: None for the current one; given, no GPU is needed.

        Raises:
            KernelError: the model, or that many rows, do not fit; says what does.
        """
        size = abi.StepSizeStruct()
        self.call(
            "dijiang_step_sizes",
            ctypes.byref(model.struct()),
            rows,
            device_argument(device),
            ctypes.byref(size),
        )
        return StepSize(*(getattr(size, name) for name, *_ in abi.StepSizeStruct._fields_))

    def pack_step_layer(
        self,
        model: StepModel,
        layer: int,
        tensors: Mapping[str, int],
        packed: int,
        packed_size: int,
        stream: int = 0,
    ) -> None:
        """Enqueue copying a layer's tensors (addresses by the names of dijiang_step_layer) to their places.

        Raises:
            KernelError: one is missing, or CUDA refused.
        """
        struct = abi.StepLayerStruct(**tensors)
        self.call(
            "dijiang_step_pack_layer",
            ctypes.byref(model.struct()),
            layer,
            ctypes.byref(struct),
            packed,
            packed_size,
            stream,
        )

    def pack_step_ends(
        self, model: StepModel, tensors: Mapping[str, int], packed: int, packed_size: int, stream: int = 0
    ) -> None:
        """Enqueue the same for the head, the final norm and RoPE's frequencies (dijiang_step_ends)."""
        struct = abi.StepEndsStruct(**tensors)
        self.call(
            "dijiang_step_pack_ends",
            ctypes.byref(model.struct()),
            ctypes.byref(struct),
            packed,
            packed_size,
            stream,
        )

    def pack_step_matrix(
        self,
        model: StepModel,
        part: StepPart,
        values: int,
        scales: int,
        packed: int,
        packed_size: int,
        stream: int = 0,
    ) -> None:
        """Enqueue packing a matrix of a quantised model.

        Args:
            model: its geometry and formats.
            part: which matrix.
            values: address of its first row's elements, stored as in a bundle: uint8 [rows, K/32, 32 or 16].
            scales: and of its scales: float16 [rows, K/32].
            packed: the packed weights, and
            packed_size: how many bytes they have.
            stream: to enqueue it on.

        Raises:
            KernelError: an argument is wrong, or CUDA refused.
        """
        self.call(
            "dijiang_step_pack_matrix",
            ctypes.byref(model.struct()),
            part.layer,
            abi.STEP_MATRICES.index(part.matrix),
            values,
            scales,
            packed,
            packed_size,
            stream,
        )

    def step(self, model: StepModel, call: StepCall, stream: int = 0) -> None:
        """Enqueue one step.

        Raises:
            KernelError: an argument is wrong, the model does not fit the GPU, or CUDA refused.
        """
        if len(call.states) != model.layers:
            raise KernelError(
                "states has the wrong length", got=len(call.states), expected=f"{model.layers} layers"
            )
        states = (ctypes.c_void_p * model.layers)(*call.states)
        values = vars(call) | {"states": states, "integers": abi.INTEGERS[call.integers]}
        struct = abi.StepBuffersStruct(**values)
        self.call("dijiang_step", ctypes.byref(model.struct()), ctypes.byref(struct), stream)
