"""Processes that do a stranger's work within limits: starting and asking them, and the limits.

A message is a byte that says what it is, eight bytes of its length, little-endian, and that many bytes. The
other side answers each with one: DONE, or another byte and why not.
"""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

LOAD, DONE, FAILED = b"L", b"K", b"E"
"""What is sent first; what an answer may be."""
_FRAME = struct.Struct("<cQ")


class ProcessEndedError(Exception):
    """The process has ended, mostly at a limit.

    Args:
        code: its exit code.
        size: bytes that it was given to work on.
    """

    def __init__(self, code: int, size: int) -> None:
        super().__init__(code)
        self.code, self.size = code, size

    @property
    def too_long(self) -> bool:
        """It had used up its seconds."""
        return self.code == -signal.SIGXCPU


class LimitedProcess:
    """Starts when it is first needed, and again after it has ended. Any thread may ask.

    Args:
        command: its command line (`fresh_interpreter.command_for`); the seconds that it may take follow.
        first: what it is to LOAD before anything else.
        environment: what it has besides this process's.
    """

    def __init__(self, command: Sequence[str], first: bytes, environment: Mapping[str, str]) -> None:
        self._command, self._first, self._environment = command, first, environment
        self._lock = threading.Lock()
        self.running: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float) -> tuple[bytes, bytes]:
        """Have it started and loaded, and its answer to that; DONE if it had been.

        Args:
            seconds: of CPU, for each message; it may add some for a message's size.

        Raises:
            ProcessEndedError: loading has ended it.
        """
        with self._lock:
            return self._start(seconds)

    def ask(self, kind: bytes, data: bytes, seconds: float) -> tuple[bytes, bytes]:
        """Its answer to a message, or to LOAD if that has failed; arguments as above.

        Raises:
            ProcessEndedError: that has ended it.
        """
        with self._lock:
            answer = self._start(seconds)
            return answer if answer[0] != DONE else self._exchange(kind, data)

    def close(self) -> None:
        """End it, if it runs."""
        with self._lock:
            process, self.running = self.running, None
        if process is not None:
            end_process(process)

    def _start(self, seconds: float) -> tuple[bytes, bytes]:
        if self.running is not None:
            return DONE, b""
        self.running = subprocess.Popen(
            [*self._command, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=os.environ | self._environment | {"MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        weakref.finalize(self, end_process, self.running)
        return self._exchange(LOAD, self._first)

    def _exchange(self, kind: bytes, data: bytes) -> tuple[bytes, bytes]:
        process = self.running
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            send(process.stdin, kind, data)
            return receive(process.stdout)
        except (OSError, EOFError):
            self.running = None
            end_process(process)
            raise ProcessEndedError(process.returncode, len(data)) from None


def limit_process(seconds: float, more_bytes: int) -> None:
    """From here on this process gets so much CPU time and so much more memory; beyond, the system ends it."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), most))
    with suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, most))


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that has ended, or end it."""
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def send(file: IO[bytes], kind: bytes, data: bytes) -> None:
    """Write a message."""
    file.write(_FRAME.pack(kind, len(data)))
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> tuple[bytes, bytes]:
    """Read a message: what it is, and its bytes.

    Raises:
        EOFError: the other side has ended.
    """
    kind, size = _FRAME.unpack(_exactly(file, _FRAME.size))
    return kind, _exactly(file, size)


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError
    return data
