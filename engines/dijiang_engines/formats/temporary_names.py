"""Names of outputs that are not complete yet, which tell later runs who is writing them.

A process that is killed cannot clean up. The name of what it left says which process of which machine made
it, so that another run can remove it once that process is gone, and never before.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

# .<target name>.dijiang-<tmp|old>-<machine>-<pid>-<start time>-<counter>
_MADE_BY_US = re.compile(
    r"\.(?P<target>.+)\.dijiang-(?P<role>tmp|old)-(?P<machine>[0-9a-f]{8})"
    r"-(?P<pid>[0-9]{1,18})-(?P<start>[0-9]{1,18})-[0-9]+",
    re.DOTALL,
)
_LONGEST_NAME = 150  # bytes of the target's name kept in the temporary name; file systems allow 255 in all
_counter = itertools.count()


@dataclass(frozen=True)
class Maker:
    """Who made a temporary file or folder, and what it was to become."""

    target: str
    """The name it was to get, or a hash of it if that is long."""
    role: str
    """ "tmp": not complete yet; "old": moved aside for its replacement."""
    machine: str
    pid: int
    start: int
    """When the process started, in clock ticks since boot; 0 where the system does not tell."""

    def may_be_alive(self) -> bool:
        """False only if the process was one of this machine's and is gone."""
        return self.machine != machine() or _is_alive(self.pid, self.start)


def temporary_name(target: Path, role: str) -> str:
    """A name beside `target`, never given out before, for a file or folder of this process."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = "sha256-" + hashlib.sha256(os.fsencode(name)).hexdigest()
    pid = os.getpid()
    return f".{name}.dijiang-{role}-{machine()}-{pid}-{_start_time(pid) or 0}-{next(_counter)}"


def maker_of(name: str) -> Maker | None:
    """Who made what has this name, or None if `temporary_name` did not give it out."""
    match = _MADE_BY_US.fullmatch(name)
    if match is None:
        return None
    return Maker(match["target"], match["role"], match["machine"], int(match["pid"]), int(match["start"]))


def machine() -> str:
    """8 hex digits for this machine and container: process ids mean nothing elsewhere (shared folders)."""
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def _start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if it is gone or /proc is absent."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # proc_pid_stat(5): field 22; field 2 is the command in parentheses and may hold anything
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _is_alive(pid: int, start: int) -> bool:
    if Path("/proc/self/stat").exists():
        return _start_time(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
