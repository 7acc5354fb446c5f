"""What every measurement here says of itself: the command, the date, versions, the machine, the commit."""

from __future__ import annotations

import datetime
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dijiang_engines.machine import describe_machine, package_versions
from dijiang_engines.version import __version__

_PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "torch", "triton", "transformers", "onnx",
    "onnxscript", "tensorrt", "cuda-bindings",
)  # fmt: skip


def about_run() -> dict[str, Any]:
    """What was run, when, with what, on what, and how busy that was before (mean of a minute)."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"dijiang-export": __version__, **package_versions(_PACKAGES)},
        "machine": asdict(describe_machine()),
        "load_average": os.getloadavg()[0],
    }


def find_commit() -> str | None:
    """The commit that this code was checked out at, with "+" if files differ from it; None if unknown.

    DIJIANG_COMMIT names it for a copy of the files that has no repository around it.
    """
    if named := os.environ.get("DIJIANG_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=20, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
