"""The student: the project's reference model with DiJiang attention that can be trained.

`convert` makes its weights from the teacher's. Everything around attention is `ReferenceModel` itself, so the
three families, and whatever `to-onnx` will read, are one code; only the op between the projections is another
one here, made for whole windows and gradients.

    y = dense( silu(gate(x)) · GroupNorm(concat_h o) ),     φ(u) = softmax(u P)          (docs/mathematics.md)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint as recompute

from dijiang_engines.formats.atomic import output_folder
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.reference.attention import feature_map
from dijiang_export.reference.model import ReferenceModel
from dijiang_export.reference.rope import rotate, rotation

from .recurrence import Recurrence

Mixing = Literal["dijiang", "softmax"]
"""How tokens are mixed. softmax is a control: the same gate, GroupNorm and training, but the teacher's kind
of attention in the place of the recurrence. It shows what the recurrence costs by itself."""

NEW = ("proj", "norm_weight", "norm_bias", "gate.weight")
"""Ends of the names of parameters that the teacher does not have, below a layer's attention."""


class Rate(nn.Module):
    """Learned decay: ln γ = -exp(θ): negative for every θ, and a step of θ is a relative one."""

    def forward(self, theta: Tensor) -> Tensor:
        """θ [H] -> ln γ [H]."""
        return -theta.exp()

    def right_inverse(self, log_decay: Tensor) -> Tensor:
        """ln γ [H] -> θ [H]."""
        return (-log_decay).log()


class Student(nn.Module):
    """A DiJiang model over a converted checkpoint's folder, in float32.

    Args:
        folder: what `convert` wrote, or `save` of an earlier student.
        recurrence: from `RECURRENCES`.
        learn_decay: train one γ a head too.
        freeze_projection: do not train P, as the official code does not.
        mixing: "softmax" for the control.
        checkpointing: keep only the layers' inputs, and compute the rest again when gradients are due.
        compiled: compile the layers.
    """

    def __init__(
        self,
        folder: Path,
        recurrence: Recurrence,
        *,
        learn_decay: bool = False,
        freeze_projection: bool = False,
        mixing: Mixing = "dijiang",
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        with open_checkpoint(folder) as source:
            self.net = ReferenceModel(source.spec)
            self.net.load_state_dict(source.load_state_dict())
        self.spec = self.net.spec
        self.recurrence, self.mixing, self.checkpointing = recurrence, mixing, checkpointing
        for name, parameter in self.net.named_parameters():
            fixed = ("log_decay", ".proj") if freeze_projection else "log_decay"
            parameter.requires_grad_(not name.endswith(fixed))
        if learn_decay:
            self._learn_decay()
        self._layer = torch.compile(_layer, dynamic=False) if compiled else _layer
        self._attend = torch.compile(_attend, dynamic=False) if compiled else _attend

    def _learn_decay(self) -> None:
        for layer in self.net.layers:
            layer.attention.log_decay.requires_grad_(True)
            parametrize.register_parametrization(layer.attention, "log_decay", Rate())
        # PyTorch makes a class for each module that it gives a parametrization. Layers of many classes are
        # compiled one by one, and after the eighth not at all: let all have the first one's.
        for layer in self.net.layers:
            layer.attention.__class__ = type(self.net.layers[0].attention)

    def angles(self, first: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
        """RoPE's cosines and sines [B, L, 1, r/2] of windows that begin at positions `first` [B]."""
        if not self.spec.rotary_dim:
            return None
        at = first.unsqueeze(-1) + torch.arange(length, device=first.device)
        cos, sin = rotation(at, self.net.get_buffer("inv_freq"), torch.float32)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def forward(self, ids: Tensor, first: Tensor) -> Tensor:
        """ids int64 [B, L], windows that begin at positions `first` [B] -> what the head takes, [B, L, E]."""
        angles = self.angles(first, ids.shape[1])
        hidden = self.net.embed(ids, first)
        run = self._layer if self.training else _layer  # what is compiled is compiled for training's shapes
        for layer in self.net.layers:
            if self.checkpointing and self.training:
                hidden = recompute(run, layer, hidden, angles, self.mix, use_reentrant=False)
            else:
                hidden = run(layer, hidden, angles, self.mix)
        if self.net.final_norm is not None:
            hidden = self.net.final_norm(hidden)
        if self.net.project_out is not None:
            hidden = self.net.project_out(hidden)
        return hidden

    def attend(self, layer: int, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """One layer's attention alone: x [B, L, h], normed -> [B, L, h]."""
        return self._attend(self.net.layers[layer].attention, x, angles, self.mix)

    @property
    def head_weight(self) -> Tensor:
        """[V, E]."""
        return self.net.lm_head.weight

    def mix(
        self,
        qkv: Tensor,
        gate: Tensor,
        past: None,
        positions: None,
        lengths: None,
        proj: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        *,
        decay: Any,
        attributes: Any,
    ) -> tuple[Tensor, None]:
        """The op of the reference model (docs/op-contract.md) for windows without padding that begin anew.

        In float32 under autocast: exponents of a softmax, and a norm that divides by the spread of a few
        neighbouring channels, enlarge the rounding of what goes into them.
        """
        heads, shared, d = attributes.num_heads, attributes.num_kv_heads, attributes.head_dim
        batch, length = qkv.shape[:2]
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, v = qkv.split([heads * d, shared * d, shared * d], dim=-1)
            q, k = q.float().view(batch, length, heads, d), k.float().view(batch, length, shared, d)
            v = v.view(batch, length, shared, d).repeat_interleave(heads // shared, dim=2)
            if angles is not None:
                q, k = rotate(q, *angles), rotate(k, *angles)
            if self.mixing == "softmax":
                k = k.repeat_interleave(heads // shared, dim=2)
                parts = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
                o = scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)
            else:
                k = feature_map(k, proj).repeat_interleave(heads // shared, dim=2)
                o = self.recurrence(feature_map(q, proj), k, v, decay.log_decay)
            grouped = o.float().reshape(batch, length, d, heads)  # d groups of H neighbouring channels
            centred = grouped - grouped.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            normed = (centred * torch.rsqrt(variance + attributes.epsilon)).flatten(-2)
            out = (normed * norm_weight + norm_bias) * silu(gate.float())
        return out.to(qkv.dtype), None

    def parameters_by_age(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Attention's trained parameters: those that are new, and those that the teacher has."""
        new: list[nn.Parameter] = []
        old: list[nn.Parameter] = []
        for layer in self.net.layers:
            for name, parameter in layer.attention.named_parameters():
                if parameter.requires_grad:
                    (new if name.endswith((*NEW, "original")) else old).append(parameter)
        return new, old


def save(student: Student, like: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint as `convert` lays it out, weights in `dtype`, D1 and D2 in float32.

    Args:
        student: whose weights.
        like: the converted checkpoint that it began as; config.json and the tokenizer are its own.
        folder: must not exist; appears when it is complete.
        dtype: float32, float16 or bfloat16.
    """
    parameters = dict(student.net.named_parameters())
    for index, layer in enumerate(student.net.layers):
        parameters[f"layers.{index}.attention.log_decay"] = layer.attention.log_decay
    with open_checkpoint(like) as source:
        tensors = source.stored_tensors(parameters)
    kept = {
        name: value.detach().to("cpu", torch.float32 if name.endswith((".D1", ".D2")) else dtype).contiguous()
        for name, value in tensors.items()
    }
    with output_folder(folder) as out:
        for file in like.iterdir():
            if not file.name.startswith(("model", "pytorch_model")) and file.name != "config.json":
                shutil.copy2(file, out)
        text = (like / "config.json").read_text(encoding="utf-8")
        (out / "config.json").write_text(_with_dtype(text, str(dtype).removeprefix("torch.")), "utf-8")
        save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


def _with_dtype(config: str, dtype: str) -> str:
    content = json.loads(config)
    content["dtype" if "dtype" in content else "torch_dtype"] = dtype
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _layer(layer: nn.Module, hidden: Tensor, angles: Any, op: Any) -> Tensor:
    # A block hands its sixth argument on to the op as it is: angles here, frequencies elsewhere.
    return layer(hidden, None, None, None, angles, op)[0]


def _attend(attention: nn.Module, x: Tensor, angles: Any, op: Any) -> Tensor:
    return attention(x, None, None, None, angles, op)[0]
