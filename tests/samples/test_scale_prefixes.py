"""samples/scale: what one server has read of a prompt another finds in a real Redis on loopback.

Skipped where there is no Redis or Valkey, or no client for it.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from support.http import ask
from support.redis import SCALE, Redis, answers, server_process, until

from dijiang_engines.errors import UsageError

WORK = "/v1/completions"
SHARED = "def function(argument):\n    return argument\n\n" * 60
"""Of which reading takes a good part of a second."""
PATIENT = ("--shared-prefixes", "60", "--prefix-wait", "20")
"""However busy the machine is, an answer of Redis is waited for."""
BODY = {
    "prompt": SHARED + "class", "max_tokens": 30, "logprobs": 3, "ignore_eos": True, "temperature": 0,
}  # fmt: skip
WAYS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7}}


@pytest.fixture
def store_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(str(SCALE))
    from redis_prefixes import RedisPrefixStore

    return RedisPrefixStore


@pytest.fixture
def administrator(redis: Redis) -> Iterator[Any]:
    import redis as client

    with client.Redis.from_url(redis.url) as made:
        yield made


def answer(port: int, body: dict[str, Any]) -> tuple[int, Any, float]:
    """How many tokens were found, what was generated, and the seconds that it took."""
    begun = time.monotonic()
    found = ask(port, "POST", WORK, body)
    seconds = time.monotonic() - begun
    assert found.status == 200, found.data
    return found.json["usage"]["prompt_tokens_details"]["cached_tokens"], found.json["choices"], seconds


def counted(port: int, name: str) -> float:
    lines = ask(port, "GET", "/metrics").data.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"dijiang:{name}"))


# -- the store ---------------------------------------------------------------------------------------------


def test_the_first_of_many_names_is_found_and_its_time_begins_anew(
    redis: Redis, store_of: Callable[..., Any], administrator: Any
) -> None:
    store = store_of(redis.url, ttl_seconds=1, read_seconds=5.0, prefix="p:")
    assert store.find(["a", "b"]) is None
    store.put("b", b"\x00\xff\r\n")
    store.put("c", b"2")
    begun = time.monotonic()
    while time.monotonic() - begun < 1.5:
        assert store.find(["a", "b", "c"]) == (1, b"\x00\xff\r\n")
        time.sleep(0.1)
    assert store.find(["c"]) is None and administrator.keys() == [b"p:b"]
    many = [f"{number:032x}" for number in range(5000)]
    assert store.find([*many, "b"]) == (5000, b"\x00\xff\r\n")
    store.put("b", b"newer")
    assert store.find(["b"]) == (0, b"newer")
    store.close()
    until(lambda: len(administrator.client_list()) == 1)  # no connection is left behind


def test_numbers_and_urls_that_cannot_be_are_refused(redis: Redis, store_of: Callable[..., Any]) -> None:
    for wrong in ({"ttl_seconds": 0}, {"read_seconds": 0}, {"write_seconds": -1}):
        with pytest.raises(UsageError):
            store_of(redis.url, **wrong)
    with pytest.raises(UsageError):
        store_of("http://127.0.0.1:1")


def test_a_redis_that_hangs_raises_in_time(redis: Redis, store_of: Callable[..., Any]) -> None:
    store = store_of(redis.url, read_seconds=0.2, write_seconds=0.2)
    redis.process.send_signal(signal.SIGSTOP)
    for call in (lambda: store.find(["a"]), lambda: store.put("a", b"1")):
        begun = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)time"):
            call()
        assert time.monotonic() - begun < 2


def test_conversations_stay_when_there_is_no_room_for_all_shared_states(
    redis: Redis, store_of: Callable[..., Any], administrator: Any
) -> None:
    """Under volatile-ttl, as in kubernetes.yaml, what is kept for minutes goes before what is for a day."""
    from redis_store import RedisStore

    administrator.config_set("maxmemory-policy", "volatile-ttl")
    administrator.config_set("maxmemory-samples", 64)  # Redis looks at some keys only, and may else err
    administrator.config_set("maxmemory", administrator.info("memory")["used_memory"] + (4 << 20))
    sessions, prefixes = RedisStore(redis.url), store_of(redis.url, read_seconds=5.0)
    for number in range(5):
        sessions.put(str(number), bytes(200_000))
    for number in range(60):
        prefixes.put(str(number), bytes(200_000))
    assert all(sessions.get(str(number)) is not None for number in range(5))
    kept = [number for number in range(60) if prefixes.find([str(number)]) is not None]
    assert 0 < len(kept) < 25


# -- two servers -------------------------------------------------------------------------------------------


def test_a_server_finds_what_another_has_read_bit_for_bit(
    sample_bundle: Path, redis: Redis, administrator: Any
) -> None:
    """Texts and log-probabilities equal those of a server that shares nothing; then values are damaged."""
    with server_process(sample_bundle, redis) as (_, port):
        expected = {way: answer(port, BODY | how) for way, how in WAYS.items()}
    assert expected["greedy"][0] == 0 and not administrator.keys()
    with server_process(sample_bundle, redis, *PATIENT) as (_, port):
        first = answer(port, BODY | WAYS["greedy"])
        assert first[:2] == (0, expected["greedy"][1])
        again = answer(port, BODY | WAYS["greedy"])
        assert again[1] == expected["greedy"][1]
        pieces = again[0] // 64
        until(lambda: counted(port, "shared_prefix_written_total") == pieces)
    assert len(administrator.keys()) == pieces >= 10
    with server_process(sample_bundle, redis, *PATIENT) as (_, port):
        for way, how in WAYS.items():
            cached, choices, _seconds = answer(port, BODY | how)
            assert cached == 64 * pieces and choices == expected[way][1]
        assert counted(port, "shared_prefix_tokens_total") == 64 * pieces  # the second was in memory
    with server_process(sample_bundle, redis, *PATIENT, "--piece", "32") as (_, port):
        assert answer(port, BODY)[0] == 0  # other pieces, other bits
    for key in list(administrator.scan_iter()):
        value = bytearray(administrator.get(key))
        value[len(value) // 2] ^= 1
        administrator.set(key, bytes(value), keepttl=True)
    with server_process(sample_bundle, redis, *PATIENT) as (_, port):
        cached, choices, _seconds = answer(port, BODY | WAYS["greedy"])
        assert cached == 0 and choices == expected["greedy"][1]
        assert counted(port, "shared_prefix_damaged_total") == 1


def test_a_hit_takes_less_time_than_reading(sample_bundle: Path, redis: Redis, capsys: Any) -> None:
    """The first token of long prompts that the other server has read, beside those that nobody has."""

    def prompt(number: int) -> dict[str, Any]:
        return {"prompt": f"# {number}\n" + SHARED + SHARED, "max_tokens": 1}

    with (
        server_process(sample_bundle, redis, *PATIENT) as (_, a),
        server_process(sample_bundle, redis, *PATIENT) as (_, b),
    ):
        misses = [answer(a, prompt(number)) for number in range(5)]
        kept = [answer(a, prompt(number))[0] for number in range(5)]  # in its memory
        until(lambda: counted(a, "shared_prefix_written_total") == sum(kept) // 64)
        hits = [answer(b, prompt(number)) for number in range(5)]
    assert [cached for cached, _, _ in misses] == [0] * 5 and [cached for cached, _, _ in hits] == kept
    miss, hit = (statistics.median(seconds for _, _, seconds in each) for each in (misses, hits))
    with capsys.disabled():
        print(
            f"\nfirst token after {hits[0][0]} tokens: {1000 * miss:.0f} ms read, {1000 * hit:.0f} ms found"
        )
    assert hit < miss / 2


def test_redis_hangs_and_goes_while_a_server_streams(sample_bundle: Path, redis: Redis) -> None:
    """Texts and prompts go on without it; when it is back, states are shared again."""
    options = ("--shared-prefixes", "60")
    with (
        server_process(sample_bundle, redis, *options) as (_, port),
        server_process(sample_bundle, redis, *PATIENT) as (_, other),
    ):
        expected = answer(port, BODY | {"prompt": SHARED + "x"})[1]
        redis.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        again = [answer(port, BODY | {"prompt": f"# {number}\n" + SHARED})[0] for number in range(4)]
        assert again == [0] * 4 and time.monotonic() - begun < 30
        assert answer(port, BODY | {"prompt": SHARED + "x"})[1] == expected
        assert counted(port, "shared_prefix_failures_total") >= 1
        until(lambda: counted(port, "shared_prefix_dropped_total") >= 1)  # the writer may still wait
        assert ask(port, "GET", "/health/ready").status == 200
        redis.process.send_signal(signal.SIGCONT)
        until(lambda: answers(redis.port))
        numbers = iter(range(100, 1000))

        def shared_again() -> bool:
            body = {"prompt": f"# {next(numbers)}\n" + SHARED, "max_tokens": 1}
            written = counted(port, "shared_prefix_written_total")
            answer(port, body)
            time.sleep(0.3)
            return counted(port, "shared_prefix_written_total") > written and answer(other, body)[0] > 0

        until(shared_again, 60.0)
        redis.process.kill()
        redis.process.wait()
        _cached, choices, _seconds = answer(other, BODY | {"prompt": SHARED + "x"})
        assert choices == expected
        assert ask(other, "GET", "/health/ready").status == 200
