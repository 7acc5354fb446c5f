"""`dijiang-export serve`: a model for many users, behind an OpenAI-compatible API."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from dijiang_export.commands.arguments import COUNT, FILE, BundleOrDefault, NoVerify, RunnerArguments, takes
from dijiang_export.commands.common import Output

if TYPE_CHECKING:
    from dijiang_engines.serving.serve import ServerOptions

KEY_VARIABLE = "DIJIANG_API_KEY"
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class LimitArguments:
    """How much the server takes on."""

    slots: Annotated[
        int,
        click.option(
            "--slots", type=COUNT, default=32, show_default=True,
            help="Texts that are generated at a time. The batch is no larger than the texts there are.",
        ),
    ]  # fmt: skip
    piece: Annotated[
        int | None,
        click.option(
            "--piece", type=COUNT,
            help="Most tokens of a prompt that are read between two tokens of the others. "
            "[default: 64 to 512, measured at the start]",
        ),
    ]  # fmt: skip
    queue: Annotated[
        int,
        click.option(
            "--queue", type=COUNT, default=256, show_default=True,
            help="Requests that wait; more are answered 429.",
        ),
    ]  # fmt: skip
    max_tokens: Annotated[
        int,
        click.option(
            "-n", "--max-tokens", type=COUNT, default=4096, show_default=True,
            help="Most new tokens of one text, and what a chat gets that does not say.",
        ),
    ]  # fmt: skip
    max_prompt_tokens: Annotated[
        int,
        click.option(
            "--max-prompt-tokens", type=COUNT, default=131072, show_default=True,
            help="Most tokens of a prompt.",
        ),
    ]  # fmt: skip
    prefix_cache: Annotated[
        int,
        click.option(
            "--prefix-cache", type=click.IntRange(min=0), default=256, show_default=True, metavar="MB",
            help="Memory for states after the beginnings of prompts, which are then read once; 0: none.",
        ),
    ]  # fmt: skip
    session_memory: Annotated[
        int,
        click.option(
            "--session-memory", type=click.IntRange(min=0), default=256, show_default=True, metavar="MB",
            help="Memory for conversations that clients save; the oldest goes first.",
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class ServeArguments:
    """What `serve` is given."""

    bundle: BundleOrDefault
    host: Annotated[
        str,
        click.option(
            "--host", default="127.0.0.1", show_default=True,
            help="Address to listen at; 0.0.0.0 is all of this machine's.",
        ),
    ]  # fmt: skip
    port: Annotated[
        int,
        click.option(
            "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one."
        ),
    ]
    name: Annotated[
        str | None, click.option("--name", help="What clients call the model. [default: its own name]")
    ]
    api_key: Annotated[
        tuple[str, ...],
        click.option(
            "--api-key", multiple=True, metavar="KEY",
            help="Answer only who has it; may be repeated. Others see it in the list of processes: better "
            f"set {KEY_VARIABLE}, or use --api-key-file.",
        ),
    ]  # fmt: skip
    api_key_file: Annotated[
        Path | None, click.option("--api-key-file", type=FILE, help="A file with one API key a line.")
    ]
    limits: LimitArguments
    write_timeout: Annotated[
        float,
        click.option(
            "--write-timeout", type=click.FloatRange(min=0.1), default=30.0, show_default=True,
            metavar="SECONDS", help="A client that does not read for so long is cut off.",
        ),
    ]  # fmt: skip
    grace: Annotated[
        float,
        click.option(
            "--grace", type=click.FloatRange(min=0), default=20.0, show_default=True, metavar="SECONDS",
            help="After SIGTERM, for answers that are being generated.",
        ),
    ]  # fmt: skip
    runner: RunnerArguments
    no_verify: NoVerify


@click.command(
    "serve",
    epilog="Example: dijiang-export serve tiny-stdlib.bundle --port 8000",
)
@takes(ServeArguments)
def serve(output: Output, given: ServeArguments) -> None:
    """Serve a bundle or an engine to many users over HTTP, as OpenAI's clients expect it.

    Completions, chats, streams, log-probabilities, JSON schemas, sessions, metrics: docs/serving.md.
    """
    import asyncio

    from dijiang_engines.formats.open import open_model
    from dijiang_engines.machine import SPINNING_ENVIRONMENT
    from dijiang_engines.runners.base import HasNotes
    from dijiang_engines.serving.http import server
    from dijiang_engines.serving.serve import make_service

    options = _options(given)
    # Threads that wait busily take the time of those that talk to clients; --spinning still decides.
    os.environ.setdefault(SPINNING_ENVIRONMENT, "off")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    model = open_model(given.bundle, verify=False)
    if not given.no_verify:
        size = sum(info.bytes for info in model.files.values())
        with output.progress(f"checking {model.name}", size, "bytes") as bar:
            model.verify(bar.advance)
    with output.progress(f"loading {model.name}"):
        runner = given.runner.open(model)
        service = make_service(model, runner, options)
    for note in runner.notes() if isinstance(runner, HasNotes) else ():
        output.log(f"note: {note}")

    def listening(host: str, port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        address, limits = f"http://{shown}:{port}/v1", service.scheduler.limits
        if output.json:
            output.print_result(
                {"url": address, "model": service.served.name, "runner": runner.name, "piece": limits.piece}
            )
        output.log(
            f"serving {service.served.name} on {runner.name}, {limits.slots} texts at a time, prompts in "
            f"pieces of {limits.piece}: point an OpenAI client at {address}"
        )

    running = server.serve(
        service, host=given.host, port=given.port, write_seconds=given.write_timeout,
        grace_seconds=given.grace, listening=listening,
    )  # fmt: skip
    asyncio.run(running)


def _options(given: ServeArguments) -> ServerOptions:
    from dijiang_engines.serving.serve import ServerOptions

    limits = given.limits
    return ServerOptions(
        name=given.name, slots=limits.slots, piece=limits.piece, queue=limits.queue,
        max_tokens=limits.max_tokens, max_prompt_tokens=limits.max_prompt_tokens,
        prefix_bytes=limits.prefix_cache * MEGABYTE, session_bytes=limits.session_memory * MEGABYTE,
        keys=_keys(given),
    )  # fmt: skip


def _keys(given: ServeArguments) -> tuple[str, ...]:
    """API keys from everywhere that they may stand.

    Raises:
        UsageError: the file cannot be read, or holds none.
    """
    from dijiang_engines.errors import UsageError
    from dijiang_engines.formats.safe_files import read_bounded

    keys = [*given.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    if given.api_key_file is not None:
        data = read_bounded(given.api_key_file, MEGABYTE, links=True, error=UsageError)
        found = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
        if not found:
            raise UsageError(f"{given.api_key_file} holds no API key", expected="one a line")
        keys += found
    return tuple(keys)
