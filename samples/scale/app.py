"""`dijiang-export serve` with its conversations in Redis: one of many that share them.

    python samples/scale/app.py tiny-stdlib.bundle --redis redis://127.0.0.1:6379 --port 8000

API keys come from DIJIANG_API_KEY, one or several with commas between them; all servers need the same ones.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from redis_store import RedisStore

from dijiang_engines.errors import DijiangError
from dijiang_engines.formats.open import open_model
from dijiang_engines.machine import SPINNING_ENVIRONMENT
from dijiang_engines.runners import open_runner
from dijiang_engines.serving.http import server
from dijiang_engines.serving.http.service import Service
from dijiang_engines.serving.serve import ServerOptions, make_service


def open_service(bundle: str | Path, redis_url: str, *, ttl: int, slots: int, threads: int | None) -> Service:
    """Everything behind the endpoints of one server; nothing runs yet.

    Raises:
        DijiangError: there is no such model, or no runtime for it.
    """
    # Threads that wait busily take the time of those that talk to clients.
    os.environ.setdefault(SPINNING_ENVIRONMENT, "off")
    model = open_model(bundle)
    keys = tuple(key for key in os.environ.get("DIJIANG_API_KEY", "").split(",") if key)
    store = RedisStore(redis_url, ttl_seconds=ttl, prefix=f"dijiang:{model.name}:")
    runner = open_runner(model, threads=threads)
    return make_service(model, runner, ServerOptions(slots=slots, keys=keys), store)


def main() -> int:
    """Serve until a signal comes; 1 if that cannot be."""
    parser = argparse.ArgumentParser(description="A server whose conversations are in Redis.")
    parser.add_argument("bundle", help="a bundle or an engine")
    parser.add_argument("--redis", required=True, metavar="URL", help="such as redis://127.0.0.1:6379/0")
    parser.add_argument("--ttl", type=int, default=24 * 3600, metavar="SECONDS", help="of a conversation")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--slots", type=int, default=32, help="texts at a time")
    parser.add_argument("--threads", type=int, help="of the runtime; default: all cores")
    parser.add_argument("--grace", type=float, default=20.0, help="seconds after SIGTERM")
    given = parser.parse_args()
    try:
        service = open_service(
            given.bundle, given.redis, ttl=given.ttl, slots=given.slots, threads=given.threads
        )
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
