"""Runs `worker` in a process of its own and waits for its end, however that comes about."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dijiang_engines.building.events import NODE, PARSING
from dijiang_engines.building.request import BuildRequest
from dijiang_engines.errors import RunnerError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.plugin.cache import cache_folder
from dijiang_engines.process_group import end_group
from dijiang_engines.progress import ProgressFactory


def run_worker(
    request: BuildRequest,
    folder: Path,
    progress: ProgressFactory,
    title: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Build one plan; what the worker's "done" says.

    Args:
        request: which plan.
        folder: for the request and the log while it runs; neither is left there.
        progress: one unit for each step that TensorRT reports.
        title: of the progress.
        environment: of the process; default: this one's.

    Raises:
        RunnerError: it failed or died. Whatever else ends the wait also ends the process.
    """
    note = folder / "request.json"
    request.write(note)
    log_path = folder / "build.log"
    command = command_for("dijiang_engines.building.worker", str(note))
    with log_path.open("w", encoding="utf-8") as log_file, progress(title, None, "items") as bar:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_file, text=True,
            start_new_session=True, env=environment,
        )  # fmt: skip
        with process:
            try:
                done, phase = _follow(process, bar)
                status = process.wait()
            except BaseException:
                end_group(process)
                raise
    text = log_path.read_text(encoding="utf-8", errors="replace")
    note.unlink()
    kept = _keep_log(log_path)
    if "error" in done:
        hint = "; ".join(part for part in (done["hint"], kept) if part)
        raise RunnerError(done["what"], got=done["got"], expected=done["expected"], hint=hint or None)
    if status != 0 or not done:
        raise _died(status, text, kept, request, phase)
    return done


def _keep_log(log_path: Path) -> str | None:
    """Move the builder's log to where the next build replaces it; says where that is."""
    target = cache_folder().parent / "build-engine.log"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(log_path, target)
    except OSError:
        log_path.unlink(missing_ok=True)
        return None
    return f"the builder's log is {target}"


def _follow(process: subprocess.Popen[str], bar: Any) -> tuple[dict[str, Any], str]:
    """What it said last, and the phase that it was in when it ended."""
    assert process.stdout is not None
    last: dict[str, Any] = {}
    phase = ""
    for line in process.stdout:
        with suppress(json.JSONDecodeError):
            event = json.loads(line)
            kind = event.pop("event", None)
            if kind == "error":
                last = event | {"error": True}
            elif kind == "done":
                last = event
            elif kind in ("step", "phase"):
                phase = event["name"] if kind == "phase" else phase
                bar.advance()
    return last, phase


def _died(status: int, log: str, kept: str | None, request: BuildRequest, phase: str) -> RunnerError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    nodes = [line.partition(NODE)[2] for line in lines if NODE in line]
    what, hint = "the builder's process died", kept
    if phase == PARSING:
        what += f" while it parsed {request.onnx.name}" + (f", at the node {nodes[-1]}" if nodes else "")
    if status == -signal.SIGKILL:
        hint = "host memory ran out: close other programs, add swap, or use a smaller --max-batch"
    words = " | ".join([line for line in lines if NODE not in line][-3:])[:500]
    if status < 0:
        words = f"signal {-status}" + (f": {words}" if words and phase == PARSING else "")
    return RunnerError(what, got=words or f"exit code {status}", hint=hint)
