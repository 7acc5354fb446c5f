"""A real Redis or Valkey on loopback, and servers of samples/scale over it.

Tests skip where there is none, or no client for it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT

SCALE = ROOT / "samples/scale"
PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")


@dataclass
class Redis:
    """A server of conversations that keeps nothing on disk."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    pytest.importorskip("redis", reason="the Redis client for Python is not installed")
    if PROGRAM is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = [
        "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder),
    ]  # fmt: skip
    process = subprocess.Popen([PROGRAM, *words], stdout=subprocess.DEVNULL)
    try:
        until(lambda: answers(port))
        yield Redis(process, port)
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as opened:
            opened.sendall(b"PING\r\n")
            return opened.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)


@contextmanager
def server_process(bundle: Path, redis: Redis, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """samples/scale/app.py, and its port."""
    process = subprocess.Popen(
        [
            sys.executable, SCALE / "app.py", bundle, "--redis", redis.url, "--port", "0", "--threads", "1",
            "--grace", "1", *options,
        ],
        stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield process, int(line.split(":")[2].split("/")[0])
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()
