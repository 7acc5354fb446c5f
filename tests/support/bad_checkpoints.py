"""Checkpoints that are changed after they were written, and must then be refused with one clear message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.weight_files import load_tensors, save_tensors

from dijiang_engines.errors import CheckpointError
from dijiang_export.checkpoint.checkpoint import open_checkpoint


def fails(folder: Path, match: str, **options: Any) -> str:
    """Open `folder`, read everything, expect CheckpointError; returns the whole message."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read_all(folder, **options)
    message = str(caught.value)
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 5
    return message


def read_all(folder: Path, **options: Any) -> None:
    with open_checkpoint(folder, **options) as checkpoint:
        for name in checkpoint.names():
            for _ in checkpoint.row_blocks(name):
                pass


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    stored = load_tensors(folder)
    edit(stored)
    save_tensors(folder, {k: v.contiguous() for k, v in stored.items()})
    return folder


def delete(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda stored: stored.__delitem__(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda stored: stored.__setitem__(name, value)


AT = "gpt_neox.layers.0.attention"
