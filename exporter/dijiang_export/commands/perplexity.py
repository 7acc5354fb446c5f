"""`dijiang-export perplexity`: how well a bundle, an engine or a checkpoint predicts the text of files."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from dijiang_export.commands.arguments import (
    COUNT,
    FILE,
    PATH,
    NoVerify,
    RunnerArguments,
    Save,
    one_of,
    takes,
)
from dijiang_export.commands.common import Output, finish, is_checkpoint

if TYPE_CHECKING:
    from rich.console import Group

    from dijiang_engines.scoring.perplexity import Cutting, Perplexity, Score
    from dijiang_engines.scoring.readers import Reader
    from dijiang_engines.scoring.texts import Joining, Text
    from dijiang_engines.tokenizer.tokenizer import Tokenizer

Dtype = Literal["float32", "float64", "float16", "bfloat16"]
MOST_FILES_SHOWN = 40
"""In the table for people; JSON has all."""


@dataclass(frozen=True)
class TextArguments:
    """How texts become streams of tokens, and streams windows."""

    window: Annotated[
        int | None,
        click.option(
            "--window", type=COUNT,
            help="Tokens that are read from an empty state; nothing is carried from one window to the next. "
            "[default: the model's context, at most 1024]",
        ),
    ]  # fmt: skip
    stride: Annotated[
        int | None,
        click.option(
            "--stride", type=COUNT,
            help="Begin a window every so many tokens; where windows overlap, the earlier one's predictions "
            "count. [default: --window]",
        ),
    ]  # fmt: skip
    carry: Annotated[
        bool,
        click.option(
            "--carry", is_flag=True, help="Read each file to its end with its state carried on: no windows."
        ),
    ]
    limit: Annotated[
        int | None,
        click.option("--limit", type=COUNT, help="Predict the first so many tokens of all files only."),
    ]
    begin: Annotated[
        str | None,
        click.option(
            "--begin", metavar="TOKEN",
            help="The token before each file. [default: the tokenizer's own, or the model's "
            "beginning-of-text token]",
        ),
    ]  # fmt: skip
    no_begin: Annotated[
        bool,
        click.option("--no-begin", is_flag=True, help="No token before a file: its own first one is given."),
    ]
    separator: Annotated[
        str | None,
        click.option(
            "--separator", metavar="TOKEN",
            help="Read all files as one stream, with this token before, between and behind them.",
        ),
    ]  # fmt: skip
    batch: Annotated[
        int | None,
        click.option("--batch", type=COUNT, help="Most windows that are read at once. [default: what fits]"),
    ]

    def joining(self) -> Joining:
        """What stands around texts."""
        from dijiang_engines.generation.prompts import check_argument
        from dijiang_engines.scoring.texts import Joining

        begin = None if self.begin is None else check_argument(self.begin, "--begin")
        separator = None if self.separator is None else check_argument(self.separator, "--separator")
        return Joining(begin, self.no_begin, separator)

    def cutting(self) -> Cutting:
        """How streams are read."""
        from dijiang_engines.scoring.perplexity import Cutting

        return Cutting(self.window, self.stride, self.carry, self.batch)


@dataclass(frozen=True)
class PerplexityArguments:
    """What `perplexity` is given."""

    model: Annotated[Path, click.argument("model", type=PATH)]
    files: Annotated[
        tuple[Path, ...], click.argument("files", metavar="FILE...", nargs=-1, required=True, type=PATH)
    ]
    against: Annotated[
        Path | None,
        click.option(
            "--against", type=PATH, metavar="OTHER",
            help="Another bundle, engine or checkpoint of the same vocabulary: also its perplexity, the KL "
            "divergence from it, and how often both find the same token the likeliest.",
        ),
    ]  # fmt: skip
    text: TextArguments
    runner: RunnerArguments
    against_runner: Annotated[
        str,
        click.option("--against-runner", default="auto", show_default=True, help="Which runtime for OTHER."),
    ]
    dtype: Annotated[
        Dtype | None,
        click.option(
            "--dtype", type=one_of(Dtype), help="What PyTorch computes a checkpoint in. [default: float32]"
        ),
    ]
    device: Annotated[
        str | None,
        click.option("--device", help="Where PyTorch computes a checkpoint: cpu or cuda. [default: cpu]"),
    ]
    tokenizer: Annotated[
        Path | None, click.option("--tokenizer", type=FILE, help="A tokenizer.json to use instead.")
    ]
    no_verify: NoVerify
    save: Save


@click.command(
    "perplexity", epilog="Example: dijiang-export perplexity ./tiny-stdlib.bundle held-out.txt --window 512"
)
@takes(PerplexityArguments)
def perplexity(output: Output, given: PerplexityArguments) -> None:
    """How well MODEL predicts the text of FILEs: perplexity per token, and bits per byte, which does not
    depend on the tokenizer.

    MODEL is a bundle, an engine, or a checkpoint, which PyTorch runs: a DiJiang one through the reference
    model, a vanilla GPT-NeoX, LLaMA or OPT one through transformers' own model. Bundles and engines need no
    PyTorch.

    Each file begins anew, is UTF-8 and taken as it is. Each token after the first is predicted exactly once.
    docs/perplexity.md says more.
    """
    from dijiang_engines.scoring.texts import read_text

    joining, cutting = given.text.joining(), given.text.cutting()
    _check_options(given)
    texts = [read_text(path) for path in given.files]
    found, models = _score(output, given, texts, joining, cutting)
    result = _as_json(given, found, *models)
    finish(output, result, given.save, lambda: draw(found, result))


@dataclass(frozen=True)
class _Loaded:
    """A model of either kind."""

    path: Path
    kind: str
    dtype: str
    reader: Reader
    bos: int | None
    tokenizer: Tokenizer | None


def _score(
    output: Output, given: PerplexityArguments, texts: list[Text], joining: Joining, cutting: Cutting
) -> tuple[Perplexity, tuple[_Loaded, _Loaded | None]]:
    from dijiang_engines.scoring.perplexity import score_streams
    from dijiang_engines.scoring.texts import make_streams

    model = _load(output, given, given.model, given.runner.runner)
    other = None if given.against is None else _load(output, given, given.against, given.against_runner)
    tokenizer = _tokenizer(given, model)
    # With --tokenizer both read what it gives.
    same_as = None if other is None or given.tokenizer is not None else _tokenizer(given, other)
    streams = make_streams(
        texts, tokenizer, vocab_size=model.reader.vocab_size, bos=model.bos, joining=joining,
        limit=given.text.limit, same_as=same_as,
    )  # fmt: skip
    names = [text.name for text in texts]
    found = score_streams(
        model.reader, streams, names, cutting, None if other is None else other.reader, output.progress
    )
    return found, (model, other)


def _check_options(given: PerplexityArguments) -> None:
    """Options that nothing here would take are refused, as runners do it.

    Raises:
        UsageError: which.
    """
    from dijiang_engines.errors import UsageError

    models = [given.model] + ([] if given.against is None else [given.against])
    checkpoints = [path for path in models if is_checkpoint(path)]
    for name, value in (("--dtype", given.dtype), ("--device", given.device)):
        if value is not None and not checkpoints:
            raise UsageError(f"{name} is for checkpoints", got=given.model, hint="a bundle has its own type")
    runner = given.runner
    for option, value in (("--spinning", runner.spinning), ("--prepack", runner.prepack)):
        if value is not None and len(checkpoints) == len(models):
            raise UsageError(f"{option} is for ONNX Runtime, and PyTorch runs a checkpoint", got=given.model)
    for path, name in zip(models, (runner.runner, given.against_runner), strict=False):
        if path in checkpoints and name != "auto":
            raise UsageError("PyTorch runs a checkpoint, and no other runner does", got=name)
    if given.against is None and given.against_runner != "auto":
        raise UsageError("--against-runner needs --against", got=given.against_runner)


def _load(output: Output, given: PerplexityArguments, path: Path, runner: str) -> _Loaded:
    return _checkpoint(output, given, path) if is_checkpoint(path) else _model(given, path, runner)


def _checkpoint(output: Output, given: PerplexityArguments, path: Path) -> _Loaded:
    from dijiang_engines.tokenizer.tokenizer import Tokenizer
    from dijiang_export.scoring.checkpoints import read_checkpoint

    dtype = given.dtype or "float32"
    found = read_checkpoint(path, dtype=dtype, device=given.device or "cpu", threads=given.runner.threads)
    for note in found.notes:
        output.log(f"note: {note}")
    tokenizer = None if found.tokenizer is None else Tokenizer(found.tokenizer)
    kind = f"{found.kind} checkpoint"
    return _Loaded(path, kind, dtype, found.reader, found.spec.bos_token_id, tokenizer)


def _model(given: PerplexityArguments, path: Path, runner: str) -> _Loaded:
    from dijiang_engines.formats.engine import EngineFolder
    from dijiang_engines.formats.open import open_model
    from dijiang_engines.machine import SPINNING_ENVIRONMENT
    from dijiang_engines.scoring.readers import RunnerReader
    from dijiang_engines.tokenizer.load import load_tokenizer

    opened = open_model(path, verify=not given.no_verify)
    options = replace(given.runner, runner=runner)
    is_engine = isinstance(opened, EngineFolder)
    if given.against is not None:
        if is_engine:  # what is for the other model's runner
            options = RunnerArguments(runner, None, None, None)
        elif options.spinning is None and SPINNING_ENVIRONMENT not in os.environ:
            options = replace(options, spinning="off")  # the other model and the sums need the cores too
    reader = RunnerReader(options.open(opened))
    bos, kind = opened.spec.bos_token_id, "engine" if is_engine else "bundle"
    return _Loaded(path, kind, opened.dtype, reader, bos, load_tokenizer(opened))


def _tokenizer(given: PerplexityArguments, model: _Loaded) -> Tokenizer:
    from dijiang_engines.errors import BundleError
    from dijiang_engines.tokenizer.tokenizer import Tokenizer

    if given.tokenizer is not None:
        return Tokenizer(given.tokenizer)
    if model.tokenizer is None:
        raise BundleError(
            f"the {model.kind} {model.path} has no tokenizer", hint="name one with --tokenizer FILE"
        )
    return model.tokenizer


# -- what is printed ------------------------------------------------------------------------------------


def _as_json(
    given: PerplexityArguments, found: Perplexity, model: _Loaded, other: _Loaded | None
) -> dict[str, Any]:
    text = given.text
    result = {
        **_facts(model),
        "window": found.window, "stride": found.stride, "carry": text.carry, "limit": text.limit,
        "begin": text.begin, "no_begin": text.no_begin, "separator": text.separator,
        **_numbers(found.total),
        "files": [{"file": score.name, **_numbers(score), **_comparison(score)} for score in found.texts],
        "seconds": found.seconds,
        "tokens_per_second": found.total.tokens / found.seconds if found.seconds else None,
        "against": None,
    }  # fmt: skip
    if other is not None:
        result["against"] = {**_facts(other), **_comparison(found.total)}
    return result


def _facts(model: _Loaded) -> dict[str, Any]:
    return {"model": model.path, "kind": model.kind, "runner": model.reader.name, "dtype": model.dtype}


def _numbers(score: Score) -> dict[str, Any]:
    return {
        "tokens": score.tokens, "bytes": score.bytes, "loss": score.loss,
        "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte,
    }  # fmt: skip


def _comparison(score: Score) -> dict[str, Any]:
    """The other model's numbers; none without one."""
    if score.other_loss is None:
        return {}
    return {
        "other_loss": score.other_loss, "other_perplexity": score.other_perplexity, "ratio": score.ratio,
        "kl": score.kl, "top1_agreement": score.top1_agreement,
    }  # fmt: skip


def draw(found: Perplexity, result: dict[str, Any]) -> Group:
    """For people: a table of the files and of all."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    how = "state carried through each stream" if result["carry"] else f"windows of {found.window} tokens"
    if found.stride not in (None, found.window):
        how += f" every {found.stride}"
    lines = [f"{result['model']}: {result['kind']}, {result['dtype']}, {result['runner']}; {how}"]
    if other := result["against"]:
        lines.append(f"against {other['model']}: {other['kind']}, {other['dtype']}, {other['runner']}")
    table = Table("", "tokens", "perplexity", "bits per byte", "loss, nats")
    if result["against"]:
        for title in ("of the other", "ratio", "KL, nats", "same top-1"):
            table.add_column(title)
    for column in table.columns[1:]:
        column.justify = "right"
    shown = found.texts if 1 < len(found.texts) <= MOST_FILES_SHOWN else ()
    for score in (*shown, found.total):
        if score is found.total:
            table.add_section()
        table.add_row(score.name, *_cells(score))
    if len(found.texts) > MOST_FILES_SHOWN:
        table.caption = f"{len(found.texts)} files; --json shows each"
    speed = result["tokens_per_second"]
    lines.append(f"{found.seconds:.1f} s" + (f", {speed:.0f} tokens/s" if speed else ""))
    return Group(Text("\n".join(lines[:-1])), table, Text(lines[-1]))


def _cells(score: Score) -> list[str]:
    bits = score.bits_per_byte
    cells = [
        f"{score.tokens:,}", _short(score.perplexity), "" if bits is None else f"{bits:.4f}",
        f"{score.loss:.4f}",
    ]  # fmt: skip
    if score.other_perplexity is None or score.ratio is None:
        return cells
    agreement = 100 * (score.top1_agreement or 0.0)
    return [
        *cells,
        _short(score.other_perplexity),
        f"{score.ratio:.4f}",
        f"{score.kl:.3g}",
        f"{agreement:.2f}%",
    ]


def _short(value: float) -> str:
    return f"{value:,.3f}" if value < 1e6 else f"{value:.4g}"
