"""What a bundle or an engine is compared with: other ways to run a model of the same shape.

    hf-eager          transformers' GPT-NeoX with softmax attention and a KV cache that grows
    hf-compiled       the same with a static cache, through torch.compile(mode="reduce-overhead")
    hf-graph          the same, compiled, with each whole call captured in one CUDA graph
    dijiang-eager     this project's PyTorch reference: recurrent steps, parallel and chunked prefills
    dijiang-compiled  the same through torch.compile(mode="reduce-overhead")
    dijiang-graph     the same, compiled, with each whole call captured in one CUDA graph

Weights are random: they change no time. Each peer runs in a process of its own with a limit on its time
(`dijiang_export.bench.peers.run`), which reports every figure as soon as it has it: what fails or takes too
long is reported with its reason and costs nothing else. This module itself needs no PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.inspection import kv_cache_bytes, step_bytes
from dijiang_engines.progress import ProgressFactory, silent
from dijiang_engines.sizes import ITEM_BYTES, part_sizes
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.random_checkpoint import Shape

KIND = "bench-peers"
"""What these documents call themselves; `bench report` reads them."""
PEERS = ("hf-eager", "hf-compiled", "hf-graph", "dijiang-eager", "dijiang-compiled", "dijiang-graph")
CONTEXTS = (128, 512, 2048, 8192)
LENGTHS = (512, 2048, 8192)
BATCHES = (1,)
SECONDS = 2.0
LIMIT = 300.0
GROUP_NORM_EPSILON = 1e-5
"""torch.nn.GroupNorm's default, which the official code leaves (modeling_gpt_neox_dijiang.py@3459531:111)."""
ROUNDINGS = 4
WORDS = 400
"""Characters of an error that are kept."""


@dataclass(frozen=True)
class Plan:
    """What is asked of every peer."""

    shape: Shape
    dtype: str = "float16"
    device: str = "cuda"
    threads: int = 1
    """Of PyTorch's operators on a CPU."""
    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    """Tokens before the steps. All are measured with one row, the largest of them also with more."""
    lengths: tuple[int, ...] = LENGTHS
    """Of prefills. All with one row; with more where all rows together have no more tokens than that."""
    seconds: float = SECONDS
    backend: str = "inductor"
    """Of torch.compile."""

    def decodes(self) -> list[tuple[int, int]]:
        """(batch, context) of the steps."""
        largest = max(self.contexts, default=0)
        return [(b, n) for b in self.batches for n in self.contexts if b == 1 or n == largest]

    def prefills(self) -> list[tuple[int, int]]:
        """(batch, length) of the prefills."""
        most = max(self.lengths, default=0)
        return [(b, n) for b in self.batches for n in self.lengths if b == 1 or b * n <= most]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """What `to_json` wrote."""
        values = data | {key: tuple(data[key]) for key in ("batches", "contexts", "lengths")}
        return cls(**values | {"shape": Shape(**data["shape"])})


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


def neox_spec(shape: Shape) -> ModelSpec:
    """The DiJiang model of a shape, with geometric decay.

    Raises:
        UsageError: the sizes do not fit each other.
    """
    if shape.hidden % shape.heads:
        raise UsageError(
            "the hidden size is not a multiple of the heads", got=f"{shape.hidden} and {shape.heads}"
        )
    head_dim = shape.hidden // shape.heads
    return ModelSpec(
        family="gpt_neox", vocab_size=shape.vocab, hidden_size=shape.hidden, num_layers=shape.layers,
        intermediate_size=shape.intermediate, num_heads=shape.heads, num_kv_heads=shape.heads,
        head_dim=head_dim, rotary_dim=int(head_dim * shape.rotary_pct), rope_theta=10000.0, rope_scaling=None,
        norm="layer_norm", norm_epsilon=1e-5, activation="gelu", gated_mlp=False, parallel_residual=True,
        post_norm=False, final_norm=True, attention_bias=True, dense_bias=True, mlp_bias=True,
        position_embeddings=0, position_offset=0, embedding_size=shape.hidden, tied_embeddings=False,
        max_position_embeddings=shape.positions, decay="geometric", decay_rows=0, decay_extended=False,
        group_norm_epsilon=GROUP_NORM_EPSILON, bos_token_id=0, eos_token_ids=(0,),
    )  # fmt: skip


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
    plan: Plan,
    peers: Sequence[str] = PEERS,
    *,
    limit: float = LIMIT,
    progress: ProgressFactory = silent,
    report: Callable[[Sequence[PeerResult]], None] = lambda results: None,
) -> list[PeerResult]:
    """Measure peers, one after the other.

    Args:
        plan: what is asked of each.
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
    neox_spec(plan.shape)
    results = []
    with progress("Measuring peers", len(peers), "items") as bar:
        for name in peers:
            results.append(run_peer(plan, name, limit))
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


def run_peer(plan: Plan, name: str, limit: float) -> PeerResult:
    """Measure one peer in a fresh interpreter; whatever happens there ends up in the result."""
    arguments = json.dumps([name, plan.to_json()])
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from dijiang_export.bench.peers.run import main; main({arguments!r})"
    )
    threads = str(plan.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dijiang-peer-") as folder:
        said, complained = Path(folder) / "out", Path(folder) / "err"
        with said.open("wb") as out, complained.open("wb") as err:
            child = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env=environment, start_new_session=True,
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


def peers_document(plan: Plan, shape_name: str, results: Sequence[PeerResult]) -> dict[str, Any]:
    """The JSON document of `bench peers`, but for what `about_run` says."""
    found = [r.bandwidth for r in results if r.bandwidth is not None]
    best = None
    if found:
        best = {key: max(b[key] for b in found) for key in ("read", "copy")}
    gpus = [r.gpu for r in results if r.gpu is not None]
    return {
        "kind": KIND,
        "model": {"name": shape_name, "parameters": _parameters(plan.shape)},
        "plan": plan.to_json(),
        "device": plan.device.split(":", maxsplit=1)[0],
        "gpu": gpus[0] if gpus else None,
        "bandwidth": best,
        "floor_bytes": step_floor_bytes(plan.shape, plan.dtype),
        "peers": [asdict(result) for result in results],
    }


def _parameters(shape: Shape) -> dict[str, int]:
    """Elements of both models of a shape."""
    parts = part_sizes(neox_spec(shape))
    total = sum(part.count + part.wide for part in parts.values())
    own = ("attention gate", "feature map and group norm", "decay")
    return {"dijiang": total, "hf": total - sum(parts[name].count + parts[name].wide for name in own)}


def wrong(error: float, dtype: str) -> bool:
    """Whether logits that are `error` standard deviations off are another model's.

    The bound is that of a bundle times ROUNDINGS: here both sides are rounded, through dozens of random
    layers. A cache that is one token off, or stale, is off by several standard deviations.
    """
    from dijiang_engines.validation.tolerances import tolerance

    return not (math.isfinite(error) and error <= ROUNDINGS * tolerance(dtype, "logits").max_error)
