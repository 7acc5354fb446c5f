"""`bench serve` beside what the server itself counted, and against servers that do not behave.

The hostile server is a fake: it proves how the client takes it, not how any real server is.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from support.fakes.runner import ToyRunner
from support.makers.toy_bundle import make_bundle
from support.server import Running, serving

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.serving.serve import ServerOptions
from dijiang_export.bench.serve.http import Failure, events, read_url
from dijiang_export.bench.serve.measure import Load, percentiles
from dijiang_export.cli import main

KEY = "a-key-that-nobody-may-see"
STEP_SECONDS = 0.004


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Running]:
    """This project's server, with a key, and steps of 4 ms."""
    runner = ToyRunner(make_bundle(tmp_path / "toy"))
    runner.tamper = lambda name, arrays: time.sleep(STEP_SECONDS)
    options = ServerOptions(slots=4, keys=(KEY,))
    with serving(open_bundle(tmp_path / "toy"), runner, options) as running:
        yield running


def measured(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """What the command prints as JSON: its result, or its error."""
    assert main(["bench", "serve", *words, "--json"]) == code
    out, err = capfd.readouterr()
    found: dict[str, Any] = json.loads(out if out else err)
    return found


def test_what_it_counts_is_what_the_server_counted(
    ours: Running, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIJIANG_API_KEY", KEY)
    counts = ours.service.scheduler.counts
    save, plot = tmp_path / "record.json", tmp_path / "record.svg"
    found = measured(
        capfd, ours.url, "--concurrency", "1", "--concurrency", "3", "--rounds", "2", "-n", "8",
        "--prompt-tokens", "20", "--save", str(save), "--plot", str(plot),
    )  # fmt: skip
    assert json.loads(save.read_text()) == found
    assert plot.read_text().startswith("<svg") and "between tokens, p99" in plot.read_text()
    one, three = found["levels"]
    assert (one["streams"], three["streams"]) == (2, 6) and one["failures"] == three["failures"] == 0
    # 8 tokens each of 1 + 2 + 6 streams, and 4 of each of the 1 + 3 that warm up.
    assert one["tokens"] + three["tokens"] + 8 + 4 * 4 == counts.generated_tokens
    assert one["prompt_tokens"] + three["prompt_tokens"] + 20 + 4 * 4 == counts.prompt_tokens
    assert found["server"]["prompts"] == "token ids" and one["prompt_tokens"] == 40
    for level in (one, three):
        assert STEP_SECONDS <= level["between_tokens"]["p50"] < 1
        assert STEP_SECONDS <= level["first_token"]["p50"] < 1
        assert level["tokens_per_second"] == pytest.approx(level["tokens"] / level["seconds"])
        assert level["tokens_per_second"] < level["concurrency"] / STEP_SECONDS
    # The toy's tokens are bytes, and most of what it says is no text until the next comes.
    assert all("fewer chunks" in note for note in found["notes"])


def test_a_key_is_asked_for_and_kept(
    ours: Running, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = measured(capfd, ours.url, code=1)["error"]
    assert "401" in error["got"] and "--api-key" in error["hint"]
    given = ("--concurrency", "1", "--rounds", "1", "-n", "2", "--prompt-tokens", "2")
    for words in (("--api-key", KEY), (f"--api-key={KEY}",)):
        monkeypatch.setattr("sys.argv", ["dijiang-export", "bench", "serve", ours.url, *words])
        found = measured(capfd, ours.url, *given, *words)
        assert KEY not in json.dumps(found) and "***" in found["command"]


def test_a_model_that_the_server_does_not_have(ours: Running, capfd: pytest.CaptureFixture[str]) -> None:
    error = measured(capfd, ours.url, "--api-key", KEY, "--model", "other", code=1)["error"]
    assert "404" in error["got"] and "other" in error["got"]


def test_the_table_is_for_people(ours: Running, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--concurrency", "2", "--rounds", "1", "-n", "3", "--prompt-tokens", "2", "--api-key", KEY]
    assert main(["bench", "serve", ours.url, *words]) == 0
    out = capfd.readouterr().out
    assert "first token p50" in out and " ms" in out and "2 token ids" in out


# -- servers that do not behave ----------------------------------------------------------------------------

EVENT = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
MODELS = json.dumps({"data": [{"id": "fake\x1b[31m"}]}).encode()

Behaviour = Callable[[socket.socket, dict[str, Any]], None]


def answer(status: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Hostile:
    """Lists a model, and does with requests for streams what a test says."""

    def __init__(self, behave: Behaviour, models: bytes = answer("200 OK", MODELS)) -> None:
        self.behave, self.models = behave, models
        self.bodies: list[dict[str, Any]] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                opened, _ = self.listening.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._answer, args=(opened,)))
            self.threads[-1].start()

    def _answer(self, opened: socket.socket) -> None:
        with opened, opened.makefile("rb") as lines:
            first = lines.readline().decode()
            size = 0
            while line := lines.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            body = json.loads(lines.read(size) or b"{}")
            try:
                if "models" in first:
                    opened.sendall(self.models)
                elif "tokenize" in first:
                    opened.sendall(answer("404 Not Found"))
                else:
                    self.bodies.append(body)
                    self.behave(opened, body)
            except OSError:
                pass  # the client has left, as it may

    def end(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def hostile(behave: Behaviour, **given: Any) -> Iterator[Hostile]:
    server = Hostile(behave, **given)
    try:
        yield server
    finally:
        server.end()


def says(data: bytes) -> Behaviour:
    return lambda opened, body: opened.sendall(data)


def hang(opened: socket.socket, body: dict[str, Any]) -> None:
    """Say nothing until the client has left."""
    opened.settimeout(20)
    opened.recv(1)


def endless(opened: socket.socket, body: dict[str, Any]) -> None:
    opened.sendall(STREAM)
    while True:
        opened.sendall(EVENT * 100)


def silent_endless(opened: socket.socket, body: dict[str, Any]) -> None:
    """Signs of life, and no token."""
    opened.sendall(STREAM)
    while True:
        opened.sendall(b": ping\n\ndata: {}\n\n")
        time.sleep(0.01)


def full(message: str) -> bytes:
    return answer("429 Too Many Requests", json.dumps({"error": {"message": message}}).encode())


BROKEN: dict[str, tuple[Behaviour, str]] = {
    "closes at once": (says(b""), "closed before the end"),
    "closes in the head": (says(b"HTTP/1.1 200 OK\r\nContent-"), "closed before the end"),
    "hangs": (hang, "no end within"),
    "hangs in the stream": (lambda o, b: (o.sendall(STREAM + EVENT), hang(o, b))[1], "no end within"),
    "pings for ever": (silent_endless, "no end within"),
    "sends for ever": (endless, "more than was asked for"),
    "an event without end": (says(STREAM + b"data: " + b"x" * (3 << 20)), "too long"),
    "a line without end": (says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 18)), "too long"),
    "breaks off": (says(STREAM + EVENT), "ended before its text did"),
    "no JSON": (says(STREAM + b"data: {\n\n"), "not JSON"),
    "deep JSON": (says(STREAM + b"data: " + b"[" * 200_000 + b"\n\n"), "not JSON"),
    "no object": (says(STREAM + b"data: 3\n\n"), "no object"),
    "an odd choice": (says(STREAM + b'data: {"choices":[3]}\n\n'), "no object"),
    "an error in the stream": (
        says(STREAM + EVENT + b'data: {"error":{"message":"out of memory"}}\n\n'), "out of memory",
    ),
    "no stream": (says(answer("200 OK", b"{}")), "no stream of events"),
    "no HTTP": (says(b"SSH-2.0-OpenSSH\r\n\r\n"), "not HTTP"),
    "a bad chunk": (
        says(STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"), "a chunk's size is no number",
    ),
    "a short chunk": (says(STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\nff\r\nab"), "closed before"),
    "full": (says(full("come again")), "429 Too Many Requests: come again"),
    "elsewhere": (says(b"HTTP/1.1 307 x\r\nLocation: http://127.0.0.1:9/\r\n\r\n"), "307"),
    "failed": (says(answer("500 x", b"<html>")), "500 Internal Server Error"),
    "refuses all fields": (says(answer("400 x", b'{"detail":"no"}')), "400 Bad Request: no"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_that_does_not_behave_is_one_message(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    behave, reason = BROKEN[name]
    begun = time.monotonic()
    with hostile(behave) as server:
        error = measured(capfd, server.url, "--timeout", "0.5", "-n", "4", code=1)["error"]
    assert reason in error["got"] and server.url in error["what"]
    assert time.monotonic() - begun < 10


def test_no_server_is_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    assert "cannot connect" in measured(capfd, f"http://127.0.0.1:{port}", code=1)["error"]["got"]


@pytest.mark.parametrize("models", [b"{}", b'{"data":[]}', b'{"data":[{"id":3}]}', b"[", b'"x"'])
def test_a_server_without_a_model_is_one_message(models: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with hostile(hang, models=answer("200 OK", models)) as server:
        assert "error" in measured(capfd, server.url, code=1)


def test_failures_are_counted_by_their_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    turn = iter(range(1000))

    def behave(opened: socket.socket, body: dict[str, Any]) -> None:
        # The first three are the warm-up's.
        number = next(turn)
        opened.sendall(full("full\x1b[2J") if number > 2 and number % 2 else STREAM + EVENT + LAST)

    save = tmp_path / "record.json"
    with hostile(behave) as server:
        words = ("--concurrency", "1", "--rounds", "4", "-n", "2", "--save", str(save))
        assert main(["bench", "serve", server.url, *words]) == 0
    out, _ = capfd.readouterr()
    assert "\x1b" not in out
    (level,) = json.loads(save.read_text())["levels"]
    assert (level["streams"], level["failures"], level["tokens"]) == (2, 2, 4)
    assert level["reasons"] == {"429 Too Many Requests: full\x1b[2J": 2}


def test_a_server_that_goes_away_ends_the_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    turn = iter(range(1000))

    def behave(opened: socket.socket, body: dict[str, Any]) -> None:
        # The warm-ups' 1 + 1, and one round.
        opened.sendall(STREAM + EVENT + LAST if next(turn) < 3 else b"")

    with hostile(behave) as server:
        words = ("--concurrency", "1", "--concurrency", "2", "--concurrency", "3", "--rounds", "1", "-n", "2")
        found = measured(capfd, server.url, *words)
    assert [level["streams"] for level in found["levels"]] == [1, 0]
    assert found["levels"][1]["first_token"] is None and found["levels"][1]["tokens_per_second"] is None
    assert any("nothing further" in note for note in found["notes"])


def test_without_usage_chunks_are_counted_and_it_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with hostile(says(STREAM + 3 * EVENT + LAST)) as server:
        found = measured(capfd, server.url, "--concurrency", "2", "--rounds", "1", "-n", "4")
    (level,) = found["levels"]
    assert level["tokens"] == 8 and level["prompt_tokens"] is None
    assert any("chunks are counted" in note for note in found["notes"])
    assert found["server"]["prompts"] == "words" and len(server.bodies[0]["prompt"].split()) == 128


@pytest.mark.parametrize("refused", ["ignore_eos", "stream_options"])
def test_what_a_server_does_not_know_is_left_out_and_named(
    refused: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def behave(opened: socket.socket, body: dict[str, Any]) -> None:
        opened.sendall(answer("400 x") if refused in body else STREAM + EVENT + LAST)

    with hostile(behave) as server:
        found = measured(capfd, server.url, "--concurrency", "1", "--rounds", "1", "-n", "2")
    other = {"ignore_eos", "stream_options"} - {refused}
    assert all(refused not in body and other <= set(body) for body in server.bodies[2:])
    assert any(refused == "stream_options" or refused in note for note in found["notes"])


def test_several_tokens_a_chunk_are_counted_as_the_server_says(capfd: pytest.CaptureFixture[str]) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}\n\n'
    body = EVENT + LAST.replace(b"data: [DONE]", usage.strip() + b"\n\ndata: [DONE]")
    framed = b"".join(b"%x;x=y\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body))) + b"0\r\n\r\n"
    with hostile(says(STREAM[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + framed)) as server:
        found = measured(capfd, server.url, "--concurrency", "1", "--rounds", "2", "-n", "9")
    (level,) = found["levels"]
    assert (level["tokens"], level["chunks"], level["prompt_tokens"]) == (18, 4, 14)
    assert any("fewer chunks" in note for note in found["notes"])


# -- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_are_the_same_however_they_are_cut(end: bytes) -> None:
    text = end.join([b": hello", b"data: one", b"", b"event: x", b"data:two", b"data: more", b"", b"", b""])

    async def all_of(size: int) -> list[bytes]:
        async def parts() -> AsyncIterator[bytes]:
            for start in range(0, len(text), size):
                yield text[start : start + size]

        return [event async for event in events(parts())]

    for size in range(1, len(text) + 1):
        assert asyncio.run(all_of(size)) == [b"one", b"two\nmore"]


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:8000", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://u:p@x",
        "http://x/v1?a=b", "http://x/#y", "http://x/a b", "http://x/\r\nX: y", "http://[::1", "http://é",
    ],
)  # fmt: skip
def test_what_is_no_url_is_wrong_usage(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        read_url(url)
    assert measured(capfd, url, code=2)["error"]["exit_code"] == 2


def test_urls() -> None:
    for url in ("http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/"):
        assert read_url(url).base == "" and read_url(url).netloc == "h:8000"
    assert read_url("https://h/proxy/v1").base == "/proxy" and read_url("https://h").port == 443
    assert read_url("http://[::1]:9").netloc == "[::1]:9"


def test_loads_and_percentiles() -> None:
    for wrong in ({"tokens": 0}, {"rounds": 0}, {"prompt_tokens": 0}, {"concurrencies": ()}):
        with pytest.raises(UsageError):
            Load(**wrong)  # type: ignore[arg-type]
    assert percentiles([], (50,)) is None
    assert percentiles([3.0, 1.0, 2.0], (50, 100)) == {"p50": 2.0, "p100": 3.0}
    assert str(Failure("x", 429)) == "x"
