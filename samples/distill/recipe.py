"""A run in its folder, from the beginning or from where it was left."""

from __future__ import annotations

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.errors import CheckpointError, OutputError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.source import Source
from dijiang_export.convert import convert_checkpoint

from .card import write_card
from .examine import Examiner
from .prepare import make_streams, shares
from .recurrence import RECURRENCES
from .settings import Settings
from .student import Student, save
from .teacher import Teacher
from .tokens import Streams, load_streams
from .training import Stage, Trainer

LONGER_FACTOR = 0.25
"""Of the peak learning rate, in longer windows."""
WRITTEN = "this checkpoint"
"""Under which name the numbers are kept that what was written has."""


class Recipe:
    """A run. Its folder gets converted/, tokens.safetensors, state.pt, metrics.json, and dijiang/ in the end.

    Args:
        settings: what to do.
        out: the folder, new or of a run with the same settings.
        arguments: of the command line, for the card.

    Raises:
        CheckpointError: the teacher cannot be converted.
        OutputError: `out` is something else.
        UsageError: `out` was begun with other settings.
    """

    def __init__(self, settings: Settings, out: Path, arguments: list[str]) -> None:
        self.settings, self.out = settings, out
        self.device = torch.device(settings.device)
        self.command = " ".join(["python -m samples.distill", *arguments])
        if out.exists():
            self._go_on()
        else:
            self._begin()
        with open_checkpoint(out / "converted") as checkpoint:
            self.spec = checkpoint.spec

    def run(self, minutes: float) -> None:
        """Do everything that is not done yet; a state is saved every so many minutes."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.teacher = Teacher(settings.teacher, self.device)
        self.stages = stages_of(settings, self.spec)
        self.streams = self._streams()
        self.examiner = Examiner(settings, self.spec, self.streams)
        self.student = self._student()
        self.trainer = trainer = Trainer(
            self.teacher,
            self.student,
            self.streams,
            seed=settings.seed,
            shifted=settings.shifted,
            positions=settings.positions or self.spec.max_position_embeddings,
            compiled=settings.compile,
            state=self.out / "state.pt",
            save_seconds=60 * minutes,
        )
        trainer.load()
        if not trainer.at.done:
            numbers = self.examiner.student(self.student, self.teacher)
            trainer.at.done.append({"name": "converted", "tokens": 0, "held_out": numbers})
        for index in range(trainer.at.stage, len(self.stages)):
            stage = self.stages[index]
            if stage.kind in ("tune", "tune teacher"):
                self._write()  # tuning is a comparison: the student before it is what was asked for
            trainer.run(stage)
            beside = trainer.tuned if stage.kind == "tune teacher" else None
            numbers = self.examiner.student(self.student, beside or self.teacher)
            trainer.finish(stage.facts() | {"held_out": numbers})
        self._write()

    def _begin(self) -> None:
        source = Source(self.settings.teacher)
        dijiang = source.has_dijiang
        source.close()
        if dijiang:
            raise CheckpointError(
                f"{self.settings.teacher} is a DiJiang model already",
                expected="the Transformer that it was made from",
            )
        with output_folder(self.out) as folder:
            convert_checkpoint(self.settings.teacher, folder / "converted", seed=self.settings.seed)
            (folder / "settings.json").write_text(json.dumps(self.settings.facts(), indent=1) + "\n")

    def _go_on(self) -> None:
        kept = self.out / "settings.json"
        if not kept.is_file():
            raise OutputError(
                f"{self.out} exists, and no run of this recipe began it", hint="name another --out"
            )
        before, now = json.loads(kept.read_text()), self.settings.facts()
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise UsageError(
                f"{self.out} was begun with other settings",
                got=", ".join(f"{name} {now[name]}" for name in changed),
                expected=", ".join(f"{name} {before.get(name)}" for name in changed),
                hint="give the same ones to go on, or name another --out",
            )

    def _streams(self) -> Streams:
        kept = self.out / "tokens.safetensors"
        if not kept.is_file():
            streams = self._new_streams()
            streams.check(max((stage.context for stage in self.stages), default=self.settings.context))
            streams.save(kept)
        return load_streams(kept, shares(self.settings))

    def _new_streams(self) -> Streams:
        settings = self.settings
        if settings.tokens_from is None:
            return make_streams(settings, self.teacher)
        earlier = settings.tokens_from / "tokens.safetensors"
        if not earlier.is_file():
            raise UsageError(f"{settings.tokens_from} holds no run's tokens", expected=earlier)
        streams = load_streams(earlier, shares(settings))
        most = max(int(ids.max()) for ids in (*streams.train.values(), *streams.held_out.values()))
        if most >= (vocabulary := self.teacher.net.config.vocab_size):
            raise UsageError(
                f"{settings.tokens_from} was another tokenizer's run",
                got=most,
                expected=f"below {vocabulary}",
            )
        return streams

    def _student(self) -> Student:
        settings = self.settings
        return Student(
            self.out / "converted",
            RECURRENCES[settings.recurrence],
            learn_decay=settings.learn_decay,
            freeze_projection=settings.freeze_projection,
            mixing=settings.mixing,
            checkpointing=settings.checkpointing,
            compiled=settings.compile,
        ).to(self.device)

    def _write(self) -> None:
        """The checkpoint, if it is not there yet, metrics.json, and the card."""
        target, done = self.out / "dijiang", self.trainer.at.done
        if self.settings.mixing == "dijiang":
            if not target.exists():
                save(self.student, self.out / "converted", target, getattr(torch, self.settings.dtype))
            if all(stage["name"] != WRITTEN for stage in done):
                numbers = self.examiner.checkpoint(target, self.teacher)
                done.append({"name": WRITTEN, "tokens": 0, "held_out": numbers})
        metrics = self._metrics()
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        if target.exists():
            write_card(metrics, target)

    def _metrics(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": self.out.name,
            "command": self.command,
            "settings": self.settings.facts(),
            "model": {
                "teacher": self.settings.teacher.name,
                "family": spec.family,
                "layers": spec.num_layers,
                "heads": spec.num_heads,
                "head_dim": spec.head_dim,
                "hidden": spec.hidden_size,
                "parameters": sum(parameter.numel() for parameter in self.student.net.parameters()),
                "state_bytes": 4 * spec.num_layers * spec.num_heads * spec.head_dim**2,
            },
            "machine": self._machine(),
            "data": {kind: self._data(kind) for kind in self.streams.held_out},
            "stages": self.trainer.at.done,
        }

    def _machine(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "fla": metadata.version("fla-core") if self.settings.recurrence == "fla" else None,
            "most_memory": torch.cuda.max_memory_allocated() if on_gpu else None,
        }

    def _data(self, kind: str) -> dict[str, Any]:
        files, earlier = self.settings.text, self.settings.tokens_from
        if earlier is not None:
            return self._counts(kind) | {"origin": f"Taken from the run {earlier.name}."}
        origins = {
            "text": f"From {', '.join(map(str, files))}." if files else "Documentation found on the machine.",
            "samples": "Written by the teacher itself.",
        }
        return self._counts(kind) | {"origin": origins.get(kind, "To evaluate on only.")}

    def _counts(self, kind: str) -> dict[str, Any]:
        trained, held_out = self.streams.train.get(kind, ()), self.streams.held_out[kind]
        return {"train": len(trained), "held_out": len(held_out)}


def stages_of(settings: Settings, spec: ModelSpec) -> list[Stage]:
    """The steps of the recipe that have tokens. A longer window makes a batch of fewer."""
    limit = spec.max_position_embeddings
    context, longer = min(settings.context, limit), min(settings.long_context, limit)

    def stage(name: str, kind: Any, tokens: int, length: int, peak: float) -> Stage:
        rows = max(1, settings.batch * context // length)
        return Stage(name, kind, math.ceil(tokens / (rows * length)), rows, length, peak)

    stages = [
        stage("aligned", "align", settings.align_tokens, context, settings.align_lr),
        stage("distilled", "distill", settings.distill_tokens, context, settings.lr),
        stage("longer windows", "distill", settings.long_tokens, longer, LONGER_FACTOR * settings.lr),
        stage("tuned on the text", "tune", settings.tune_tokens, context, settings.tune_lr),
        stage("teacher tuned too", "tune teacher", settings.tune_tokens, context, settings.tune_lr),
    ]
    return [one for one in stages if one.steps]
