"""The op contract of `dijiang::DijiangAttention`, version 1: one place, in code.

`INPUTS`, `OUTPUTS` and `ATTRIBUTES` are the contract (docs/op-contract.md says the same in prose). The
ONNX schema and the PyTorch custom op `torch.ops.dijiang.attention` are made from them here; the bodies in
standard ONNX operators are in `body_*.py`; the TensorRT creator's fields are tested against `ATTRIBUTES`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import defs
from torch import Tensor

from dijiang_export.reference.attention import Decay, Geometry, dijiang_attention

DOMAIN = "dijiang"
OP_NAME = "DijiangAttention"
OP_VERSION = 1


@dataclass(frozen=True)
class Formal:
    """One input or output: `kind` is "T", "float32" or "int32"."""

    name: str
    kind: str
    shape: str
    optional: bool = False


INPUTS = (
    Formal("qkv", "T", "[B, L, (H+2·Hkv)·d]"),
    Formal("gate", "T", "[B, L, H·d]"),
    Formal("past_state", "float32", "[B, H, d, d]"),
    Formal("positions", "int32", "[B]"),
    Formal("seq_lens", "int32", "[B]"),
    Formal("proj", "float32", "[d, d]"),
    Formal("norm_weight", "float32", "[H·d]"),
    Formal("norm_bias", "float32", "[H·d]"),
    Formal("inv_freq", "float32", "[max(r/2, 1)]"),
    Formal("log_decay", "float32", "[H] or [N, H]"),
    Formal("gain", "float32", "[N, H]", optional=True),
    Formal("read_scale", "float32", "[N, H]", optional=True),
)
OUTPUTS = (
    Formal("output", "T", "[B, L, H·d]"),
    Formal("present_state", "float32", "[B, H, d, d]"),
)
ATTRIBUTES = {
    "num_heads": "int",
    "num_kv_heads": "int",
    "head_dim": "int",
    "rotary_dim": "int",
    "epsilon": "float",
}
PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")
"""Strings that TensorRT's parsers look the plugin up by; only on nodes lowered for TensorRT."""
T_TYPES = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")


def onnx_schema() -> defs.OpSchema:
    """The op as an ONNX schema, for onnx.checker and onnxscript."""
    types = {"T": "T", "float32": "tensor(float)", "int32": "tensor(int32)"}

    def parameter(formal: Formal) -> defs.OpSchema.FormalParameter:
        option = defs.OpSchema.FormalParameterOption
        return defs.OpSchema.FormalParameter(
            formal.name,
            types[formal.kind],
            formal.shape,
            param_option=option.Optional if formal.optional else option.Single,
        )

    kinds = {"int": defs.OpSchema.AttrType.INT, "float": defs.OpSchema.AttrType.FLOAT}
    return defs.OpSchema(
        OP_NAME,
        DOMAIN,
        OP_VERSION,
        doc="DiJiang linear attention: RoPE, DCT feature map, state update, read-out, GroupNorm and gate.",
        inputs=[parameter(f) for f in INPUTS],
        outputs=[parameter(f) for f in OUTPUTS],
        type_constraints=[("T", list(T_TYPES), "The model's type; arithmetic inside is float32.")],
        attributes=[
            *(defs.OpSchema.Attribute(name, kinds[kind], required=True) for name, kind in ATTRIBUTES.items()),
            *(
                defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.STRING, required=False)
                for name in PLUGIN_ATTRIBUTES
            ),
        ],
    )


@torch.library.custom_op("dijiang::attention", mutates_args=())
def attention(
    qkv: Tensor,
    gate: Tensor,
    past_state: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    proj: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    inv_freq: Tensor,
    log_decay: Tensor,
    gain: Tensor | None,
    read_scale: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """The op for PyTorch: eager execution is the reference's chunked form."""
    geometry = Geometry(num_heads, num_kv_heads, head_dim, rotary_dim, epsilon)
    return dijiang_attention(
        qkv, gate, past_state, positions, seq_lens, proj, norm_weight, norm_bias, inv_freq,
        decay=Decay(log_decay, gain, read_scale), geometry=geometry,
    )  # fmt: skip


@attention.register_fake
def _(qkv: Tensor, gate: Tensor, past_state: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(past_state)


def traced_op(*tensors: Tensor, decay: Decay, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """`ReferenceModel.forward(op=...)` that leaves one custom-op node per layer in a traced graph."""
    result: tuple[Tensor, Tensor] = attention(
        *tensors, decay.log_decay, decay.gain, decay.read_scale,
        geometry.num_heads, geometry.num_kv_heads, geometry.head_dim, geometry.rotary_dim, geometry.epsilon,
    )  # fmt: skip
    return result
