"""What every way to make a model's decoding step has: inputs, states, logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dijiang_engines.spec import ModelSpec


class Step(ABC):
    """A step of some rows.

    Args:
        spec: of the model.
        rows: sequences.
        device: where the tensors are.
        integers: of positions and lens.

    Attributes:
        ids: int64 [rows]; positions, lens: [rows]; read by `run`.
        states: float32 [rows, H, d, d] of each layer, changed by `run`.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, device: torch.device | str, integers: torch.dtype = torch.int64
    ) -> None:
        self.spec, self.rows = spec, rows
        shape = (rows, *spec.state_shape)
        self.states = [torch.zeros(shape, device=device) for _ in range(spec.num_layers)]
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions, self.lens = (torch.zeros(rows, dtype=integers, device=device) for _ in range(2))

    @property
    @abstractmethod
    def logits(self) -> Tensor:
        """[rows, V], written by `run`."""

    @abstractmethod
    def run(self) -> None:
        """Enqueue a step over what ids, positions, lens and states hold."""

    def start(self, ids: Any, positions: Any, lens: Any, states: list[Any]) -> None:
        """Fill in the inputs, and poison the logits."""
        for mine, given in ((self.ids, ids), (self.positions, positions), (self.lens, lens)):
            mine.copy_(torch.as_tensor(given).reshape(-1))
        for mine, given in zip(self.states, states, strict=True):
            mine.copy_(torch.as_tensor(given))
        self.logits.fill_(float("nan"))
