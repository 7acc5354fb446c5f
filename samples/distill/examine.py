"""Where a student is measured: all held-out texts; text also in longer windows and at late positions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.reference.model import ReferenceModel

from .evaluate import Logits, measure
from .settings import Settings
from .student import Student
from .teacher import Teacher
from .tokens import Streams

AT_ONCE = 8192
"""Tokens of windows that are measured together."""


@dataclass(frozen=True)
class Place:
    """Held-out windows of one kind, of one length, that begin at one position."""

    name: str
    kind: str
    length: int
    first: int = 0


class Examiner:
    """Measures students and checkpoints of one run on the same windows."""

    def __init__(self, settings: Settings, spec: ModelSpec, streams: Streams) -> None:
        self.settings, self.spec, self.streams = settings, spec, streams
        self.device = torch.device(settings.device)

    def student(self, student: Student, teacher: Teacher) -> dict[str, Any]:
        """What each place gives for a student in training."""
        student.eval()
        out = {}
        for place in self._places():

            def logits(ids: Tensor, first: int = place.first) -> Tensor:
                starts = torch.full((len(ids),), first, device=ids.device)
                return linear(student(ids, starts), student.head_weight)

            out[place.name] = self._measure(place, logits, teacher)
        return out

    def checkpoint(self, folder: Path, teacher: Teacher) -> dict[str, Any]:
        """The same for what was written, read as `to-onnx` reads it and run by the reference model."""
        with open_checkpoint(folder) as checkpoint:
            reference = ReferenceModel(checkpoint.spec, device=str(self.device))
            reference.load_state_dict(checkpoint.load_state_dict())
        out = {}
        for place in self._places():

            def logits(ids: Tensor, first: int = place.first) -> Tensor:
                return reference(ids, torch.full((len(ids),), first, device=ids.device))[0]

            out[place.name] = self._measure(place, logits, teacher)
        return out

    def _measure(self, place: Place, logits: Logits, teacher: Teacher) -> dict[str, Any]:
        settings = self.settings
        most = max(1, settings.windows * min(settings.context, place.length) // place.length)
        windows = self.streams.windows(place.kind, place.length, most).to(self.device)
        rows = max(1, AT_ONCE // place.length)
        numbers = measure(logits, lambda ids: linear(teacher(ids), teacher.head_weight), windows, rows)
        print(f"  {place.name}: {json.dumps(numbers.facts())}", file=sys.stderr, flush=True)
        return numbers.facts()

    def _places(self) -> Iterator[Place]:
        limit = self.spec.max_position_embeddings
        context, longer = min(self.settings.context, limit), min(self.settings.long_context, limit)
        for kind in self.streams.held_out:
            yield Place(kind, kind, context)
        if longer > context and len(self.streams.held_out["text"]) > longer:
            yield Place(f"text, windows of {longer}", "text", longer)
        last = (self.settings.positions or limit) - context
        if self.spec.rotary_dim and last > 0:
            yield Place(f"text, from position {last}", "text", context, last)
