"""DijiangAttention for ONNX and for PyTorch: its schema, and the custom op `torch.ops.dijiang.attention`.

Both are made from `dijiang_engines.op_contract`. The body in standard ONNX operators is in `lower.py`.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from onnx import defs
from torch import Tensor

from dijiang_engines.op_contract import (
    ATTRIBUTES,
    DOMAIN,
    INPUTS,
    LINEAR_NAME,
    OP_NAME,
    OP_VERSION,
    OUTPUTS,
    PLUGIN_ATTRIBUTES,
    T_TYPES,
    Attributes,
    Formal,
    Inputs,
    linear_fields,
)
from dijiang_export.reference.attention import Decay, dijiang_attention

_ONNX_TYPES = {
    "float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)",
    "int32": "tensor(int32)", "T": "T",
}  # fmt: skip


def onnx_schema() -> defs.OpSchema:
    """The op as an ONNX schema, for onnx.checker and onnxscript."""

    def parameter(formal: Formal) -> defs.OpSchema.FormalParameter:
        option = defs.OpSchema.FormalParameterOption
        return defs.OpSchema.FormalParameter(
            formal.name,
            _ONNX_TYPES[formal.kind],
            formal.shape,
            param_option=option.Optional if formal.optional else option.Single,
        )

    kinds = {"int": defs.OpSchema.AttrType.INT, "float": defs.OpSchema.AttrType.FLOAT}
    t_types = [_ONNX_TYPES[name] for name in T_TYPES]
    return defs.OpSchema(
        OP_NAME,
        DOMAIN,
        OP_VERSION,
        doc="DiJiang linear attention: RoPE, DCT feature map, state update, read-out, GroupNorm and gate.",
        inputs=[parameter(formal) for formal in INPUTS],
        outputs=[parameter(formal) for formal in OUTPUTS],
        type_constraints=[("T", t_types, "The model's type; arithmetic inside is float32.")],
        attributes=[
            *(defs.OpSchema.Attribute(name, kinds[kind], required=True) for name, kind in ATTRIBUTES.items()),
            *(
                defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.STRING, required=False)
                for name in PLUGIN_ATTRIBUTES
            ),
        ],
    )


def linear_schema() -> defs.OpSchema:
    """DijiangLinear as graphs with quantised weights have it, for onnx.checker."""
    formal, kinds = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType
    of = {"list[int]": kinds.INTS, "list[float]": kinds.FLOATS, "str": kinds.STRING}
    attributes = {
        name: "str" if isinstance(value, str) else f"list[{type(value[0]).__name__}]"
        for name, value in linear_fields("int8", 1).items()
    }
    return defs.OpSchema(
        LINEAR_NAME,
        DOMAIN,
        OP_VERSION,
        doc="A product with a matrix that is stored quantised.",
        inputs=[
            formal("x", "T", "[B, L, K]"),
            formal("elements", "tensor(int32)", "[N, K/32, 8 or 4]"),
            formal("scales", "tensor(float16)", "[N, K/32]"),
        ],
        outputs=[formal("y", "T", "[B, L, N]")],
        type_constraints=[("T", ["tensor(float16)", "tensor(bfloat16)"], "Of activations.")],
        attributes=[defs.OpSchema.Attribute(name, of[kind]) for name, kind in attributes.items()],
    )


def torch_schema() -> str:
    """The op's signature as PyTorch writes them: inputs, then attributes, in the contract's order."""
    tensors = [f"Tensor{'?' if formal.optional else ''} {formal.name}" for formal in INPUTS]
    attributes = [f"{kind} {name}" for name, kind in ATTRIBUTES.items()]
    return f"({', '.join(tensors + attributes)}) -> ({', '.join('Tensor' for _ in OUTPUTS)})"


@torch.library.custom_op(f"{DOMAIN}::attention", mutates_args=(), schema=torch_schema())
def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op for PyTorch: eager execution is the reference's chunked form."""
    tensors, attributes = arguments[: len(INPUTS)], Attributes(*arguments[len(INPUTS) :])
    x: Inputs[Tensor] = Inputs(**{formal.name: t for formal, t in zip(INPUTS, tensors, strict=True)})
    return dijiang_attention(
        x.qkv, x.gate, x.past_state, x.positions, x.seq_lens, x.proj, x.norm_weight, x.norm_bias, x.inv_freq,
        decay=Decay(x.log_decay, x.gain, x.read_scale), attributes=attributes,
    )  # fmt: skip


@attention.register_fake
def _(qkv: Tensor, gate: Tensor, past_state: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(past_state)


def traced_op(*tensors: Tensor, decay: Decay, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """`ReferenceModel.forward(op=...)` that leaves one custom-op node per layer in a traced graph."""
    result: tuple[Tensor, Tensor] = attention(
        *tensors, decay.log_decay, decay.gain, decay.read_scale, *astuple(attributes)
    )
    return result
