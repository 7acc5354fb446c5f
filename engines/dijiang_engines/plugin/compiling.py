"""Run a long build step: output into a log, progress to a callback, the first errors into the message."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dijiang_engines.errors import PluginError
from dijiang_engines.process_group import end_group

_ERROR_LINE = re.compile(
    r"\berror\b\s*[:#]|\bfatal error\b|\bfatal\s*:|^nvcc (error|fatal)|^ptxas (error|fatal)"
    r"|undefined reference|^CMake Error|unsupported GNU version|No space left on device|cannot find -l",
    re.IGNORECASE,
)
_NOISE = re.compile(r"^(g?make|ninja)(\[\d+\])?:")  # that a compiler failed is no news
_SHOWN_LINES = 4

# A message of a tool -> what helps.
_REMEDIES = (
    (
        r"unsupported GNU version",
        "this nvcc needs an older g++: apt-get install g++-12, then CUDAHOSTCXX=g++-12",
    ),
    (r"Unsupported gpu architecture", "this nvcc does not know that GPU: see `dijiang-export doctor`"),
    (r"cannot find -lcudart|cudart_static", "the CUDA runtime is missing: apt-get install cuda-cudart-dev"),
    (r"cuda_runtime(_api)?\.h: No such file", "CUDA's headers are missing: apt-get install cuda-cudart-dev"),
    (r"No space left on device", "make room, or set XDG_CACHE_HOME to another disk"),
    (r"Killed|signal 9", "the compiler ran out of memory: use --jobs 1"),
)


@dataclass(frozen=True)
class Step:
    """A program to run, and what to say if it fails."""

    failure: str
    command: Sequence[str | os.PathLike[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables besides this process's."""


def run_step(step: Step, log_file: Path, sink: IO[str], percent: Callable[[float], None]) -> None:
    """Run one step to its end.

    Args:
        step: what to run. It gets no standard input, English messages, and a process group of its own.
        log_file: the name of `sink`, for the message.
        sink: takes everything that is printed.
        percent: called with 0..100 as the build tool reports it.

    Raises:
        PluginError: it could not be started, or failed. Whatever else ends the wait (KeyboardInterrupt) also
            ends the step's processes, all of them.
    """
    sink.write(f"$ {' '.join(map(str, step.command))}\n")
    sink.flush()
    try:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"LC_ALL": "C"} | dict(step.environment),
        )
    except OSError as error:
        raise PluginError(step.failure, got=f"{step.command[0]}: {error.strerror}") from error
    lines: list[str] = []
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                sink.write(line)
                lines.append(line.rstrip())
                if (done := _progress(line)) is not None:
                    percent(done)
            status = process.wait()
        except BaseException:
            end_group(process)
            raise
        finally:
            sink.flush()
    if status != 0:
        raise _failure(step, status, lines, log_file)


def first_errors(lines: Sequence[str]) -> list[str]:
    """The lines that say what went wrong first, for people."""
    found = [i for i, line in enumerate(lines) if _ERROR_LINE.search(line) and not _NOISE.match(line)]
    if not found:
        return [line.strip() for line in lines if line.strip()][-_SHOWN_LINES:]
    shown: list[str] = []
    for index in found:
        # CMake puts its message on the lines after "CMake Error at FILE:LINE (message):".
        following = lines[index + 1 : index + 6] if lines[index].startswith("CMake Error") else []
        for line in (lines[index], *following):
            if line.strip() and line.strip() not in shown:
                shown.append(line.strip())
    return shown[:_SHOWN_LINES]


def _progress(line: str) -> float | None:
    if match := re.match(r"\[\s*(\d+)%\]", line):  # make
        return float(match[1])
    if (match := re.match(r"\[(\d+)/(\d+)\]", line)) and int(match[2]):  # ninja
        return 100 * int(match[1]) / int(match[2])
    return None


def _failure(step: Step, status: int, lines: Sequence[str], log_file: Path) -> PluginError:
    everything = "\n".join(lines)
    hints = [remedy for pattern, remedy in _REMEDIES if re.search(pattern, everything)][:1]
    hints.append(f"the whole log is in {log_file}")
    ended = f"signal {-status}" if status < 0 else f"exit code {status}"
    return PluginError(step.failure, got="\n    ".join(first_errors(lines)) or ended, hint="; ".join(hints))
