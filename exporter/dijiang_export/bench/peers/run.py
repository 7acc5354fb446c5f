"""One peer of `bench peers` in this process: get ready, check, time, and write each figure as a line of JSON.

Timing: synchronised wall times. Decoding goes in blocks of `BLOCK` tokens, each token chosen on the device
(argmax) and fed to the next step without waiting; a figure is a block's time over its tokens, so neither
sampling nor text nor a look at the token by the host is in it. Prefills are single calls up to the logits
of the last token. TF32 is off.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from dijiang_engines.bench.timing import Effort, Timing, until_done
from dijiang_engines.errors import DijiangError
from dijiang_engines.machine import package_versions
from dijiang_export.bench.memory_rate import memory_rate
from dijiang_export.bench.peers.settings import WORDS, PeerSettings
from dijiang_export.bench.peers.tools import BLOCK, LeftOut, Peer, Prepared, synchronize, wrong

WARM_UP_BLOCKS = 2
LEAST, MOST = 5, 400


def main() -> None:
    """Measure the peer that the first argument names; the second is its `PeerSettings` in JSON."""
    # The original stdout carries lines of JSON and nothing else, whatever libraries print.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**what: Any) -> None:
        channel.write(json.dumps(what, allow_nan=False) + "\n")
        channel.flush()

    name, settings = sys.argv[1:]
    try:
        measure(name, PeerSettings.from_json(json.loads(settings)), say)
    except Exception as error:  # noqa: BLE001 - others' code: any failure is the result
        say(error=describe(error))
        sys.exit(1)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, DijiangError):
        return "; ".join(part for part in (error.what, error.got) if part)
    return " ".join(f"{type(error).__name__}: {error}".split())[:WORDS]


def measure(name: str, settings: PeerSettings, say: Callable[..., None]) -> None:
    """Measure one peer.

    Args:
        name: out of `settings.PEERS`.
        settings: what is asked of it.
        say: called with what is known as soon as it is: versions, gpu, bandwidth, and one by one `begin`,
            `decode`, `prefill` and `left_out`.
    """
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    say(versions=package_versions(("torch", "transformers", "triton", "numpy")))
    device = open_device(settings.device)
    if device.type == "cuda":
        say(gpu=describe_gpu(device))
    say(begin="measuring the memory", bandwidth=asdict(memory_rate(device, settings.threads)))
    model, _, mode = name.partition("-")
    if mode == "graph" and device.type != "cuda":
        say(left_out={"what": "everything", "why": "CUDA graphs need a CUDA device"})
        return
    say(begin="making the model")
    peer: Peer
    if model == "hf":
        from dijiang_export.bench.peers.hf import HuggingFace

        peer = HuggingFace(settings, device, mode)
    else:
        from dijiang_export.bench.peers.dijiang import Dijiang

        peer = Dijiang(settings, device, mode)
    with torch.no_grad():
        for batch, context in settings.decodes():
            row: dict[str, Any] = {"batch": batch, "context": context}
            what = f"steps, batch {batch}, context {context}"
            _figure(settings, device, say, what, "decode", row, partial(peer.decode, batch, context), BLOCK)
        for batch, length in settings.prefills():
            for form in peer.forms:
                row = {"form": form, "batch": batch, "length": length}
                what = f"prefill{f' ({form})' if form else ''}, batch {batch}, length {length}"
                prepare = partial(peer.prefill, form, batch, length)
                _figure(settings, device, say, what, "prefill", row, prepare, 1)


def _figure(
    settings: PeerSettings,
    device: torch.device,
    say: Callable[..., None],
    what: str,
    kind: str,
    row: dict[str, Any],
    prepare: Callable[[], Prepared],
    tokens: int,
) -> None:
    say(begin=what)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        start = time.perf_counter()
        prepared = prepare()
        synchronize(device)
        ready = time.perf_counter() - start
        if wrong(prepared.error, settings.dtype):
            raise LeftOut("it computes something else", got=f"logits {prepared.error:.1e} deviations off")
        timing = time_calls(prepared, device, settings.seconds, tokens)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        say(**{kind: row | {
            "timing": asdict(timing), "error": prepared.error, "compile_seconds": ready,
            "peak_bytes": peak, "notes": prepared.notes,
        }})  # fmt: skip
    except Exception as error:  # noqa: BLE001 - others' code; the other figures still count
        say(left_out={"what": what, "why": describe(error)})
    finally:
        prepared = None  # type: ignore[assignment]
        torch._dynamo.reset()  # what was compiled for one size only takes memory from the next
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def time_calls(prepared: Prepared, device: torch.device, seconds: float, tokens: int) -> Timing:
    """Synchronised wall seconds of one token: of calls of `prepared`, over `tokens`."""

    def once() -> float:
        prepared.reset()
        synchronize(device)
        start = time.perf_counter()
        prepared.run()
        synchronize(device)
        return (time.perf_counter() - start) / tokens

    for _ in range(WARM_UP_BLOCKS):
        once()
    return Timing.of([once() for _ in until_done(Effort(seconds, LEAST, MOST))])


def open_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        LeftOut: PyTorch sees no such device.
    """
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise LeftOut("there is no CUDA device", got=f"PyTorch {torch.__version__}")
        device = torch.device("cuda", device.index or 0)  # some of PyTorch's calls need an index
        torch.cuda.set_device(device)
    return device


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name and sizes, for the record."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": int(found.L2_cache_size),
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    main()
