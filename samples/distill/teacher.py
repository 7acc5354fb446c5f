"""The teacher: transformers' own model, in float32 for measuring and in half the bytes for training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dijiang_export.checkpoint.source import Source
from dijiang_export.scoring.vanilla import load_vanilla


class Teacher(nn.Module):
    """A vanilla checkpoint that answers with what the head takes.

    Args:
        folder: Hugging Face folder, read as `convert` reads it; no code of it is run.
        device: where.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__()
        source = Source(folder)
        try:
            self.family = source.family
            self.net = load_vanilla(source, torch.float32).to(device).eval().requires_grad_(False)
        finally:
            source.close()

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, L], windows that begin at position 0 -> what the head takes, [B, L, E]."""
        return self.net.base_model(ids, use_cache=False).last_hidden_state

    @property
    def head_weight(self) -> Tensor:
        """[V, E]."""
        return self.net.get_output_embeddings().weight

    def half(self) -> Teacher:
        """A copy in bfloat16, which training looks at."""
        return copy.deepcopy(self).bfloat16()

    def compile(self) -> None:  # type: ignore[override]
        """Compile the layers, one code for all of them."""
        for layer in self.net.get_submodule(self.family.attention.split(".{i}")[0]):
            layer.compile(dynamic=False)

    def attentions(self) -> list[nn.Module]:
        """The layers' attention modules."""
        path = self.family.attention
        return [
            self.net.get_submodule(path.format(i=index)) for index in range(self.net.config.num_hidden_layers)
        ]


class Watch:
    """What goes into each attention of a teacher and what comes out, while in a with statement."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Watch:
        self._hooks = [
            module.register_forward_hook(self._keep, with_kwargs=True) for module in self.teacher.attentions()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(input [B, L, h], output [B, L, h]) of every layer's attention."""
        self.seen = []
        with torch.no_grad():
            self.teacher(ids)
        return self.seen

    def _keep(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        self.seen.append((args[0] if args else named["hidden_states"], output[0]))
