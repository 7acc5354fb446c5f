"""One loop for every step: which tokens, which loss, which parameters, and a state that survives an end.

The steps follow RADLADS (arXiv 2505.03005): attention's outputs are aligned with the teacher's layer by
layer, then logits are distilled, then once more in longer windows. What differs: the new parameters learn
three times as fast as the kept ones while aligning, and the learning rate falls in every step.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dijiang_engines.errors import DijiangError, OutputError

from .losses import divergence, mean_by_rows, surprise
from .student import Student
from .teacher import Teacher, Watch
from .tokens import Streams, number

Kind = Literal["align", "distill", "tune", "tune teacher"]
LOSSES: dict[str, str] = {
    "align": "relative error of attention",
    "distill": "KL to the teacher, nats",
    "tune": "nats a token",
    "tune teacher": "nats a token",
}
"""What the loss of each kind of step is."""
NEW_FACTOR = 3.0
"""How much faster parameters learn while aligning that the teacher does not have."""
LEAST_FACTOR = 0.03
"""Of the peak learning rate, at the end of a step."""


class TrainingError(DijiangError):
    """Training cannot go on: the loss is not a number, or memory is too small."""


@dataclass(frozen=True)
class Stage:
    """One step of the recipe."""

    name: str
    kind: Kind
    steps: int
    rows: int
    context: int
    peak: float

    @property
    def tokens(self) -> int:
        """In all."""
        return self.steps * self.rows * self.context

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens": self.tokens, "loss": LOSSES[self.kind]}


@dataclass
class Progress:
    """What a state holds beside weights: where the run is, and what it has measured."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    """Of the present stage."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, mean loss since the point before) of the present stage."""
    done: list[dict[str, Any]] = field(default_factory=list)
    """The stages before it."""


class Trainer:
    """Models, streams and a state. `run` goes on from wherever the state is.

    Args:
        teacher: float32, on the device.
        student: on the device.
        streams: tokens.
        seed: of windows.
        shifted: share of windows that begin at a random position.
        positions: the last of them end there.
        compiled: compile the losses and the teacher.
        state: file of the state.
        save_seconds: between two states.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Student,
        streams: Streams,
        *,
        seed: int,
        shifted: float,
        positions: int,
        compiled: bool,
        state: Path,
        save_seconds: float,
    ) -> None:
        self.teacher, self.student, self.streams = teacher, student, streams
        self.seed, self.compiled = seed, compiled
        self.shifted, self.positions = shifted, positions
        self.state, self.save_seconds = state, save_seconds
        self.device = teacher.head_weight.device
        self.half = self.device.type == "cuda"
        self.guide = teacher.half() if self.half else teacher
        self.tuned: Teacher | None = None
        self.at = Progress()
        self._optimizer: dict[str, Any] | None = None
        self._divergence = torch.compile(divergence, dynamic=False) if compiled else divergence
        self._surprise = torch.compile(surprise, dynamic=False) if compiled else surprise

    def run(self, stage: Stage) -> None:
        """Bring a stage to its end, from the step that the state has.

        Raises:
            TrainingError: a loss that is not finite, which is not learned from; too little memory.
            OutputError: the state cannot be written.
        """
        watch = Watch(self.guide) if stage.kind == "align" else None
        if self.compiled and stage.kind == "distill":
            self.guide.compile()  # not before: hooks, which aligning needs, would make a code for each layer
        groups = self._groups(stage)
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=self.half)
        if self._optimizer is not None:
            optimizer.load_state_dict(self._optimizer)
            self._optimizer = None
        self.student.train()
        every, since, running = max(1, stage.steps // 40), 0, torch.zeros((), device=self.device)
        saved = started = time.monotonic()
        before = self.at.seconds
        checked = _Checked(stage, self.state)
        with _memory(), self._bar(stage) as bar:
            for step in range(self.at.step, stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _factor(step, stage.steps)
                loss = self._loss(stage, self._batch(stage, step), watch)
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                running += loss
                since += 1
                value = checked(step, loss, norm)
                now = time.monotonic()
                self.at.seconds = before + now - started
                self.at.step = step + 1
                bar.set_postfix(loss=f"{value:.4f}", refresh=False)
                bar.update(stage.rows * stage.context)
                if since == every or step + 1 == stage.steps:
                    checked.wait()
                    tokens = (step + 1) * stage.rows * stage.context
                    self.at.curve.append((tokens, running.item() / since))
                    running.zero_()
                    since = 0
                # A curve's point must not be cut in two by a resumption: states are saved at points.
                if since == 0 and now - saved > self.save_seconds and step + 1 < stage.steps:
                    self.save(optimizer)
                    saved = time.monotonic()

    def finish(self, facts: dict[str, Any]) -> None:
        """Note what a stage gave, and go on to the next."""
        self.at.done.append(facts | {"seconds": round(self.at.seconds, 1), "curve": self.at.curve})
        self.at = Progress(stage=self.at.stage + 1, done=self.at.done)
        self.save(None)

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write the state, whole or not at all.

        Raises:
            OutputError: it cannot be written; the state before it is kept.
        """
        content = {
            "at": vars(self.at),
            "student": self.student.state_dict(),
            "tuned": self.tuned.state_dict() if self.tuned else None,
            "optimizer": optimizer.state_dict() if optimizer else None,
        }
        beside = self.state.with_suffix(".new")
        try:
            torch.save(content, beside)
            os.replace(beside, self.state)
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
            beside.unlink(missing_ok=True)
            raise OutputError(
                f"the state cannot be written to {self.state}",
                got=str(error).splitlines()[0],
                hint="make room, and give the same command again: it goes on from the state before",
            ) from None

    def load(self) -> None:
        """Go on from the state, if there is one."""
        if not self.state.is_file():
            return
        content = torch.load(self.state, map_location=self.device, weights_only=True)
        self.at = Progress(**content["at"])
        self.student.load_state_dict(content["student"])
        if content["tuned"] is not None:
            self._copy_teacher().load_state_dict(content["tuned"])
        self._optimizer = content["optimizer"]

    def _copy_teacher(self) -> Teacher:
        self.tuned = copy.deepcopy(self.teacher).requires_grad_(True)
        return self.tuned

    def _groups(self, stage: Stage) -> list[dict[str, Any]]:
        def group(parameters: list[nn.Parameter], peak: float) -> dict[str, Any]:
            return {"params": parameters, "lr": peak, "peak": peak}

        if stage.kind == "align":
            new, old = self.student.parameters_by_age()
            return [group(new, NEW_FACTOR * stage.peak), group(old, stage.peak)]
        if stage.kind == "tune teacher":
            return [group(list((self.tuned or self._copy_teacher()).parameters()), stage.peak)]
        return [group([p for p in self.student.parameters() if p.requires_grad], stage.peak)]

    def _batch(self, stage: Stage, step: int) -> tuple[Tensor, Tensor]:
        """Windows int64 [B, L + 1] of a step, and the positions [B] at which the student sees them begin.

        RoPE makes the teacher blind to where a window begins. The student is not: it has RoPE before φ's
        softmax. A model with learned positions is taught from position 0 on only.
        """
        seed = f"{self.seed} {stage.name} {step}"
        windows = self.streams.batch(seed, stage.rows, stage.context)
        room = self.positions - stage.context
        first = torch.zeros(stage.rows, dtype=torch.int64)
        if self.student.spec.rotary_dim and room > 0:
            generator = torch.Generator().manual_seed(number(f"{seed} positions"))
            later = torch.randint(room + 1, (stage.rows,), generator=generator)
            first = torch.where(torch.rand(stage.rows, generator=generator) < self.shifted, later, first)
        if self.half:  # pinned memory: a copy from any other waits for everything before it
            windows, first = windows.pin_memory(), first.pin_memory()
        return windows.to(self.device, non_blocking=True), first.to(self.device, non_blocking=True)

    def _loss(self, stage: Stage, batch: tuple[Tensor, Tensor], watch: Watch | None) -> Tensor:
        """A step's loss, with gradients where they belong."""
        windows, first = batch
        ids, targets = windows[:, :-1], windows[:, 1:]
        if watch is not None:
            with watch:
                return self._align(ids, first, watch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if stage.kind == "distill":
                with torch.no_grad():
                    seen = self.guide(ids)
                weights = self.student.head_weight, self.guide.head_weight
                loss = mean_by_rows(self._divergence, self.student(ids, first), seen, *weights)
            else:
                if stage.kind == "tune":
                    hidden, weight = self.student(ids, first), self.student.head_weight
                else:
                    assert self.tuned is not None
                    hidden, weight = self.tuned(ids), self.tuned.head_weight
                loss = mean_by_rows(self._surprise, hidden, targets, weight)
        loss.backward()
        return loss.detach()

    def _align(self, ids: Tensor, first: Tensor, watch: Watch) -> Tensor:
        """The mean over layers of ‖student - teacher‖² / ‖teacher‖², each fed what the teacher's was."""
        seen = watch(ids)
        angles = self.student.angles(first, ids.shape[1])
        total = torch.zeros((), device=self.device)
        for layer, (x, wanted) in enumerate(seen):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                given = self.student.attend(layer, x, angles)
            wanted = wanted.float()
            loss = (given.float() - wanted).square().mean() / wanted.square().mean()
            (loss / len(seen)).backward()
            total += loss.detach()
        return total / len(seen)

    def _bar(self, stage: Stage) -> tqdm:
        done = self.at.step * stage.rows * stage.context
        return tqdm(
            total=stage.tokens, initial=done, desc=stage.name, unit="tok", unit_scale=True, mininterval=10
        )


class _Checked:
    """Sees that losses and gradients are finite, a step late: to wait for each would leave the GPU idle.

    What a step that was not finite did to the weights is in memory only: no state is saved before `wait`.
    """

    def __init__(self, stage: Stage, state: Path) -> None:
        self.stage, self.state = stage, state
        self.due: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.value = math.nan

    def __call__(self, step: int, loss: Tensor, norm: Tensor) -> float:
        """Take a step's numbers; the loss of the last step that was looked at."""
        numbers = torch.stack((loss, norm.to(loss.dtype)))
        event = None
        if numbers.is_cuda:
            here = torch.empty(2, pin_memory=True)
            here.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = here
        earlier, self.due = self.due, (step, numbers, event)
        if earlier is not None:
            self._look(*earlier)
        return self.value

    def wait(self) -> None:
        """Look at what is left."""
        if self.due is not None:
            self._look(*self.due)
            self.due = None

    def _look(self, step: int, numbers: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        self.value, norm = numbers.tolist()
        if not (math.isfinite(self.value) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step + 1} of '{self.stage.name}' is not finite: loss {self.value}, gradient {norm}",
                hint=f"{self.state} holds the last good state; begin anew with a lower learning rate",
            )


def _factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warmup = min(50, max(1, steps // 10))
    through = (step - warmup) / max(1, steps - warmup)
    fall = LEAST_FACTOR + (1 - LEAST_FACTOR) * (1 + math.cos(math.pi * max(0.0, through))) / 2
    return min(1.0, (step + 1) / warmup) * fall


@contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU's memory is too small for this step",
            got=str(error).splitlines()[0],
            hint="lower --batch, or add --checkpointing",
        ) from None
