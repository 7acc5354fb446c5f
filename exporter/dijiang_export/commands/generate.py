"""`dijiang-export generate`: text from a bundle."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from dijiang_export.commands.arguments import COUNT, PATH, NoVerify, RunnerArguments, takes
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output

if TYPE_CHECKING:
    from dijiang_engines.formats.open import Model
    from dijiang_engines.generation.generator import (
        Completion,
        GenerateOptions,
        Generator,
        SamplingOptions,
        Stats,
    )
    from dijiang_engines.generation.grammar import Grammar
    from dijiang_engines.generation.session import Session
    from dijiang_engines.spec import ModelSpec
    from dijiang_engines.tokenizer.tokenizer import Tokenizer

STDIN = "-"
DEFAULT_BATCH = 8


@dataclass(frozen=True)
class SamplingArguments:
    """How a token is chosen from its probabilities."""

    temperature: Annotated[
        float | None,
        click.option(
            "-t", "--temperature", type=float,
            help="Divides the logits before sampling; 0 always takes the most likely token. Default: 0, or 1 "
            "with --top-k, --top-p or --min-p.",
        ),
    ]  # fmt: skip
    top_k: Annotated[
        int | None, click.option("--top-k", type=int, help="Sample from the K most likely tokens.")
    ]
    top_p: Annotated[
        float | None,
        click.option(
            "--top-p", type=float,
            help="Sample from the fewest tokens that together reach probability P.",
        ),
    ]  # fmt: skip
    min_p: Annotated[
        float | None,
        click.option(
            "--min-p", type=float, help="Sample from tokens at least P times as likely as the likeliest."
        ),
    ]
    repetition_penalty: Annotated[
        float,
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True,
            help="Above 1: make tokens that the text already has less likely.",
        ),
    ]  # fmt: skip
    seed: Annotated[
        int | None,
        click.option(
            "--seed", type=int, help="Makes sampling repeatable. Default: a new one, shown at the end."
        ),
    ]

    def options(self) -> SamplingOptions:
        """As the generator takes them.

        Raises:
            UsageError: --temperature 0 leaves nothing to sample from, or a value has no meaning.
        """
        from dijiang_engines.errors import UsageError
        from dijiang_engines.generation.generator import SamplingOptions

        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        wanted = [name for name, value in filters.items() if value is not None]
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if wanted else 0.0
        elif temperature == 0 and wanted:
            name = "--" + wanted[0].replace("_", "-")
            raise UsageError(f"{name} has no meaning with --temperature 0", hint="leave one of them out")
        off = SamplingOptions()
        return SamplingOptions(
            temperature,
            top_k=off.top_k if self.top_k is None else self.top_k,
            top_p=off.top_p if self.top_p is None else self.top_p,
            min_p=off.min_p if self.min_p is None else self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def seed_or_new(self) -> int:
        """The seed that was given, or one that nobody has seen."""
        return int.from_bytes(os.urandom(4), "little") if self.seed is None else self.seed


@dataclass(frozen=True)
class GrammarArguments:
    """What new text is kept to."""

    json_schema: Annotated[
        str | None,
        click.option(
            "--json-schema", metavar="FILE|TEXT",
            help="Keep new text to JSON of this schema: a file, or the schema itself, which begins with {. "
            "{} is any JSON.",
        ),
    ]  # fmt: skip
    regex: Annotated[
        str | None,
        click.option(
            "--regex", metavar="TEXT",
            help="Keep new text to a regular expression, which has to match it as a whole.",
        ),
    ]  # fmt: skip

    @property
    def given(self) -> bool:
        """There is something to keep to."""
        return self.json_schema is not None or self.regex is not None

    def check(self) -> None:
        """Find what is wrong before a model is loaded, as far as that goes.

        Raises:
            UsageError: both are given, or the schema is wrong or cannot be read.
        """
        from dijiang_engines.errors import UsageError
        from dijiang_engines.generation.json_schema import read_schema
        from dijiang_engines.generation.prompts import check_argument

        if self.json_schema is not None and self.regex is not None:
            raise UsageError("--json-schema and --regex exclude each other")
        if self.json_schema is not None:
            read_schema(self._schema(), "the JSON schema")
        if self.regex is not None:
            check_argument(self.regex, "--regex")

    def grammar(self, tokenizer: Tokenizer, spec: ModelSpec) -> Grammar | None:
        """As the generator takes it; raises UsageError and BundleError as `Grammars` does."""
        from dijiang_engines.generation.grammar import Grammars

        if self.json_schema is not None:
            return Grammars(tokenizer, spec).json_schema(self._schema())
        return None if self.regex is None else Grammars(tokenizer, spec).regex(self.regex)

    def _schema(self) -> str | bytes:
        from dijiang_engines.errors import UsageError
        from dijiang_engines.formats.safe_files import read_bounded
        from dijiang_engines.generation.json_schema import MAX_SCHEMA_BYTES

        assert self.json_schema is not None
        if self.json_schema.lstrip().startswith("{"):
            return self.json_schema
        return read_bounded(Path(self.json_schema), MAX_SCHEMA_BYTES, links=True, error=UsageError)


@dataclass(frozen=True)
class GenerateArguments:
    """What `generate` is given."""

    paths: Annotated[
        tuple[str, ...],
        click.argument("paths", nargs=-1, metavar="[BUNDLE] [-]", type=click.Path(allow_dash=True)),
    ]
    prompts: Annotated[
        tuple[str, ...],
        click.option(
            "-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt; may be repeated."
        ),
    ]
    files: Annotated[
        tuple[str, ...],
        click.option(
            "-f", "--prompt-file", "files", multiple=True, metavar="FILE", type=click.Path(allow_dash=True),
            help="A file with one prompt, as UTF-8; - is standard input. One line end at its end is left "
            "out. May be repeated.",
        ),
    ]  # fmt: skip
    max_tokens: Annotated[
        int | None,
        click.option(
            "-n", "--max-tokens", type=click.IntRange(min=0),
            help="Most new tokens of each prompt; 0 only reads it. Default: 128, or what the model has room "
            "for.",
        ),
    ]  # fmt: skip
    sampling: SamplingArguments
    stop: Annotated[
        tuple[str, ...],
        click.option(
            "--stop", multiple=True, metavar="TEXT",
            help="End before this text; may be repeated. For a line end: --stop $'\\n'.",
        ),
    ]  # fmt: skip
    ignore_eos: Annotated[
        bool, click.option("--ignore-eos", is_flag=True, help="Go on after the model's end-of-text token.")
    ]
    grammar: GrammarArguments
    echo: Annotated[
        bool, click.option("--echo", is_flag=True, help="Print the prompt before what follows it.")
    ]
    runner: RunnerArguments
    batch: Annotated[
        int,
        click.option(
            "--batch", type=COUNT, default=DEFAULT_BATCH, show_default=True,
            help="Most prompts that are worked on at once.",
        ),
    ]  # fmt: skip
    prefill_tokens: Annotated[
        int,
        click.option(
            "--prefill-tokens", type=COUNT, default=2048, show_default=True,
            help="Prompt tokens that are read at once; fewer need less memory.",
        ),
    ]  # fmt: skip
    session: Annotated[Path | None, click.option("--session", type=PATH, help="Go on from a saved session.")]
    save_session: Annotated[
        Path | None,
        click.option("--save-session", type=PATH, help="Save where the model stands at the end."),
    ]
    tokenizer: Annotated[
        Path | None, click.option("--tokenizer", type=PATH, help="A tokenizer.json to use instead.")
    ]
    no_verify: NoVerify

    def inputs(self) -> tuple[Path, list[str]]:
        """The bundle's path and the prompts, in the order: --prompt, --prompt-file, standard input.

        Raises:
            UsageError, PromptError: there is none, or one cannot be read.
        """
        from dijiang_engines.errors import UsageError
        from dijiang_engines.generation.prompts import check_argument, read_prompt

        bundles = [path for path in self.paths if path != STDIN]
        files = [*self.files, *(path for path in self.paths if path == STDIN)]
        if len(bundles) > 1:
            raise UsageError("more than one bundle", got=", ".join(bundles), hint="prompts go after --prompt")
        if files.count(STDIN) > 1:
            raise UsageError("standard input can be read only once")
        prompts = [check_argument(prompt, "--prompt") for prompt in self.prompts]
        prompts += [read_prompt(file) for file in files]
        if not prompts and self.session is None:
            raise UsageError(
                "there is no prompt", hint="give --prompt TEXT, --prompt-file FILE, or - for standard input"
            )
        return Path(bundles[0] if bundles else DEFAULT_BUNDLE), prompts

    def options(self, grammar: Grammar | None) -> GenerateOptions:
        """As the generator takes them; raises UsageError as it does."""
        from dijiang_engines.generation.generator import GenerateOptions
        from dijiang_engines.generation.prompts import check_argument

        return GenerateOptions(
            max_tokens=self.max_tokens,
            sampling=self.sampling.options(),
            seed=self.sampling.seed_or_new(),
            stop=tuple(check_argument(stop, "--stop") for stop in self.stop),
            ignore_eos=self.ignore_eos,
            grammar=grammar,
            resumable=self.save_session is not None,
        )


@click.command(
    "generate",
    epilog="Example: dijiang-export generate --prompt 'def main(' --max-tokens 60 --temperature 0.8",
)
@takes(GenerateArguments)
def generate(output: Output, given: GenerateArguments) -> None:
    """Generate text from BUNDLE, which defaults to ./tiny-stdlib.bundle.

    One prompt is streamed to standard output as it grows, several are printed when they are done. A last
    argument - reads a prompt from standard input. An empty prompt (--prompt '') starts from the model's
    beginning-of-text token. Without sampling options the result is the same on every run.
    """
    path, prompts = given.inputs()
    given.options(None)  # so that what is wrong is said before a model is loaded
    given.grammar.check()
    bundle, generator, session, grammar = _open(output, given, path)
    options = given.options(grammar)
    _Run(output, bundle, generator, options, prompts, session, given).run()


def _open(
    output: Output, given: GenerateArguments, path: Path
) -> tuple[Model, Generator, Session | None, Grammar | None]:
    from dijiang_engines.errors import BundleError
    from dijiang_engines.formats.open import open_model
    from dijiang_engines.generation.generator import Generator
    from dijiang_engines.generation.session import check_session_target, load_session
    from dijiang_engines.runners.base import HasNotes
    from dijiang_engines.tokenizer.load import load_tokenizer
    from dijiang_engines.tokenizer.tokenizer import Tokenizer

    if given.save_session is not None:
        check_session_target(given.save_session)
    bundle = open_model(path, verify=not given.no_verify)
    tokenizer = load_tokenizer(bundle) if given.tokenizer is None else Tokenizer(given.tokenizer)
    if tokenizer is None:
        raise BundleError(f"the bundle {bundle.path} has no tokenizer", hint="name one with --tokenizer FILE")
    grammar = given.grammar.grammar(tokenizer, bundle.spec)
    session = None if given.session is None else load_session(given.session, bundle)
    runner = given.runner.open(bundle)
    for note in runner.notes() if isinstance(runner, HasNotes) else ():
        output.log(f"note: {note}")
    generator = Generator(runner, tokenizer, prefill_tokens=given.prefill_tokens)
    return bundle, generator, session, grammar


def _check_complete(completions: list[Completion]) -> None:
    """A session does not know its grammar: what goes on from it would begin a new one within a text."""
    from dijiang_engines.errors import UsageError

    cut = [completion.row + 1 for completion in completions if completion.grammar_complete is False]
    if cut:
        raise UsageError(
            "the session is not saved: a text ended before its grammar was complete",
            got=f"text {cut[0]}",
            hint="give it more --max-tokens",
        )


class _Run:
    """One call of the command: prompts in groups through the generator, text to standard output."""

    def __init__(
        self,
        output: Output,
        bundle: Model,
        generator: Generator,
        options: GenerateOptions,
        prompts: list[str],
        session: Session | None,
        given: GenerateArguments,
    ) -> None:
        from dijiang_engines.generation.generator import Stats

        self.output, self.bundle, self.generator, self.options = output, bundle, generator, options
        self.session, self.echo, self.save_to = session, given.echo, given.save_session
        self.prompts = prompts or [""] * (session.batch if session else 0)
        # A session is one batch, whatever its size: all its rows are saved together.
        together = len(self.prompts) if session is not None or self.save_to is not None else given.batch
        self.groups = range(0, len(self.prompts), together)
        self.together = together
        self.stats: Stats = Stats()
        self.completions: list[Completion] = []

    def run(self) -> None:
        from dijiang_engines.errors import RunnerError
        from dijiang_engines.generation.session import save_session

        streamed = len(self.prompts) == 1 and not self.output.json
        for first in self.groups:
            group = self.prompts[first : first + self.together]
            generation = self.generator.start(group, self.options, session=self.session, first_stream=first)
            last = generation.openings[0] + (group[0] if self.echo else "") if streamed else ""
            self._write(last)
            failed: RunnerError | None = None
            try:
                for event in generation:
                    if streamed:
                        self._write(event.text)
                        last = event.text or last
            except RunnerError as error:
                if not any(completion.finish_reason == "error" for completion in generation.completions):
                    raise
                failed = error  # of one text: the others are whole
            if last and not last.endswith("\n"):
                self._write("\n")
            self.stats.add(generation.stats)
            for completion in generation.completions:
                self.completions.append(completion)
                if not streamed and not self.output.json:
                    self._print(completion, first, generation.openings[completion.row])
            if failed is not None:
                raise failed
            if self.save_to is not None:
                _check_complete(generation.completions)
                save_session(self.save_to, generation.session(), self.bundle)
        self._report()

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _print(self, completion: Completion, first: int, opening: str) -> None:
        number = first + completion.row
        prompt = self.prompts[number]
        shown = prompt if len(prompt) <= 60 else prompt[:59] + "…"
        text = completion.text
        if self.echo:
            text = opening + prompt + text.removeprefix(opening)
        self._write(f"--- {number + 1}: {shown!r}\n{text}\n")

    def _report(self) -> None:
        stats, options = self.stats, self.options
        if self.output.json:
            self.output.print_result(self._as_json())
            return
        parts = [
            f"prompt: {stats.prompt_tokens} tokens in {stats.prefill_seconds:.2f} s"
            f" ({stats.prefill_rate:.0f} tokens/s)",
            f"generated: {stats.generated_tokens} tokens"
            + (f", {stats.decode_rate:.1f} tokens/s" if stats.decoded_tokens else ""),
        ]
        if not options.sampling.greedy:
            parts.append(f"seed: {options.seed}")
        if cut := sum(completion.grammar_complete is False for completion in self.completions):
            parts.append(f"ended before the grammar was complete: {cut} of {len(self.completions)}")
        if self.save_to is not None:
            parts.append(f"saved: {self.save_to}")
        self.output.log(" · ".join(parts))

    def _as_json(self) -> dict[str, Any]:
        stats = self.stats
        return {
            "bundle": self.bundle.path,
            "runner": self.generator.runner.name,
            "seed": None if self.options.sampling.greedy else self.options.seed,
            "completions": [
                {
                    "prompt": prompt,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "prompt_tokens": completion.prompt_tokens,
                    "token_ids": completion.token_ids,
                    "grammar_complete": completion.grammar_complete,
                }
                for prompt, completion in zip(self.prompts, self.completions, strict=True)
            ],
            "stats": {
                **vars(stats),
                "prefill_tokens_per_second": stats.prefill_rate,
                "decode_tokens_per_second": stats.decode_rate,
            },
            "session": self.save_to,
        }
