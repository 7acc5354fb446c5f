"""`python -m samples.distill --teacher FOLDER --out FOLDER`: see README.md."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # for caches that grow

import torch
from torch import Tensor
from tqdm import tqdm

from dijiang_engines.errors import CheckpointError, DijiangError, OutputError, UsageError
from dijiang_engines.formats.atomic import output_folder
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.source import Source
from dijiang_export.convert import convert_checkpoint
from dijiang_export.reference.model import ReferenceModel

from .card import write_card
from .evaluate import measure
from .own_samples import own_samples
from .recurrence import RECURRENCES
from .settings import Settings, parse
from .student import Student, save
from .teacher import Teacher
from .text import documentation, read_files
from .tokens import Streams, encode, load_streams, read_tokenizer
from .training import Stage, Trainer

HELD_SAMPLES = 16
"""One of so many of the teacher's own samples is held out."""


def main(arguments: list[str] | None = None) -> int:
    """Run, or go on; the exit status."""
    try:
        settings, out, minutes = parse(arguments)
        Recipe(settings, out, sys.argv[1:] if arguments is None else arguments).run(minutes)
    except DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return 130
    return 0


class Recipe:
    """A run in its folder: converted/, tokens.safetensors, state.pt, metrics.json, and dijiang/ in the end."""

    def __init__(self, settings: Settings, out: Path, arguments: list[str]) -> None:
        self.settings, self.out = settings, out
        self.device = torch.device(settings.device)
        self.command = " ".join(["python -m samples.distill", *arguments])
        self._begin()

    def run(self, minutes: float) -> None:
        """Everything that is not done yet."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.teacher = Teacher(settings.teacher, self.device)
        streams = self._streams()
        student = self._student(self.out / "converted", compiled=settings.compile)
        trainer = Trainer(
            self.teacher,
            student,
            streams,
            seed=settings.seed,
            shifted=settings.shifted,
            positions=settings.positions or student.spec.max_position_embeddings,
            compiled=settings.compile,
            state=self.out / "state.pt",
            save_seconds=60 * minutes,
        )
        trainer.load()
        if not trainer.at.done:
            numbers = self._measure(student, streams, self.teacher)
            trainer.at.done.append({"name": "converted", "tokens": 0, "held_out": numbers})
        for index, stage in enumerate(self._stages()):
            if index < trainer.at.stage:
                continue
            if stage.kind in ("tune", "tune teacher"):
                self._write(trainer, student, streams)
            trainer.run(index, stage)
            beside = trainer.tuned if stage.kind == "tune teacher" else self.teacher
            numbers = self._measure(student, streams, beside)
            trainer.finish(_facts(stage) | {"held_out": numbers})
        self._write(trainer, student, streams)

    def _begin(self) -> None:
        """Make the folder, or see that the run in it is this one."""
        kept = self.out / "settings.json"
        if self.out.exists():
            if not kept.is_file():
                raise OutputError(
                    f"{self.out} exists, and no run of this recipe began it", hint="name another --out"
                )
            before = json.loads(kept.read_text())
            now = self.settings.facts()
            changed = [name for name in now if before.get(name) != now[name]]
            if changed:
                raise UsageError(
                    f"{self.out} was begun with other settings",
                    got=", ".join(f"{name} {now[name]}" for name in changed),
                    expected=", ".join(f"{name} {before.get(name)}" for name in changed),
                    hint="give the same ones to go on, or name another --out",
                )
            return
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

    def _student(self, folder: Path, *, compiled: bool) -> Student:
        settings = self.settings
        return Student(
            folder,
            RECURRENCES[settings.recurrence],
            learn_decay=settings.learn_decay,
            freeze_projection=settings.freeze_projection,
            mixing=settings.mixing,
            checkpointing=settings.checkpointing,
            compiled=compiled,
        ).to(self.device)

    def _streams(self) -> Streams:
        settings, kept = self.settings, self.out / "tokens.safetensors"
        share = settings.samples_share if settings.samples_tokens else 0.0
        shares = {"text": 1 - share, "samples": share}
        if not kept.is_file():
            streams = Streams(*self._tokens(), shares)
            streams.check(max(stage.context for stage in self._stages()))
            beside = kept.with_suffix(".new")
            streams.save(beside)
            beside.replace(kept)
        return load_streams(kept, shares)

    def _tokens(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        settings = self.settings
        tokenizer = read_tokenizer(settings.teacher, self.teacher.net.config.vocab_size)
        separator = self._separator(tokenizer)
        documents = read_files(settings.text) if settings.text else documentation()
        if settings.held_out:
            train, held = documents, read_files(settings.held_out)
        else:
            train = [d for d in documents if not d.held_out]
            held = [d for d in documents if d.held_out]
        texts = {"train": {"text": encode(train, tokenizer, separator)}}
        texts["held_out"] = {"text": encode(held, tokenizer, separator)}
        for name, path in settings.also:
            texts["held_out"][name] = encode(read_files([path]), tokenizer, separator)
        if settings.samples_tokens:
            rows = self._own_samples(separator)
            held_rows = max(1, len(rows) // HELD_SAMPLES)
            texts["train"]["samples"] = rows[held_rows:].flatten()
            texts["held_out"]["samples"] = rows[:held_rows].flatten()
        return texts["train"], texts["held_out"]

    def _separator(self, tokenizer: Any) -> int:
        config = self.teacher.net.config
        if self.settings.separator is not None:
            token = tokenizer.token_to_id(self.settings.separator)
            if token is None:
                raise UsageError("the tokenizer has no such token", got=self.settings.separator)
            return int(token)
        for token in (config.bos_token_id, config.eos_token_id):
            if isinstance(token, int):
                return token
        raise UsageError(
            "the model names no token for the begin or end of text", hint="name one with --separator"
        )

    def _own_samples(self, separator: int) -> Tensor:
        settings, config = self.settings, self.teacher.net.config
        length = min(512, settings.context)
        rows = -(-settings.samples_tokens // length)
        begins = {separator, config.bos_token_id} - {None}
        teacher = self.teacher.half() if self.device.type == "cuda" else self.teacher
        at_once = self._rows_at_once(length)
        parts = []
        with tqdm(
            total=rows * length, desc="teacher's own samples", unit="tok", unit_scale=True, mininterval=10
        ) as bar:
            for start in range(0, rows, at_once):
                count = min(at_once, rows - start)
                seed = f"{settings.seed} {start}"
                parts.append(own_samples(teacher, sorted(begins), count, length, seed, bar.update))
        del teacher
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return torch.cat(parts)

    def _rows_at_once(self, length: int) -> int:
        """So many texts that their caches take a fifth of the GPU's memory."""
        if self.device.type != "cuda":
            return 64
        spec = self._spec()
        each = 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * length + 12 * spec.vocab_size
        return max(1, min(4096, torch.cuda.get_device_properties(self.device).total_memory // 5 // each))

    def _spec(self) -> Any:
        with open_checkpoint(self.out / "converted") as checkpoint:
            return checkpoint.spec

    def _stages(self) -> list[Stage]:
        settings = self.settings
        limit = self._spec().max_position_embeddings
        context = min(settings.context, limit)
        longer = min(settings.long_context, limit)

        def stage(name: str, kind: Any, tokens: int, context: int, peak: float) -> Stage:
            rows = max(1, settings.batch * min(settings.context, limit) // context)
            return Stage(name, kind, math.ceil(tokens / (rows * context)), rows, context, peak)

        stages = [
            stage("aligned", "align", settings.align_tokens, context, settings.align_lr),
            stage("distilled", "distill", settings.distill_tokens, context, settings.lr),
            stage("longer windows", "distill", settings.long_tokens, longer, settings.lr / 4),
            stage("tuned on the text", "tune", settings.tune_tokens, context, settings.tune_lr),
            stage("teacher tuned too", "tune teacher", settings.tune_tokens, context, settings.tune_lr),
        ]
        return [one for one in stages if one.steps]

    def _measure(self, student: Student, streams: Streams, teacher: Teacher) -> dict[str, Any]:
        """Of every kind of held-out text; of `text` also in longer windows and at the last positions."""
        student.eval()
        spec, settings = student.spec, self.settings
        context = min(settings.context, spec.max_position_embeddings)
        longer = min(settings.long_context, spec.max_position_embeddings)
        places = [(kind, kind, context, 0) for kind in streams.held_out]
        if longer > context and len(streams.held_out["text"]) > longer:
            places.append((f"text, windows of {longer}", "text", longer, 0))
        last = (settings.positions or spec.max_position_embeddings) - context
        if spec.rotary_dim and last > 0:
            places.append((f"text, from position {last}", "text", context, last))
        out = {}
        for name, kind, length, first in places:
            windows = streams.windows(kind, length, max(1, settings.windows * context // length))

            def logits(ids: Tensor, first: int = first) -> Tensor:
                starts = torch.full((len(ids),), first, device=ids.device)
                return torch.nn.functional.linear(student(ids, starts), student.head_weight)

            numbers = measure(logits, _logits(teacher), windows.to(self.device), max(1, 8192 // length))
            print(f"  {name}: {json.dumps(numbers.facts())}", file=sys.stderr, flush=True)
            out[name] = numbers.facts()
        return out

    def _write(self, trainer: Trainer, student: Student, streams: Streams) -> None:
        """metrics.json, and the checkpoint with its card; once it is there, the card alone."""
        target = self.out / "dijiang"
        if self.settings.mixing == "dijiang":
            if not target.exists():
                save(student, self.out / "converted", target, getattr(torch, self.settings.dtype))
                numbers = self._check(target, streams)
                trainer.at.done.append(
                    {"name": "this checkpoint, by the reference", "tokens": 0, "held_out": numbers}
                )
        metrics = self._metrics(trainer, streams, student)
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        if target.exists():
            write_card(metrics, target)

    def _check(self, folder: Path, streams: Streams) -> dict[str, Any]:
        """What was written, read as `to-onnx` reads it and run by the reference model."""
        with open_checkpoint(folder) as checkpoint:
            reference = ReferenceModel(checkpoint.spec, device=str(self.device))
            reference.load_state_dict(checkpoint.load_state_dict())
        out = {}
        for kind in streams.held_out:
            windows = streams.windows(
                kind, min(self.settings.context, reference.spec.max_position_embeddings), 32
            )
            numbers = measure(
                lambda ids: reference(ids)[0], _logits(self.teacher), windows.to(self.device), 8
            )
            out[kind] = numbers.facts()
        return out

    def _metrics(self, trainer: Trainer, streams: Streams, student: Student) -> dict[str, Any]:
        spec, settings = student.spec, self.settings
        origins = {
            "text": "Files: " + ", ".join(map(str, settings.text))
            if settings.text
            else "Documentation found here.",
            "samples": "Written by the teacher itself.",
        }
        return {
            "name": self.out.name,
            "command": self.command,
            "settings": settings.facts(),
            "model": {
                "teacher": settings.teacher.name,
                "family": spec.family,
                "layers": spec.num_layers,
                "heads": spec.num_heads,
                "head_dim": spec.head_dim,
                "hidden": spec.hidden_size,
                "parameters": sum(p.numel() for p in student.net.parameters()),
                "state_bytes": 4 * spec.num_layers * spec.num_heads * spec.head_dim**2,
            },
            "machine": {
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": metadata.version("transformers"),
                "fla": metadata.version("fla-core") if settings.recurrence == "fla" else "",
                "most_memory": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            },
            "data": {
                kind: {
                    "train": len(streams.train.get(kind, ())),
                    "held_out": len(ids),
                    "origin": origins.get(kind, "To evaluate on only."),
                }
                for kind, ids in streams.held_out.items()
            },
            "stages": trainer.at.done,
        }


def _facts(stage: Stage) -> dict[str, Any]:
    losses = {"align": "relative error of attention", "distill": "KL to the teacher, nats"}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "loss": losses.get(stage.kind, "nats a token"),
        "tokens": stage.tokens,
        "rows": stage.rows,
        "context": stage.context,
        "peak": stage.peak,
    }


def _logits(teacher: Teacher) -> Any:
    return lambda ids: torch.nn.functional.linear(teacher(ids), teacher.head_weight)


if __name__ == "__main__":
    sys.exit(main())
