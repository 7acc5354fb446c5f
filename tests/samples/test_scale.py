"""samples/scale: conversations in a real Redis on loopback, and a server that is killed in the middle of one.

Skipped where there is no Redis or Valkey, or no client for it. States that servers share are in
test_scale_prefixes.py. Ray itself is run by hand (docs/evidence/scale-ray-redis.txt).
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from support.fakes.runner import ToyRunner
from support.http import ask
from support.makers.toy_bundle import make_bundle
from support.redis import SCALE, Redis, answers, server_process, until
from support.server import serving

from dijiang_engines.errors import SessionError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import open_runner
from dijiang_engines.serving.session_store import MemoryStore, StoreError

WORK = "/v1/completions"
SHORT_SECONDS = 0.3


@pytest.fixture
def store_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(str(SCALE))
    from redis_store import RedisStore

    return RedisStore


# -- the store ---------------------------------------------------------------------------------------------


def test_a_redis_store_keeps_what_a_store_in_memory_keeps(redis: Redis, store_of: Callable[..., Any]) -> None:
    """The same calls on both give the same answers, names that are patterns to Redis among them."""
    for store in (store_of(redis.url), MemoryStore(1 << 20)):
        assert store.get("a/x") is None and store.delete("a/x") is False and store.names("") == []
        for name in ("a/x", "a/y", "a*/z", "a[bc]/z", "b/z", "ab/z", "a?/\\z"):
            store.put(name, b"\x00\xff\r\n" + name.encode())
        store.put("a/y", b"newer")
        assert store.names("a/") == ["a/x", "a/y"] and store.names("a*/") == ["a*/z"]
        assert store.names("a[bc]/") == ["a[bc]/z"] and store.names("a?/\\") == ["a?/\\z"]
        assert store.get("a/x") == b"\x00\xff\r\na/x" and store.get("a/y") == b"newer"
        assert store.delete("a/x") is True and store.names("a/") == ["a/y"]


def test_a_conversation_that_nobody_uses_goes(redis: Redis, store_of: Callable[..., Any]) -> None:
    store = store_of(redis.url, ttl_seconds=1, prefix="p:")
    store.put("kept", b"1")
    store.put("left", b"2")
    begun = time.monotonic()
    while time.monotonic() - begun < 1.5:
        assert store.get("kept") == b"1"  # its time begins anew with each
        time.sleep(0.1)
    assert store.get("left") is None and store.names("") == ["kept"]
    assert store_of(redis.url, prefix="other:").names("") == []


def test_what_is_too_large_or_no_url_is_refused(redis: Redis, store_of: Callable[..., Any]) -> None:
    store = store_of(redis.url, max_bytes=10)
    with pytest.raises(SessionError):
        store.put("a", bytes(11))
    assert store.get("a") is None
    for wrong in ({"ttl_seconds": 0}, {"max_bytes": 0}, {"seconds": 0}):
        with pytest.raises(UsageError):
            store_of(redis.url, **wrong)
    with pytest.raises(UsageError):
        store_of("http://127.0.0.1:1")


def test_a_redis_that_hangs_or_is_gone_is_an_error_in_time(
    redis: Redis, store_of: Callable[..., Any]
) -> None:
    store = store_of(redis.url, seconds=SHORT_SECONDS)
    store.put("a", b"1")
    calls: list[Callable[[], Any]] = [
        lambda: store.get("a"), lambda: store.put("a", b"2"), lambda: store.delete("b"),
        lambda: store.names(""),
    ]  # fmt: skip
    redis.process.send_signal(signal.SIGSTOP)
    for call in calls:
        begun = time.monotonic()
        with pytest.raises(StoreError):
            call()
        assert time.monotonic() - begun < 4 * SHORT_SECONDS
    redis.process.send_signal(signal.SIGCONT)
    until(lambda: answers(redis.port))
    assert store.get("a") in (b"1", b"2")  # the save that nobody waited for may have come through
    redis.process.kill()
    redis.process.wait()
    for call in calls:
        with pytest.raises(StoreError):
            call()


def test_a_redis_without_room_is_an_error(redis: Redis, store_of: Callable[..., Any]) -> None:
    import redis as client

    store = store_of(redis.url)
    store.put("a", b"1")
    with client.Redis.from_url(redis.url) as administrator:
        administrator.config_set("maxmemory", "1")
    with pytest.raises(StoreError):
        store.put("b", b"1")
    assert store.get("b") is None and store.get("a") == b"1"


# -- a server over a store ---------------------------------------------------------------------------------


class Unreachable(MemoryStore):
    """A store that fails as one across a network does, while `down`."""

    down = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("get", "put", "delete", "names") and object.__getattribute__(self, "down"):
            raise StoreError("conversations cannot be read or kept at the moment")
        return super().__getattribute__(name)


def test_a_store_that_fails_is_503_and_the_server_lives(tmp_path: Path) -> None:
    runner = ToyRunner(make_bundle(tmp_path / "toy"))
    store = Unreachable(1 << 20)
    body = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
    with serving(open_bundle(tmp_path / "toy"), runner, sessions=store) as running:
        assert ask(running.port, "POST", WORK, body | {"save_session": "talk"}).status == 200
        store.down = True
        failed = [
            ask(running.port, "POST", WORK, body | {"session": "talk"}),
            ask(running.port, "POST", WORK, body | {"save_session": "talk"}),
            ask(running.port, "GET", "/v1/sessions"),
            ask(running.port, "GET", "/v1/sessions/talk"),
            ask(running.port, "DELETE", "/v1/sessions/talk"),
            ask(running.port, "POST", "/v1/sessions/talk/fork", {"id": "b"}),
        ]
        for answer in failed:
            assert answer.status == 503 and answer.error["code"] == "session_store_unavailable"
            assert answer.headers["retry-after"] == "1"
        stream = ask(running.port, "POST", WORK, body | {"save_session": "talk", "stream": True})
        last = json.loads(stream.data.decode().strip().split("data: ")[-1])
        assert stream.status == 503 or last["error"]["code"] == "session_store_unavailable"
        assert ask(running.port, "POST", WORK, body).status == 200
        assert ask(running.port, "GET", "/health/ready").status == 200
        store.down = False
        assert ask(running.port, "POST", WORK, body | {"session": "talk"}).status == 200


# -- a server that is killed -------------------------------------------------------------------------------


@contextmanager
def begun_stream(port: int, body: dict[str, Any]) -> Iterator[HTTPResponse]:
    """A stream whose first text has come."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", WORK, json.dumps(body | {"stream": True}))
        with connection.getresponse() as response:
            assert response.status == 200 and response.readline().startswith(b"data: ")
            yield response
    finally:
        connection.close()


FIRST = {"prompt": "def read(path):\n", "max_tokens": 20, "ignore_eos": True}
SECOND = {"prompt": "\n\nclass Reader:\n", "max_tokens": 500, "ignore_eos": True}
"""Long enough that it is killed in the middle."""
WAYS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7}}


def test_a_killed_servers_conversations_go_on_elsewhere_with_the_same_text(
    sample_bundle: Path, redis: Redis
) -> None:
    model = open_bundle(sample_bundle)
    expected = {}
    with serving(model, open_runner(model, "cpu", threads=1, spinning="off")) as running:
        for way, how in WAYS.items():
            first = ask(running.port, "POST", WORK, FIRST | how | {"save_session": way}).json
            second = ask(running.port, "POST", WORK, SECOND | how | {"session": way}).json
            expected[way] = [answer["choices"][0]["text"] for answer in (first, second)]
    with (
        server_process(sample_bundle, redis) as (a, port_a),
        server_process(sample_bundle, redis) as (_, port_b),
    ):
        for way, how in WAYS.items():
            first = ask(port_a, "POST", WORK, FIRST | how | {"save_session": way}).json
            assert first["choices"][0]["text"] == expected[way][0]
        asked = {way: SECOND | how | {"session": way, "save_session": way} for way, how in WAYS.items()}
        greedy, seeded = (begun_stream(port_a, body) for body in asked.values())
        with greedy as one, seeded as other:
            a.send_signal(signal.SIGKILL)
            for stream in (one, other):
                with pytest.raises((HTTPException, OSError)):  # else the stream came to its end
                    stream.read()
        assert a.wait(10) == -signal.SIGKILL
        for way, body in asked.items():  # what a client does: the same again
            retried = ask(port_b, "POST", WORK, body).json
            assert retried["choices"][0]["text"] == expected[way][1]
            assert retried["usage"]["completion_tokens"] == SECOND["max_tokens"]
            saved = ask(port_b, "GET", f"/v1/sessions/{way}").json
            assert saved["text"].endswith(expected[way][1][-200:])
