"""What clients do that they should not, and what the server does when it must end or cannot go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from support.fakes.runner import ToyRunner
from support.http import ask
from support.makers.toy_bundle import make_bundle
from support.server import Running, serving

from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.runners import Runner
from dijiang_engines.serving.serve import ServerOptions

WORK = "/v1/completions"
LONG = {"prompt": [5], "max_tokens": 4096, "ignore_eos": True}
"""More tokens than any test waits for."""


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Running]:
    """Two slots, and steps that take 5 ms."""
    runner = ToyRunner(make_bundle(tmp_path / "toy"))

    def wait(name: str, arrays: dict[Any, Any]) -> None:
        time.sleep(0.005)

    runner.tamper = wait
    with serving(
        open_bundle(tmp_path / "toy"), runner, ServerOptions(slots=2, queue=3), write_seconds=0.5,
        grace_seconds=1.0,
    ) as running:  # fmt: skip
        yield running


def send(port: int, body: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody has read yet."""
    data = json.dumps(body).encode()
    opened = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST {WORK} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    opened.sendall(head.encode() + data)
    return opened


def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait for it; how long that took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.005)
    return time.monotonic() - begun


def reset(opened: socket.socket) -> None:
    """Leave without a word, as a process that is killed."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    opened.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("queued", [False, True], ids=["running", "queued"])
def test_who_leaves_is_forgotten_within_a_second(
    slow: Running, leave: Callable[[socket.socket], None], stream: bool, queued: bool
) -> None:
    """vllm#10806, llama.cpp#24496, #13262."""
    others = [send(slow.port, LONG | {"stream": True}) for _ in range(2 if queued else 0)]
    until(lambda: slow.busy() == len(others))
    leaving = send(slow.port, LONG | {"stream": stream})
    until(lambda: slow.busy() == len(others) + 1)
    leave(leaving)
    assert until(lambda: slow.busy() == len(others)) < 1
    for other in others:
        other.close()
    until(lambda: slow.busy() == 0)
    assert slow.service.open_jobs == 0


def test_who_does_not_read_is_cut_off(slow: Running) -> None:
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    opened.connect(("127.0.0.1", slow.port))
    # Log-probabilities make many bytes of a token.
    data = json.dumps(LONG | {"stream": True, "logprobs": 20, "n": 2}).encode()
    head = f"POST {WORK} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    # Fast enough to fill every buffer soon, and slow enough not to be done before the deadline.
    slow.service.scheduler.runner.tamper = lambda name, arrays: time.sleep(0.001)  # type: ignore[attr-defined]
    opened.sendall(head + data)
    until(lambda: slow.busy() > 0)
    until(lambda: slow.busy() == 0, 30)
    assert slow.service.scheduler.counts.generated_tokens < 2 * 4096
    opened.close()


def test_who_sends_nothing_does_not_stay(model: Bundle, runner: Runner) -> None:
    """A body that does not come is a 408; its connection ends."""
    with serving(model, runner, ServerOptions(body_seconds=0.3)) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as opened:
            opened.sendall(f"POST {WORK} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
            answer = b""
            while part := opened.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 408")


def test_too_many_wait(slow: Running) -> None:
    opened = [send(slow.port, LONG | {"stream": True}) for _ in range(5)]  # two slots, three that wait
    until(lambda: slow.busy() == 5)
    answer = ask(slow.port, "POST", WORK, LONG)
    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
    assert answer.error["code"] == "queue_full"
    for each in opened:
        each.close()
    until(lambda: slow.busy() == 0)
    assert ask(slow.port, "POST", WORK, {"prompt": [5], "max_tokens": 2}).status == 200


def test_a_dead_worker_fails_everything_at_once(slow: Running) -> None:
    """mlx-lm#1909: what is running, what waits, and what comes later."""

    def work(stream: bool) -> Any:
        return ask(slow.port, "POST", WORK, LONG | {"stream": stream})

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(work, number % 2 == 0) for number in range(4)]
        until(lambda: slow.busy() == 4)
        until(lambda: slow.service.scheduler.counts.generated_tokens > 10)

        def break_it(name: str, arrays: dict[Any, Any]) -> None:
            raise MemoryError("no more")

        begun = time.monotonic()
        slow.service.scheduler.runner.tamper = break_it  # type: ignore[attr-defined]
        found = [answer.result(10) for answer in answers]
        assert time.monotonic() - begun < 1
    for answer in found:
        if answer.status == 200:  # the stream had begun
            last = json.loads(answer.data.decode().strip().split("data: ")[-1])
            assert "no more" in last["error"]["message"]
        else:
            assert answer.status == 503 and "no more" in answer.error["message"]
    assert ask(slow.port, "GET", "/health").status == 503
    begun = time.monotonic()
    assert ask(slow.port, "POST", WORK, LONG).status == 503
    assert time.monotonic() - begun < 1


def test_the_end_lets_short_answers_end(slow: Running) -> None:
    """After SIGTERM: nothing new, what is short is whole, what is long says why it is not."""
    with ThreadPoolExecutor(3) as pool:
        short = pool.submit(ask, slow.port, "POST", WORK, LONG | {"max_tokens": 100, "stream": True})
        long = pool.submit(ask, slow.port, "POST", WORK, LONG | {"stream": True})
        until(lambda: slow.busy() == 2 and slow.service.scheduler.counts.generated_tokens > 4)
        slow.end()
        assert short.result(10).data.decode().endswith("data: [DONE]\n\n")
        last = json.loads(long.result(10).data.decode().strip().split("data: ")[-1])
        assert last["error"]["code"] == "shutting_down"
    slow.thread.join(10)
    assert not slow.thread.is_alive()


def test_text_is_the_same_alone_and_among_thirty_two(port: int) -> None:
    """Greedy and seeded, streamed and not, at the same time."""
    bodies = [
        {"prompt": "def f" + "x" * (n % 5), "max_tokens": 10 + n, "seed": n, "temperature": n % 3 / 2}
        for n in range(32)
    ]
    alone = [ask(port, "POST", WORK, body).json["choices"][0]["text"] for body in bodies]

    def work(number: int) -> str:
        body, stream = bodies[number], number % 2 == 0
        answer = ask(port, "POST", WORK, body | {"stream": stream})
        if stream:
            return "".join(event["choices"][0]["text"] for event in answer.events)
        text: str = answer.json["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(work, range(32))) == alone


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat(slow: Running) -> None:
    """vllm#52089. DIJIANG_MANY_REQUESTS asks for more than CI has time for."""
    slow.service.scheduler.runner.tamper = lambda name, arrays: None  # type: ignore[attr-defined]
    count = int(os.environ.get("DIJIANG_MANY_REQUESTS", "600"))

    def some(count: int, seed: int) -> None:
        for number in range(count):
            body = {"prompt": [1 + (seed + number) % 90, 7], "max_tokens": 2, "stream": number % 2 == 0}
            assert ask(slow.port, "POST", WORK, body).status == 200

    some(count // 3, 0)
    before = resident()
    some(count, 1)
    assert resident() - before < 4 << 20
    assert slow.service.open_jobs == 0 and slow.busy() == 0


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_serves_and_ends(sample_bundle: Path) -> None:
    command = [sys.executable, "-m", "dijiang_export", "serve", str(sample_bundle), "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"DIJIANG_API_KEY": "secret"},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr or []))
    reader.start()
    try:
        told = ""
        while not told.endswith("}\n"):
            line = process.stdout.readline()
            assert line, lines
            told += line
        found = json.loads(told)
        port = int(found["url"].rsplit(":", 1)[1].split("/")[0])
        assert found["model"] == "tiny-stdlib" and found["runner"] == "onnxruntime-cpu"
        assert ask(port, "POST", WORK, {"prompt": "x"}).status == 401
        assert ask(port, "POST", WORK, {"prompt": "x", "max_tokens": 3}, "secret").status == 200
        # The address is taken.
        other = subprocess.run(
            [*command[:5], "--port", str(port), "--threads", "1"], capture_output=True, text=True, check=False
        )
        assert other.returncode == 2 and "cannot listen" in other.stderr and "Traceback" not in other.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        reader.join(10)
        process.stdout.close()
        process.stderr.close()
    assert any("point an OpenAI client at" in line for line in lines)
