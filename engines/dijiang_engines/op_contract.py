"""The contract of `dijiang::DijiangAttention`, version 1, once: names, tensors, types, shapes, attributes.

Whatever Python knows of the op's fields is made from here: the ONNX schema and the PyTorch op
(`dijiang_export.graph.custom_op`), the nodes that graphs are lowered from, the structs and the checks of the
CUDA kernels' binding, and the checks of manifests and of plugin nodes. C, C++ and CUDA, and the PyTorch
reference, which defines what the op computes, keep their own copies; tests/graph/test_op_contract.py
compares each of them with this. docs/op-contract.md says what every field means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from dijiang_engines.spec import ModelSpec

DOMAIN = "dijiang"
OP_NAME = "DijiangAttention"
OP_VERSION = 1

T_TYPES = ("float32", "float16", "bfloat16")
"""What T may be: the type of weights and activations. Arithmetic inside the op is float32."""

PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")
"""Strings that TensorRT's parsers look the plugin up by; only on nodes lowered for TensorRT."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Attributes:
    """The attributes of a node, which are the sizes of a layer's attention."""

    num_heads: int
    """H, query heads."""
    num_kv_heads: int
    """Hkv; divides H."""
    head_dim: int
    """d."""
    rotary_dim: int
    """r: leading dimensions of each head that RoPE turns; even, 0 = none."""
    epsilon: float
    """Of GroupNorm."""

    @property
    def width(self) -> int:
        """H·d, the last dimension of gate and output."""
        return self.num_heads * self.head_dim

    @property
    def packed_width(self) -> int:
        """(H+2·Hkv)·d, the last dimension of qkv."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def _tensor(kind: str, *dims: str) -> dict[str, Any]:
    return {"kind": kind, "dims": dims}


@dataclass(frozen=True, kw_only=True)
class Inputs(Generic[Value]):
    """Something for each input, in order: a tensor, a value of a graph, an address."""

    qkv: Value = field(metadata=_tensor("T", "B", "L", "(H+2·Hkv)·d"))
    gate: Value = field(metadata=_tensor("T", "B", "L", "H·d"))
    past_state: Value = field(metadata=_tensor("float32", "B", "H", "d", "d"))
    positions: Value = field(metadata=_tensor("int32", "B"))
    seq_lens: Value = field(metadata=_tensor("int32", "B"))
    proj: Value = field(metadata=_tensor("float32", "d", "d"))
    norm_weight: Value = field(metadata=_tensor("float32", "H·d"))
    norm_bias: Value = field(metadata=_tensor("float32", "H·d"))
    inv_freq: Value = field(metadata=_tensor("float32", "max(r/2, 1)"))
    log_decay: Value = field(metadata=_tensor("float32", "N", "H"))
    gain: Value | None = field(default=None, metadata=_tensor("float32", "N", "H"))
    read_scale: Value | None = field(default=None, metadata=_tensor("float32", "N", "H"))


@dataclass(frozen=True, kw_only=True)
class Outputs(Generic[Value]):
    """Something for each output, in order."""

    output: Value = field(metadata=_tensor("T", "B", "L", "H·d"))
    present_state: Value = field(metadata=_tensor("float32", "B", "H", "d", "d"))


@dataclass(frozen=True, kw_only=True)
class Tensors(Outputs[Value], Inputs[Value]):
    """Something for each input, then for each output."""


@dataclass(frozen=True)
class Formal:
    """One input or output."""

    name: str
    kind: str
    """T, float32 or int32."""
    dims: tuple[str, ...]
    """Keys of `dimensions`. N is there with trained tables only: with geometric decay log_decay is [H]."""
    optional: bool
    """Absent with geometric decay."""

    @property
    def shape(self) -> str:
        """For people, such as "[B, L, H·d]"."""
        text = f"[{', '.join(self.dims)}]"
        return text if self.optional or "N" not in self.dims else f"[{', '.join(self.dims[1:])}] or {text}"

    def sizes(self, of: Mapping[str, int]) -> list[int]:
        """The shape in a call whose `dimensions` are `of`."""
        return [of[dim] for dim in self.dims if dim in of]


def _formals(of: type[Any]) -> tuple[Formal, ...]:
    return tuple(Formal(f.name, **f.metadata, optional=f.default is None) for f in fields(of))


INPUTS = _formals(Inputs)
OUTPUTS = _formals(Outputs)
ATTRIBUTES = {f.name: str(f.type) for f in fields(Attributes)}
"""Name -> "int" or "float"; all of them are required."""
CONSTANTS = frozenset(formal.name for formal in INPUTS if "B" not in formal.dims)
"""Inputs that are the same in every call, float32 in models of every type."""


LINEAR_NAME = "DijiangLinear"
_STORED = {"int8": 3, "int4": 4}


def linear_fields(weight_format: str, dtype: int) -> dict[str, list[int] | list[float] | str]:
    """The attributes of a node DijiangLinear of a bundle's graph: one product of a matrix as it is stored.

    Inputs are x T [B, L, K], the elements as int32 [N, K/32, 8 or 4] and the scales float16 [N, K/32].
    `build-engine` packs such nodes and fuses what is around them: docs/tensorrt-plugin.md.

    Args:
        weight_format: int8 or int4.
        dtype: T: 1 float16, 2 bfloat16.
    """
    zeros = ("term_output", "term_bias", "output_activation", "output_norm", "output_norm_bias")
    fields: dict[str, list[int] | list[float] | str] = {name: [0] for name in zeros}
    fields |= {"output_epsilon": [0.0], "output_residual": [0], "dtype": [dtype]}
    fields |= {"term_weight_format": [_STORED[weight_format]], "output_width": [0]}
    return fields | dict(zip(PLUGIN_ATTRIBUTES, (DOMAIN, "1"), strict=True))


def attributes_of(spec: ModelSpec) -> Attributes:
    """The attributes of every node of a model."""
    return Attributes(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary_dim=spec.rotary_dim,
        epsilon=spec.group_norm_epsilon,
    )


def dimensions(attributes: Attributes, batch: int, length: int, table_rows: int) -> dict[str, int]:
    """How long what `Formal.dims` names is in one call, in elements.

    Args:
        attributes: of the node.
        batch: B.
        length: L, tokens per row.
        table_rows: N; 0 for geometric decay, which has no such dimension.
    """
    found = {
        "B": batch,
        "L": length,
        "H": attributes.num_heads,
        "d": attributes.head_dim,
        "H·d": attributes.width,
        "(H+2·Hkv)·d": attributes.packed_width,
        "max(r/2, 1)": max(attributes.rotary_dim // 2, 1),
    }
    return found | {"N": table_rows} if table_rows else found


def chunk_size(head_dim: int) -> int:
    """Tokens in a chunk of the prefill graph, for heads of `head_dim`: C of docs/mathematics.md, section 4.

    64 measured best on CPUs up to d = 128, and 128 at d = 256 (docs/performance.md). A call with fewer
    tokens is one chunk.
    """
    return 128 if head_dim >= 256 else 64
