"""The same server as replicas of Ray Serve, which starts, watches, replaces and adds them.

    pip install 'ray[serve]' redis
    PYTHONPATH=samples/scale python samples/scale/deployment.py tiny-stdlib.bundle --redis redis://127.0.0.1:6379

Each replica is a process with the whole model and the whole application, `App(service).asgi`; Ray's proxy
passes requests and streams through. A replica that is gone loses what it was generating, and no conversation.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from app import Settings, add_arguments, open_service, settings_of
from ray import serve
from starlette.applications import Starlette

from dijiang_engines.serving.http.app import App


def build(bundle: str, settings: Settings) -> Callable[[], Starlette]:
    """What makes a replica's application, in the replica: a model and its thread do not travel.

    Args:
        bundle, settings: of `open_service`.
    """

    def application() -> Starlette:
        service = open_service(bundle, settings)

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            service.start()  # here, because its updates are for the event loop that requests are answered in
            service.ready = True
            yield
            await asyncio.to_thread(service.close, 10.0)

        whole = Starlette(lifespan=lifespan)
        whole.mount("/", App(service).asgi)
        whole.state.service = service
        return whole

    return application


class Replica:
    """What Ray asks besides requests."""

    def check_health(self) -> None:
        """Called by Ray every `health_check_period_s`; a replica that raises is replaced.

        Raises:
            RuntimeError: the thread that runs the model is dead.
        """
        worker = self.app.state.service.worker  # type: ignore[attr-defined] # `serve.ingress` adds `app`
        if not worker.alive:
            raise RuntimeError(f"the model cannot be run any more: {worker.failure}")


def deployment(
    bundle: str, settings: Settings, *, replicas: tuple[int, int], delays: tuple[float, float]
) -> serve.Application:
    """The application for `serve.run`.

    Args:
        bundle, settings: of `open_service`; Ray reckons as many cores for a replica as it has threads.
        replicas: the fewest and the most.
        delays: seconds of much load before there are more, and of little load before there are fewer.
    """
    slots = settings.slots
    made = serve.deployment(
        serve.ingress(build(bundle, settings))(Replica),
        name="dijiang",
        ray_actor_options={"num_cpus": settings.threads},
        # A replica queues by itself and answers 429 when that is full: Ray need not.
        max_ongoing_requests=slots + 256,
        autoscaling_config={
            "min_replicas": replicas[0],
            "max_replicas": replicas[1],
            # A step of half a batch takes little less than one of a whole batch: fill batches first.
            "target_ongoing_requests": max(1, 3 * slots // 4),
            "upscale_delay_s": delays[0],
            "downscale_delay_s": delays[1],
        },
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=30,
    )
    return made.bind()


def main() -> None:
    """Run replicas on this machine until SIGTERM or SIGINT."""
    import ray

    parser = argparse.ArgumentParser(description="Replicas of a server whose conversations are in Redis.")
    parser.add_argument("bundle", help="a bundle or an engine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, nargs=2, default=(2, 2), metavar=("LEAST", "MOST"))
    parser.add_argument(
        "--delays", type=float, nargs=2, default=(10, 300), metavar=("MORE", "FEWER"),
        help="seconds of much, or little, load before there are more replicas, or fewer",
    )  # fmt: skip
    add_arguments(parser)
    parser.set_defaults(threads=1)
    given = parser.parse_args()
    # Ray's daemons listen on every interface unless they are told the node's address.
    ray.init(
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=100 << 20,
        num_cpus=given.replicas[1] * given.threads + 1,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    bundle = str(Path(given.bundle).resolve())
    serve.run(
        deployment(bundle, settings_of(given), replicas=tuple(given.replicas), delays=tuple(given.delays))
    )
    print(f"http://127.0.0.1:{given.port}/v1", flush=True)
    ends = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ends.set())
    ends.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
