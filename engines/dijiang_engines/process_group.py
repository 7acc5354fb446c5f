"""Ending a process that was started in a session of its own, with everything that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import Any

GRACE_SECONDS = 5


def end_group(process: subprocess.Popen[Any]) -> None:
    """End the process's whole group, asked first and then by force.

    Force comes once the process has gone or GRACE_SECONDS are over: what it started may not have listened.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
