"""Measure peers, each in a process of its own with a limit on its time; the JSON document of it all.

Weights are random: they change no time. A peer's process (`dijiang_export.bench.peers.run`) reports every
figure as soon as it has it: what fails or takes too long is reported with its reason and costs nothing else.
Needs no PyTorch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.inspection import kv_cache_bytes, step_bytes
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.sizes import ITEM_BYTES, part_sizes
from dijiang_export.bench.peers.settings import PEERS, WORDS, PeerSettings, neox_spec
from dijiang_export.bench.random_checkpoint import Shape

KIND = "bench-peers"
"""What these documents call themselves; `bench report` reads them."""
LIMIT = 300.0


@dataclass
class PeerResult:
    """What one peer did."""

    name: str
    error: str | None = None
    """Why it ended early, or never began; what it had measured until then counts."""
    seconds: float = 0.0
    """Wall time of its process, imports and compilation included."""
    versions: dict[str, str] = field(default_factory=dict)
    gpu: dict[str, Any] | None = None
    bandwidth: dict[str, Any] | None = None
    decode: list[dict[str, Any]] = field(default_factory=list)
    """{"batch", "context", "timing", "error", "compile_seconds", "peak_bytes", "notes"}: a timing is of one
    token of every row, its `calls` are blocks of several; `error` is of the logits against the same model
    run eagerly over the whole text, in their standard deviations."""
    prefill: list[dict[str, Any]] = field(default_factory=list)
    """{"form", "batch", "length", "timing", "error", "compile_seconds", "peak_bytes", "notes"}."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """{"what", "why"}."""


def step_floor_bytes(shape: Shape, dtype: str) -> dict[str, Any]:
    """What a step must move, in bytes.

    Returns:
        By kind of model ("dijiang", "hf"): `weights` that a step reads; `per_row`, state read and written for
        each row; `per_token`, keys and values read for each row and token before it.
    """
    spec = neox_spec(shape)
    own = ("attention gate", "feature map and group norm", "decay")
    extra = sum(part.nbytes(dtype) for name, part in part_sizes(spec).items() if name in own)
    weights = step_bytes(spec, dtype)
    return {
        "dijiang": {"weights": weights, "per_row": 2 * spec.state_bytes, "per_token": 0},
        "hf": {
            "weights": weights - extra,
            "per_row": 0,
            "per_token": kv_cache_bytes(spec, 1, ITEM_BYTES[dtype]),
        },
    }


def measure_peers(
    settings: PeerSettings,
    peers: Sequence[str] = PEERS,
    *,
    limit: float = LIMIT,
    progress: ProgressFactory = silent,
    report: Callable[[Sequence[PeerResult]], None] = lambda results: None,
) -> list[PeerResult]:
    """Measure peers, one after the other.

    Args:
        settings: what is asked of each.
        peers: names out of PEERS.
        limit: seconds for each of them, imports and compilation included.
        progress: one unit for each peer.
        report: called with the results so far after each peer, so that nothing is lost when it is stopped.

    Raises:
        UsageError: there is no such peer, or the sizes do not fit each other.
        RunnerError: not one figure came of it.
    """
    for name in peers:
        if name not in PEERS:
            raise UsageError(f"there is no peer {name!r}", expected=", ".join(PEERS))
    neox_spec(settings.shape)
    results = []
    with progress("Measuring peers", len(peers), "items") as bar:
        for name in peers:
            results.append(run_peer(settings, name, limit))
            report(results)
            bar.advance()
    if not any(r.decode or r.prefill for r in results):
        raise RunnerError(
            "no peer could be measured",
            got="; ".join(_why(result) for result in results),
            hint="peers need PyTorch and transformers: pip install 'dijiang-export[export]'; see --device",
        )
    return results


def _why(result: PeerResult) -> str:
    reasons = [result.error] if result.error else [left["why"] for left in result.left_out]
    return f"{result.name}: {next(iter(reasons), 'nothing to measure')}"


def run_peer(settings: PeerSettings, name: str, limit: float) -> PeerResult:
    """Measure one peer in a fresh interpreter; whatever happens there ends up in the result."""
    command = command_for("dijiang_export.bench.peers.run", name, json.dumps(settings.to_json()))
    threads = str(settings.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dijiang-peer-") as folder:
        said, complained = Path(folder) / "out", Path(folder) / "err"
        with said.open("wb") as out, complained.open("wb") as err:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                code_of_exit: int | None = child.wait(limit)
            except subprocess.TimeoutExpired:
                code_of_exit = None
            finally:
                # A session of its own: the compiler's workers go with it.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        result, last = _collect(name, said.read_text(encoding="utf-8", errors="replace"))
        if code_of_exit is None:
            result.error = f"stopped after {limit:g} s, during {last}"
        elif code_of_exit != 0 and result.error is None:
            words = complained.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = " ".join(" ".join(words[-2:]).split())[-WORDS:]
            result.error = f"exit code {code_of_exit}, during {last}: {reason}"
    result.seconds = time.monotonic() - start
    return result


def _collect(name: str, text: str) -> tuple[PeerResult, str]:
    """The lines that a peer's process wrote, and what it was doing at the end."""
    result, last = PeerResult(name), "its start"
    for line in text.splitlines():
        try:
            data = json.loads(line)
        except ValueError:  # cut off in the middle
            continue
        for key, value in data.items():
            if key == "begin":
                last = value
            elif key in ("decode", "prefill", "left_out"):
                getattr(result, key).append(value)
            elif key in ("versions", "gpu", "bandwidth", "error"):
                setattr(result, key, value)
    return result, last


def peers_document(settings: PeerSettings, shape_name: str, results: Sequence[PeerResult]) -> dict[str, Any]:
    """The JSON document of `bench peers`, but for what `about_run` says."""
    found = [r.bandwidth for r in results if r.bandwidth is not None]
    best = None
    if found:
        best = {key: max(b[key] for b in found) for key in ("read", "copy")}
    gpus = [r.gpu for r in results if r.gpu is not None]
    return {
        "kind": KIND,
        "model": {"name": shape_name, "parameters": _parameters(settings.shape)},
        "plan": settings.to_json(),
        "device": settings.device.split(":", maxsplit=1)[0],
        "gpu": gpus[0] if gpus else None,
        "bandwidth": best,
        "floor_bytes": step_floor_bytes(settings.shape, settings.dtype),
        "peers": [asdict(result) for result in results],
    }


def _parameters(shape: Shape) -> dict[str, int]:
    """Elements of both models of a shape."""
    parts = part_sizes(neox_spec(shape))
    total = sum(part.count + part.wide for part in parts.values())
    own = ("attention gate", "feature map and group norm", "decay")
    return {"dijiang": total, "hf": total - sum(parts[name].count + parts[name].wide for name in own)}
