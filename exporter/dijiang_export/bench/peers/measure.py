"""Measure peers, each in a process of its own with a limit on its time; the JSON document of it all.

Weights are a checkpoint's, or random: they change no time. A peer's process
(`dijiang_export.bench.peers.run`) reports every figure as soon as it has it: what fails or takes too long is
reported with its reason and costs nothing else. Needs no PyTorch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dijiang_engines.bench.timing import Timing
from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.inspection import kv_cache_bytes, step_bytes
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.sizes import ITEM_BYTES, part_sizes
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.peers.settings import GENAI, WORDS, PeerSettings

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
    """{"batch", "context", "timing", "seconds", "error", "compile_seconds", "peak_bytes", "notes",
    "read_seconds", "context_bytes", "process_bytes"}: a timing is of one token of every row, its `calls` are
    blocks of several, whose seconds are all in `seconds`; `error` is of the logits against the same model run
    over the whole text, in their standard deviations; `peak_bytes` is a GPU's memory; `read_seconds` is what
    one prefill of the context took; `context_bytes` is the cache or state; `process_bytes` the peak of
    resident memory while "preparing" (prefill and check) and while "timing", and "proportional" after that:
    a file that is mapped twice counts once there."""
    prefill: list[dict[str, Any]] = field(default_factory=list)
    """The same with "form" and "length" in place of "context"."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """{"what", "why"}."""


def step_floor_bytes(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """What a step must move, in bytes.

    Args:
        spec: the DiJiang model; the softmax model has its sizes.
        dtype: of weights and cache.

    Returns:
        By kind of model ("dijiang", "hf"): `weights` that a step reads; `per_row`, state read and written for
        each row; `per_token`, keys and values read for each row and token before it.
    """
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
    peers: Sequence[str] | None = None,
    *,
    limit: float = LIMIT,
    rounds: int = 1,
    progress: ProgressFactory = silent,
    report: Callable[[Sequence[PeerResult]], None] = lambda results: None,
) -> list[PeerResult]:
    """Measure peers, one after the other, in turns.

    Args:
        settings: what is asked of each.
        peers: names out of `settings.known()`; default: all of them.
        limit: seconds for each of them and each turn, imports and compilation included.
        rounds: turns of everybody, so that what else a machine does hits all alike; calls are pooled.
        progress: one unit for each peer's turn.
        report: called with the results so far after each turn, so that nothing is lost when it is stopped.

    Raises:
        UsageError: there is no such peer, the sizes do not fit each other, or the model has no such context.
        CheckpointError: the checkpoint is not of a family that `convert` takes.
        RunnerError: not one figure came of it.
    """
    known = settings.known()
    peers = known if peers is None else peers
    for name in peers:
        if name not in known:
            what = "there is no peer" if settings.checkpoint is None else "a checkpoint has no peer"
            raise UsageError(f"{what} {name!r}", expected=", ".join(known))
    settings.check()
    results: dict[str, PeerResult] = {}
    with (
        progress("Measuring peers", len(peers) * rounds, "items") as bar,
        _built(settings, peers, limit) as made,
    ):
        built, refused = made
        for _ in range(rounds):
            for name in peers:
                if name == GENAI and refused is not None:
                    results[name] = PeerResult(name, refused)
                else:
                    turn = run_peer(built, name, limit)
                    results[name] = pooled(results[name], turn) if name in results else turn
                report(list(results.values()))
                bar.advance()
    if not any(r.decode or r.prefill for r in results.values()):
        raise RunnerError(
            "no peer could be measured",
            got="; ".join(_why(result) for result in results.values()),
            hint="peers need PyTorch and transformers: pip install 'dijiang-export[export]'; see --device",
        )
    return list(results.values())


def pooled(before: PeerResult, turn: PeerResult) -> PeerResult:
    """What a peer did in several turns: the calls of a figure together, the worst error, the most memory."""
    result = replace(before, error=before.error or turn.error, seconds=before.seconds + turn.seconds)
    result.decode = _pooled_rows(before.decode, turn.decode, ("batch", "context"))
    result.prefill = _pooled_rows(before.prefill, turn.prefill, ("batch", "length", "form"))
    result.left_out = before.left_out + [left for left in turn.left_out if left not in before.left_out]
    return result


def _pooled_rows(
    before: list[dict[str, Any]], turn: list[dict[str, Any]], keys: tuple[str, ...]
) -> list[dict[str, Any]]:
    rows = {tuple(row[key] for key in keys): row for row in before}
    for row in turn:
        place = tuple(row[key] for key in keys)
        rows[place] = _pooled_row(rows[place], row) if place in rows else row
    return list(rows.values())


def _pooled_row(before: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    seconds = before["seconds"] + row["seconds"]
    most = ("error", "peak_bytes", "context_bytes")
    return before | {
        "seconds": seconds,
        "timing": asdict(Timing.of(seconds)),
        "rounds": [*before.get("rounds", [before["timing"]["median"]]), row["timing"]["median"]],
        "read_seconds": _of(min, before["read_seconds"], row["read_seconds"]),
        "process_bytes": {
            k: _of(max, v, row["process_bytes"][k]) for k, v in before["process_bytes"].items()
        },
        "notes": list(dict.fromkeys(before["notes"] + row["notes"])),
        **{key: _of(max, before[key], row[key]) for key in most},
    }


def _of(choose: Callable[..., Any], *values: Any) -> Any:
    return choose((value for value in values if value is not None), default=None)


@contextmanager
def _built(
    settings: PeerSettings, peers: Sequence[str], limit: float
) -> Iterator[tuple[PeerSettings, str | None]]:
    """Settings with the model that ONNX Runtime GenAI's builder made, if that is asked for; or why not."""
    if GENAI not in peers:
        yield settings, None
    elif settings.dtype != "float32" or settings.device != "cpu":
        yield settings, "it is built in float32 for CPUs alone"
    else:
        with tempfile.TemporaryDirectory(prefix="dijiang-genai-") as folder:
            target = str(Path(folder) / "model")
            command = command_for("dijiang_export.bench.peers.genai", str(settings.checkpoint), target)
            code, _, complained = _run(command, settings.threads, limit)
            if code == 0:
                yield replace(settings, genai=target), None
            else:
                why = "took too long" if code is None else _last_words(complained)
                yield settings, f"its model could not be built: {why}"


def _why(result: PeerResult) -> str:
    reasons = [result.error] if result.error else [left["why"] for left in result.left_out]
    return f"{result.name}: {next(iter(reasons), 'nothing to measure')}"


def run_peer(settings: PeerSettings, name: str, limit: float) -> PeerResult:
    """Measure one peer in a fresh interpreter; whatever happens there ends up in the result."""
    command = command_for("dijiang_export.bench.peers.run", name, json.dumps(settings.to_json()))
    start = time.monotonic()
    code, said, complained = _run(command, settings.threads, limit)
    result, last = _collect(name, said)
    if code is None:
        result.error = f"stopped after {limit:g} s, during {last}"
    elif code != 0 and result.error is None:
        result.error = f"exit code {code}, during {last}: {_last_words(complained)}"
    result.seconds = time.monotonic() - start
    return result


def _last_words(complained: str) -> str:
    return " ".join(" ".join(complained.strip().splitlines()[-2:]).split())[-WORDS:]


def _run(command: Sequence[str], threads: int, limit: float) -> tuple[int | None, str, str]:
    """A process's exit code (None: it took longer than `limit` seconds), and what it wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="dijiang-peer-") as folder:
        paths = Path(folder) / "out", Path(folder) / "err"
        with paths[0].open("wb") as out, paths[1].open("wb") as err:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = child.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # A session of its own: the compiler's workers go with it.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        said, complained = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return code, said, complained


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
        "model": {"name": shape_name, "parameters": _parameters(settings.spec())},
        "plan": settings.to_json(),
        "device": settings.device.split(":", maxsplit=1)[0],
        "gpu": gpus[0] if gpus else None,
        "bandwidth": best,
        "floor_bytes": step_floor_bytes(settings.spec(), settings.dtype),
        "peers": [asdict(result) for result in results],
    }


def _parameters(spec: ModelSpec) -> dict[str, int]:
    """Elements of both models of these sizes."""
    parts = part_sizes(spec)
    total = sum(part.count + part.wide for part in parts.values())
    own = ("attention gate", "feature map and group norm", "decay")
    return {"dijiang": total, "hf": total - sum(parts[name].count + parts[name].wide for name in own)}
