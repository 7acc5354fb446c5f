"""Talking to a process in frames of bytes, and the limits of time and memory that it sets itself."""

from __future__ import annotations

import math
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

_FRAME = struct.Struct("<cQ")


def end(process: subprocess.Popen[bytes]) -> None:
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
    """Write one frame: what kind it is of, one byte, and what it says."""
    file.write(_FRAME.pack(kind, len(data)))
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> tuple[bytes, bytes]:
    """The next frame.

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


def limit(seconds: float, more_bytes: int) -> None:
    """From here on so much CPU time and so much more memory; beyond, the system ends this process."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), most))
    with suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, most))
