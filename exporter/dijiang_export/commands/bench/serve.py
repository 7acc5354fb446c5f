"""`dijiang-export bench serve`: how fast a server answers many clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from dijiang_export.commands.arguments import COUNT, FILE, Save, takes
from dijiang_export.commands.common import Output, finish
from dijiang_export.commands.serve import KEY_VARIABLE


@dataclass(frozen=True)
class BenchServeArguments:
    """What `bench serve` is given."""

    url: Annotated[str, click.argument("url")]
    concurrencies: Annotated[
        tuple[int, ...],
        click.option(
            "--concurrency", "concurrencies", type=click.IntRange(1, 1024), multiple=True,
            help="Streams at a time; may be repeated. [default: 1, 4, 16, 32]",
        ),
    ]  # fmt: skip
    rounds: Annotated[
        int,
        click.option(
            "--rounds", type=COUNT, default=2, show_default=True,
            help="Streams of each client, one after the other.",
        ),
    ]  # fmt: skip
    tokens: Annotated[
        int,
        click.option(
            "-n", "--tokens", type=click.IntRange(1, 1 << 20), default=64, show_default=True,
            help="Of each stream.",
        ),
    ]  # fmt: skip
    prompt_tokens: Annotated[
        int,
        click.option(
            "--prompt-tokens", type=click.IntRange(1, 1 << 20), default=128, show_default=True,
            help="Of each prompt: drawn at random, so that no prefix cache knows them.",
        ),
    ]  # fmt: skip
    temperature: Annotated[
        float,
        click.option(
            "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
            help="0: the likeliest token.",
        ),
    ]  # fmt: skip
    model: Annotated[str | None, click.option("--model", help="[default: the first that the server lists]")]
    api_key: Annotated[
        str | None,
        click.option(
            "--api-key", metavar="KEY", envvar=KEY_VARIABLE,
            help=f"Others see it in the list of processes: better set {KEY_VARIABLE}.",
        ),
    ]  # fmt: skip
    timeout: Annotated[
        float,
        click.option(
            "--timeout", type=click.FloatRange(min=0.1), default=300.0, show_default=True, metavar="SECONDS",
            help="A stream that takes longer has failed.",
        ),
    ]  # fmt: skip
    seed: Annotated[int, click.option("--seed", default=0, show_default=True, help="Of the prompts.")]
    plot: Annotated[Path | None, click.option("--plot", type=FILE, help="Draw the times: a name in .svg.")]
    save: Save


@click.command(
    "serve",
    short_help="Measure a server with an OpenAI-compatible API.",
    epilog="Example: dijiang-export bench serve http://127.0.0.1:8000 --save serve.json",
)
@takes(BenchServeArguments)
def serve(output: Output, given: BenchServeArguments) -> None:
    """Measure the server at URL: this project's, vLLM, llama.cpp, or any other with OpenAI's API.

    So many clients at a time ask for one stream of text after the other: tokens of all per second, time to
    the first token, time between tokens, and what failed.
    """
    from dijiang_export.bench.report.plot import check_plot
    from dijiang_export.bench.serve.measure import ServerError
    from dijiang_export.bench.serve.tables import draw_served, plot_served

    if given.plot is not None:
        check_plot(given.plot)
    result = _measure(output, given)
    measured = any(level["streams"] for level in result["levels"])
    if given.plot is not None and measured:
        plot_served(result, given.plot)
        output.log(f"drew {given.plot}")
    finish(output, result, given.save, lambda: draw_served(result))
    if not measured:
        raise ServerError(f"no stream of {given.url} came to its end")


def _measure(output: Output, given: BenchServeArguments) -> dict[str, Any]:
    from dijiang_export.bench.about import about_run
    from dijiang_export.bench.serve.measure import CONCURRENCIES, Load, measure_server

    load = Load(
        given.concurrencies or CONCURRENCIES, given.rounds, given.tokens, given.prompt_tokens,
        given.temperature, given.timeout, given.seed,
    )  # fmt: skip
    about = about_run()
    about["command"] = _without_key(about["command"])
    return about | measure_server(
        given.url, load, model=given.model, key=given.api_key or None, progress=output.progress
    )


def _without_key(command: str) -> str:
    """A record is shown to others; the key that it was made with is not."""
    import shlex

    words = shlex.split(command)
    for number, word in enumerate(words):
        if number and words[number - 1] == "--api-key":
            words[number] = "***"
        elif word.startswith("--api-key="):
            words[number] = "--api-key=***"
    return shlex.join(words)
