"""A process's memory as Linux counts it."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path


def memory(process: str) -> dict[str, int]:
    """VmRSS and VmHWM of a process, Pss and Pss_Anon where the kernel tells; bytes."""
    found = {}
    for file, names in (("status", "VmRSS|VmHWM"), ("smaps_rollup", "Pss|Pss_Anon")):
        with suppress(OSError):
            text = Path(f"/proc/{process}/{file}").read_text()
            for match in re.finditer(rf"^({names}):\s+(\d+) kB", text, re.MULTILINE):
                found[match[1]] = int(match[2]) << 10
    return found


def reset_peak() -> None:
    """Let VmHWM start anew, where the kernel allows it: imports have peaks of their own."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
