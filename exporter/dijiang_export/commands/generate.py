"""`dijiang-export generate`: text from a bundle."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, output_options, runner_options

if TYPE_CHECKING:
    from dijiang_engines.formats.open import Model
    from dijiang_engines.generation.generator import Completion, GenerateOptions, Generator, Stats
    from dijiang_engines.generation.session import Session

STDIN = "-"
DEFAULT_BATCH = 8


@click.command(
    "generate",
    epilog="Example: dijiang-export generate --prompt 'def main(' --max-tokens 60 --temperature 0.8",
)
@click.argument("paths", nargs=-1, metavar="[BUNDLE] [-]", type=click.Path(allow_dash=True))
@click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt; may be repeated.")
@click.option(
    "-f", "--prompt-file", "files", multiple=True, metavar="FILE", type=click.Path(allow_dash=True),
    help="A file with one prompt, as UTF-8; - is standard input. One line end at its end is left out. "
    "May be repeated.",
)  # fmt: skip
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=0),
    help="Most new tokens of each prompt; 0 only reads it. Default: 128, or what the model has room for.",
)  # fmt: skip
@click.option(
    "-t", "--temperature", type=float,
    help="Divides the logits before sampling; 0 always takes the most likely token. Default: 0, or 1 with "
    "--top-k, --top-p or --min-p.",
)  # fmt: skip
@click.option("--top-k", type=int, help="Sample from the K most likely tokens.")
@click.option("--top-p", type=float, help="Sample from the fewest tokens that together reach probability P.")
@click.option("--min-p", type=float, help="Sample from tokens at least P times as likely as the likeliest.")
@click.option(
    "--repetition-penalty", type=float, default=1.0, show_default=True,
    help="Above 1: make tokens that the text already has less likely.",
)  # fmt: skip
@click.option("--seed", type=int, help="Makes sampling repeatable. Default: a new one, shown at the end.")
@click.option(
    "--stop", multiple=True, metavar="TEXT",
    help="End before this text; may be repeated. For a line end: --stop $'\\n'.",
)  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end-of-text token.")
@click.option("--echo", is_flag=True, help="Print the prompt before what follows it.")
@runner_options
@click.option(
    "--batch", type=click.IntRange(min=1), default=DEFAULT_BATCH, show_default=True,
    help="Most prompts that are worked on at once.",
)  # fmt: skip
@click.option(
    "--prefill-tokens", type=click.IntRange(min=1), default=2048, show_default=True,
    help="Prompt tokens that are read at once; fewer need less memory.",
)  # fmt: skip
@click.option("--session", type=click.Path(path_type=Path), help="Go on from a saved session.")
@click.option(
    "--save-session", type=click.Path(path_type=Path), help="Save where the model stands at the end."
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json to use instead.")
@click.option("--no-verify", is_flag=True, help="Do not hash the weights first (large models start sooner).")
@output_options
def generate(output: Output, paths: tuple[str, ...], **given: Any) -> None:
    """Generate text from BUNDLE, which defaults to ./tiny-stdlib.bundle.

    One prompt is streamed to standard output as it grows, several are printed when they are done. A last
    argument - reads a prompt from standard input. An empty prompt (--prompt '') starts from the model's
    beginning-of-text token. Without sampling options the result is the same on every run.
    """
    from dijiang_engines.errors import BundleError
    from dijiang_engines.formats.open import load_tokenizer, open_model
    from dijiang_engines.generation.generator import Generator
    from dijiang_engines.generation.session import check_session_target, load_session
    from dijiang_engines.runners.registry import open_runner
    from dijiang_engines.tokenizer.tokenizer import Tokenizer

    bundle_path, prompts = _inputs(paths, given)
    options = _options(given)
    if given["save_session"] is not None:
        check_session_target(given["save_session"])
    bundle = open_model(bundle_path, verify=not given["no_verify"])
    tokenizer = load_tokenizer(bundle) if given["tokenizer"] is None else Tokenizer(given["tokenizer"])
    if tokenizer is None:
        raise BundleError(f"the bundle {bundle.path} has no tokenizer", hint="name one with --tokenizer FILE")
    session = None if given["session"] is None else load_session(given["session"], bundle)
    told = {name: given[name] for name in ("threads", "spinning", "prepack")}
    runner = open_runner(bundle, given["runner"], **told)
    generator = Generator(runner, tokenizer, prefill_tokens=given["prefill_tokens"])
    _Run(output, bundle, generator, options, prompts, session, given).run()


def _inputs(paths: tuple[str, ...], given: dict[str, Any]) -> tuple[Path, list[str]]:
    """The bundle's path and the prompts, in the order: --prompt, --prompt-file, standard input."""
    from dijiang_engines.errors import UsageError
    from dijiang_engines.generation.prompts import check_argument, read_prompt

    bundles = [path for path in paths if path != STDIN]
    files = [*given["files"], *(path for path in paths if path == STDIN)]
    if len(bundles) > 1:
        raise UsageError("more than one bundle", got=", ".join(bundles), hint="prompts go after --prompt")
    if files.count(STDIN) > 1:
        raise UsageError("standard input can be read only once")
    prompts = [check_argument(prompt, "--prompt") for prompt in given["prompts"]]
    prompts += [read_prompt(file) for file in files]
    if not prompts and given["session"] is None:
        raise UsageError(
            "there is no prompt", hint="give --prompt TEXT, --prompt-file FILE, or - for standard input"
        )
    return Path(bundles[0] if bundles else DEFAULT_BUNDLE), prompts


def _options(given: dict[str, Any]) -> GenerateOptions:
    from dijiang_engines.errors import UsageError
    from dijiang_engines.generation.generator import GenerateOptions, SamplingOptions
    from dijiang_engines.generation.prompts import check_argument

    filters = {name: given[name] for name in ("top_k", "top_p", "min_p") if given[name] is not None}
    temperature = given["temperature"]
    if temperature is None:
        temperature = 1.0 if filters else 0.0
    elif temperature == 0 and filters:
        name = "--" + next(iter(filters)).replace("_", "-")
        raise UsageError(f"{name} has no meaning with --temperature 0", hint="leave one of them out")
    seed = given["seed"] if given["seed"] is not None else int.from_bytes(os.urandom(4), "little")
    return GenerateOptions(
        max_tokens=given["max_tokens"],
        sampling=SamplingOptions(temperature, repetition_penalty=given["repetition_penalty"], **filters),
        seed=seed,
        stop=tuple(check_argument(stop, "--stop") for stop in given["stop"]),
        ignore_eos=given["ignore_eos"],
        resumable=given["save_session"] is not None,
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
        given: dict[str, Any],
    ) -> None:
        from dijiang_engines.generation.generator import Stats

        self.output, self.bundle, self.generator, self.options = output, bundle, generator, options
        self.session, self.echo, self.save_to = session, given["echo"], given["save_session"]
        self.prompts = prompts or [""] * (session.batch if session else 0)
        # A session is one batch, whatever its size: all its rows are saved together.
        together = len(self.prompts) if session is not None or self.save_to is not None else given["batch"]
        self.groups = range(0, len(self.prompts), together)
        self.together = together
        self.stats: Stats = Stats()
        self.completions: list[Completion] = []

    def run(self) -> None:
        from dijiang_engines.generation.session import save_session

        streamed = len(self.prompts) == 1 and not self.output.json
        for first in self.groups:
            group = self.prompts[first : first + self.together]
            generation = self.generator.start(group, self.options, session=self.session, first_stream=first)
            last = generation.openings[0] + (group[0] if self.echo else "") if streamed else ""
            self._write(last)
            for event in generation:
                if streamed:
                    self._write(event.text)
                    last = event.text or last
            if last and not last.endswith("\n"):
                self._write("\n")
            self.stats.add(generation.stats)
            for completion in generation.completions:
                self.completions.append(completion)
                if not streamed and not self.output.json:
                    self._print(completion, first, generation.openings[completion.row])
            if self.save_to is not None:
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
