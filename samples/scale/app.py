"""`dijiang-export serve` with its conversations in Redis: one of many that share them.

    python samples/scale/app.py tiny-stdlib.bundle --redis redis://127.0.0.1:6379 --port 8000

With `--shared-prefixes`, what one server has read of a prompt the others find there too.

API keys come from DIJIANG_API_KEY, one or several with commas between them; all servers need the same ones.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from redis_prefixes import RedisPrefixStore
from redis_store import RedisStore

from dijiang_engines.errors import DijiangError
from dijiang_engines.formats.open import open_model
from dijiang_engines.machine import SPINNING_ENVIRONMENT
from dijiang_engines.runners import open_runner
from dijiang_engines.serving.http import server
from dijiang_engines.serving.http.service import Service
from dijiang_engines.serving.serve import ServerOptions, make_service


@dataclass(frozen=True)
class Settings:
    """What one server of many is told; all of them the same."""

    redis: str
    """URL of Redis."""
    ttl: int = 24 * 3600
    """Seconds that a conversation is kept which nobody uses."""
    slots: int = 32
    """Texts at a time."""
    threads: int | None = None
    """Of the runtime; None: all cores."""
    piece: int = 64
    """Tokens of a prompt that are read at a time. Not measured, as `serve` does: a text's last bits follow
    from it, and states are found by servers with the same alone."""
    shared_prefixes: int = 0
    """Seconds that Redis keeps a state after the beginning of a prompt which nobody asks for; 0: none."""
    prefix_wait: float = 0.1
    """Seconds that a prompt waits for such a state."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for everything in `Settings`."""
    default = Settings("")
    parser.add_argument("--redis", required=True, metavar="URL", help="such as redis://127.0.0.1:6379/0")
    parser.add_argument("--ttl", type=int, default=default.ttl, metavar="SECONDS", help="of a conversation")
    parser.add_argument("--slots", type=int, default=default.slots, help="texts at a time of each server")
    parser.add_argument("--threads", type=int, help="of the runtime; default: all cores")
    parser.add_argument("--piece", type=int, default=default.piece, help="tokens of a prompt read at a time")
    parser.add_argument(
        "--shared-prefixes", type=int, default=default.shared_prefixes, metavar="SECONDS",
        help="keep states after the beginnings of prompts in Redis for so long; default: 0, not at all",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-wait", type=float, default=default.prefix_wait, metavar="SECONDS",
        help="that a prompt waits for such a state",
    )  # fmt: skip


def settings_of(given: argparse.Namespace) -> Settings:
    """What the options of `add_arguments` say."""
    return Settings(**{field.name: getattr(given, field.name) for field in fields(Settings)})


def open_service(bundle: str | Path, settings: Settings) -> Service:
    """Everything behind the endpoints of one server; nothing runs yet.

    Raises:
        DijiangError: there is no such model, or no runtime for it, or a setting is out of range.
    """
    # Threads that wait busily take the time of those that talk to clients.
    os.environ.setdefault(SPINNING_ENVIRONMENT, "off")
    model = open_model(bundle)
    keys = tuple(key for key in os.environ.get("DIJIANG_API_KEY", "").split(",") if key)
    options = ServerOptions(
        slots=settings.slots, piece=settings.piece, keys=keys, shared_seconds=settings.prefix_wait
    )
    store = RedisStore(settings.redis, ttl_seconds=settings.ttl, prefix=f"dijiang:{model.name}:")
    prefixes = None
    if settings.shared_prefixes:
        prefixes = RedisPrefixStore(
            settings.redis, ttl_seconds=settings.shared_prefixes, read_seconds=settings.prefix_wait
        )
    return make_service(model, open_runner(model, threads=settings.threads), options, store, prefixes)


def main() -> int:
    """Serve until a signal comes; 1 if that cannot be."""
    parser = argparse.ArgumentParser(description="A server whose conversations are in Redis.")
    parser.add_argument("bundle", help="a bundle or an engine")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds after SIGTERM")
    add_arguments(parser)
    given = parser.parse_args()
    try:
        service = open_service(given.bundle, settings_of(given))
        asyncio.run(
            server.serve(
                service, host=given.host, port=given.port, write_seconds=30.0, grace_seconds=given.grace,
                listening=lambda host, port: print(f"http://{host}:{port}/v1", flush=True),
            )
        )  # fmt: skip
    except DijiangError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
