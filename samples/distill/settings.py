"""The command line."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dijiang_engines.errors import UsageError

from .recurrence import RECURRENCES
from .student import Mixing


@dataclass(frozen=True)
class Settings:
    """What a run is; the same settings give the same run."""

    teacher: Path
    text: tuple[Path, ...]
    held_out: tuple[Path, ...]
    also: tuple[tuple[str, Path], ...]
    tokens_from: Path | None
    samples_tokens: int
    samples_share: float
    separator: str | None
    context: int
    long_context: int
    batch: int
    align_tokens: int
    distill_tokens: int
    long_tokens: int
    tune_tokens: int
    align_lr: float
    lr: float
    tune_lr: float
    shifted: float
    positions: int | None
    learn_decay: bool
    freeze_projection: bool
    mixing: Mixing
    recurrence: str
    checkpointing: bool
    compile: bool
    windows: int
    dtype: str
    seed: int
    device: str

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {k: _plain(v) for k, v in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def parse(arguments: list[str] | None = None) -> tuple[Settings, Path, float]:
    """Settings, the folder to write, and the minutes between two saved states.

    Raises:
        UsageError: a value makes no sense.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    out, minutes = given.pop("out"), given.pop("save_minutes")
    device = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    given["device"] = device
    if given["compile"] is None:
        given["compile"] = device == "cuda"
    given["also"] = tuple(_named(one) for one in given["also"])
    given["text"], given["held_out"] = tuple(given["text"]), tuple(given["held_out"])
    settings = Settings(**given)
    _check(settings)
    return settings, out, minutes


def _named(option: str) -> tuple[str, Path]:
    name, equals, path = option.partition("=")
    if not (name.isidentifier() and equals and path) or name in ("text", "samples"):
        raise UsageError("--also wants NAME=FILE, with a name that is a word", got=option)
    return name, Path(path)


def _check(settings: Settings) -> None:
    for name in ("context", "long_context", "batch", "windows"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be positive", got=getattr(settings, name))
    if settings.context < 2:
        raise UsageError("--context must be at least 2: a token is predicted from those before it")
    for name in ("align", "distill", "long", "tune", "samples"):
        if getattr(settings, f"{name}_tokens") < 0:
            raise UsageError(f"--{name}-tokens must not be negative")
    for name in ("samples_share", "shifted"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UsageError(
                f"--{name.replace('_', '-')} is a share from 0 to 1", got=getattr(settings, name)
            )
    if settings.tokens_from and (settings.text or settings.held_out or settings.also):
        raise UsageError("--tokens-from takes the place of --text, --held-out and --also")
    if settings.held_out and not settings.text:
        raise UsageError("--held-out goes with --text", hint="name the files to train on too")
    if settings.recurrence == "fla" and not importlib.util.find_spec("fla"):
        raise UsageError("--recurrence fla needs flash-linear-attention", hint="pip install fla-core")
    if settings.recurrence == "fla" and settings.device == "cpu":
        raise UsageError("--recurrence fla needs a GPU", hint="--recurrence chunked")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # PyTorch's CPU build asserts that it has CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(f"no device {settings.device} here", got=reason, hint="--device cpu") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m samples.distill",
        description="A pre-trained Transformer into a DiJiang model, by distillation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="Hugging Face folder of a GPT-NeoX, LLaMA or OPT model")
    add("--out", type=Path, required=True, help="folder to write; one that a run began is gone on with")
    data = parser.add_argument_group("text")
    add = data.add_argument
    add(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        help="files or folders (default: documentation found here)",
    )
    add("--held-out", type=Path, nargs="+", default=[], help="held-out files (default: every 25th of --text)")
    add(
        "--also", nargs="+", default=[], metavar="NAME=FILE", help="texts of other kinds, to evaluate on only"
    )
    add("--tokens-from", type=Path, metavar="RUN", help="the tokens of an earlier run; nothing else is read")
    add("--samples-tokens", type=_count, default=8_000_000, help="of the teacher's own samples; 0: none")
    add("--samples-share", type=float, default=0.25, help="of each batch, that is the teacher's own samples")
    add("--separator", help="token between documents (default: the model's begin, else end of text)")
    steps = parser.add_argument_group("steps", "Numbers of tokens may end with k, M or G.")
    add = steps.add_argument
    add("--context", type=int, default=1024, help="tokens of a window")
    add("--batch", type=int, default=32, help="windows of a step")
    add("--align-tokens", type=_count, default=12_000_000, help="of aligning attention, layer by layer")
    add("--distill-tokens", type=_count, default=100_000_000, help="of distilling logits")
    add("--long-tokens", type=_count, default=10_000_000, help="of distilling logits in longer windows")
    add("--long-context", type=int, default=4096, help="tokens of a longer window")
    add(
        "--tune-tokens", type=_count, default=0, help="a comparison: then tune both models on the text itself"
    )
    add("--align-lr", type=float, default=1e-3, help="peak; three times that for what is new")
    add("--lr", type=float, default=1e-3, help="peak")
    add("--tune-lr", type=float, default=2e-4, help="peak")
    add("--shifted", type=float, default=0.25, help="share of windows that begin at any later position")
    add("--positions", type=int, help="where windows end at most (default: the model's own last position)")
    student = parser.add_argument_group("student")
    add = student.add_argument
    add("--learn-decay", action="store_true", help="train one decay a head")
    add("--freeze-projection", action="store_true", help="do not train P of the feature map")
    add("--mixing", choices=("dijiang", "softmax"), default="dijiang", help="softmax: a control (README)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="of stored weights")
    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", help="cuda or cpu (default: what is there)")
    add("--recurrence", choices=tuple(RECURRENCES), default="chunked", help="fla: for long runs (README)")
    add("--checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile layers (default: on CUDA)")
    add("--windows", type=int, default=128, help="held-out windows of each kind")
    add("--save-minutes", type=float, default=3.0, help="between two saved states")
    add("--seed", type=int, default=0)
    return parser


def _count(text: str) -> int:
    factor = {"k": 1000, "M": 1000**2, "G": 1000**3}.get(text[-1:], 1)
    try:
        return round(float(text.rstrip("kMG")) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens") from None
