"""One peer of `bench peers` in this process: get ready, check, time, and write each figure as a line of JSON.

Timing: synchronised wall times. Decoding goes in blocks of `BLOCK` tokens, each token chosen on the device
(argmax) and fed to the next step without waiting; a figure is a block's time over its tokens, so neither
sampling nor text nor a look at the token by the host is in it. Prefills are single calls up to the logits
of the last token. TF32 is off. PyTorch is imported for peers that need it alone: memory is measured too.
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

from dijiang_engines.bench.timing import Effort, Timing, until_done
from dijiang_engines.errors import DijiangError
from dijiang_engines.machine import package_versions
from dijiang_export.bench.peers.figures import BLOCK, Host, LeftOut, Peer, Place, Prepared, wrong
from dijiang_export.bench.peers.settings import BUNDLE, GENAI, WITHOUT_TORCH, WORDS, PeerSettings
from dijiang_export.bench.process_memory import memory, reset_peak

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
        name: out of `settings.PEERS` or `settings.MODEL_PEERS`.
        settings: what is asked of it.
        say: called with what is known as soon as it is: versions, gpu, bandwidth, and one by one `begin`,
            `decode`, `prefill` and `left_out`.
    """
    place = open_place(name, settings)
    say(versions=package_versions(place.packages))
    if (gpu := place.gpu()) is not None:
        say(gpu=gpu)
    say(begin="measuring the memory", bandwidth=place.bandwidth(settings.threads))
    if name.endswith("-graph") and gpu is None:
        say(left_out={"what": "everything", "why": "CUDA graphs need a CUDA device"})
        return
    say(begin="making the model")
    peer = open_peer(name, settings, place)
    with place.without_gradients():
        for batch, context in settings.decodes():
            row: dict[str, Any] = {"batch": batch, "context": context}
            what = f"steps, batch {batch}, context {context}"
            prepare = partial(peer.decode, batch, settings.start(context))
            _figure(settings, place, say, what, "decode", row, prepare, BLOCK)
        for batch, length in settings.prefills():
            for form in peer.forms:
                row = {"form": form, "batch": batch, "length": length}
                what = f"prefill{f' ({form})' if form else ''}, batch {batch}, length {length}"
                prepare = partial(peer.prefill, form, batch, length)
                _figure(settings, place, say, what, "prefill", row, prepare, 1)


def open_place(name: str, settings: PeerSettings) -> Place:
    """What that peer runs on.

    Raises:
        LeftOut: there is no such device.
    """
    if name in WITHOUT_TORCH:
        return Host()
    from dijiang_export.bench.peers.tools import TorchPlace

    return TorchPlace(settings.device, settings.threads)


def open_peer(name: str, settings: PeerSettings, place: Place) -> Peer:
    """The peer of that name, with its model loaded.

    Raises:
        LeftOut: it does not run such a model.
    """
    if name == BUNDLE:
        from dijiang_export.bench.peers.bundle import BundlePeer

        return BundlePeer(settings)
    if name == GENAI:
        from dijiang_export.bench.peers.genai import GenaiPeer

        return GenaiPeer(settings)
    from dijiang_export.bench.peers.dijiang import Dijiang
    from dijiang_export.bench.peers.hf import HuggingFace
    from dijiang_export.bench.peers.tools import TorchPlace

    assert isinstance(place, TorchPlace)
    model, _, mode = name.partition("-")
    return (HuggingFace if model == "hf" else Dijiang)(settings, place.device, mode)


def _figure(
    settings: PeerSettings,
    place: Place,
    say: Callable[..., None],
    what: str,
    kind: str,
    row: dict[str, Any],
    prepare: Callable[[], Prepared],
    tokens: int,
) -> None:
    say(begin=what)
    place.reset_peak()
    reset_peak()
    try:
        start = time.perf_counter()
        prepared = prepare()
        place.synchronize()
        ready = time.perf_counter() - start
        if wrong(prepared.error, settings.dtype):
            raise LeftOut("it computes something else", got=f"logits {prepared.error:.1e} deviations off")
        preparing = memory("self").get("VmHWM")
        reset_peak()
        seconds = time_calls(prepared, place, settings.seconds, tokens)
        say(**{kind: row | {
            "timing": asdict(Timing.of(seconds)), "seconds": seconds, "error": prepared.error,
            "compile_seconds": ready, "peak_bytes": place.peak(), "notes": prepared.notes,
            "read_seconds": prepared.read_seconds, "context_bytes": prepared.context_bytes,
            "process_bytes": {
                "preparing": preparing, "timing": (now := memory("self")).get("VmHWM"),
                "proportional": now.get("Pss"),
            },
        }})  # fmt: skip
    except Exception as error:  # noqa: BLE001 - others' code; the other figures still count
        say(left_out={"what": what, "why": describe(error)})
    finally:
        prepared = None  # type: ignore[assignment]
        gc.collect()
        place.clear()


def time_calls(prepared: Prepared, place: Place, seconds: float, tokens: int) -> list[float]:
    """Synchronised wall seconds of one token, for each call of `prepared`: its seconds over `tokens`."""

    def once() -> float:
        prepared.reset()
        place.synchronize()
        start = time.perf_counter()
        prepared.run()
        place.synchronize()
        return (time.perf_counter() - start) / tokens

    for _ in range(WARM_UP_BLOCKS):
        once()
    return [once() for _ in until_done(Effort(seconds, LEAST, MOST))]


if __name__ == "__main__":
    main()
