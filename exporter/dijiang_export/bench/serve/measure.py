"""Measure a server: so many clients at a time, each with one stream after the other."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dijiang_engines.errors import DijiangError, UsageError
from dijiang_engines.progress import Progress, ProgressFactory, silent
from dijiang_export.bench.serve.http import Failure, read_url
from dijiang_export.bench.serve.stream import Stream, Target, get_json, stream_once

if TYPE_CHECKING:
    import numpy as np

CONCURRENCIES = (1, 4, 16, 32)
_BUSY = 0.5
"""Of a core: a client that computes more than this may be what is measured."""
_WARM_TOKENS = 4
_REASONS = 20
"""Kinds of failures that are listed, the most frequent first."""


_OPTIONAL: dict[str, tuple[Any, str]] = {
    "ignore_eos": (True, "the server does not know ignore_eos: streams end where the model ends them"),
    "stream_options": (
        {"include_usage": True}, "the server does not count tokens: its chunks are counted",
    ),
}  # fmt: skip
"""Fields that not every server takes, and what it means without them."""
_SUBSETS = (("ignore_eos", "stream_options"), ("stream_options",), ("ignore_eos",), ())


class ServerError(DijiangError):
    """A server that cannot be measured: it is not there, does not answer as it should, or refuses."""


@dataclass(frozen=True)
class Load:
    """What the server is asked for.

    Raises:
        UsageError: a number below 1.
    """

    concurrencies: tuple[int, ...] = CONCURRENCIES
    rounds: int = 2
    """Streams of each client, one after the other."""
    tokens: int = 64
    """Of each stream."""
    prompt_tokens: int = 128
    temperature: float = 0.0
    seconds: float = 300.0
    """Most for one request."""
    seed: int = 0
    """Of the prompts."""

    def __post_init__(self) -> None:
        for name in ("rounds", "tokens", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1", got=getattr(self, name))
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise UsageError("a concurrency must be at least 1", got=self.concurrencies)


class _Prompts:
    """Prompts that no prefix cache knows: each is drawn anew.

    Args:
        load: their length and seed.
        ids: token ids to draw from; none: prompts are words.
    """

    def __init__(self, load: Load, ids: Sequence[int]) -> None:
        self._random, self._length, self.ids = _random(load), load.prompt_tokens, ids

    def next(self) -> str | list[int]:
        if self.ids:
            return [int(each) for each in self._random.choice(self.ids, self._length)]
        return " ".join(random_words(self._random, self._length))


def random_words(source: np.random.Generator, count: int) -> list[str]:
    """Words of 2 to 8 letters that mean nothing."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return ["".join(source.choice(letters, size)) for size in source.integers(2, 9, count)]


def _random(load: Load) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(load.seed)


def measure_server(
    url: str,
    load: Load,
    *,
    model: str | None = None,
    key: str | None = None,
    progress: ProgressFactory = silent,
) -> dict[str, Any]:
    """Measure a server with an OpenAI-compatible API.

    Args:
        url: of its API, with or without /v1.
        load: what to ask for.
        model: default: the first that it lists.
        key: API key.
        progress: told of every stream that ended.

    Returns:
        {"server", "load", "levels", "notes"}: JSON-like; times in seconds.

    Raises:
        UsageError: the URL or the key cannot be one.
        ServerError: not even the warm-up succeeded.
    """
    address = read_url(url)
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key and key):
        raise UsageError("an API key is of printable ASCII characters without blanks")
    target = Target(address, model or "", key, load.seconds)
    return asyncio.run(_measure(url, target, load, progress))


async def _measure(url: str, target: Target, load: Load, progress: ProgressFactory) -> dict[str, Any]:
    try:
        if not target.model:
            target = Target(target.address, await _first_model(target), target.key, target.seconds)
        prompts = _Prompts(load, await _token_ids(target, load))
        body, notes = await _warm_up(target, load, prompts)
    except Failure as failure:
        raise _server_error(url, failure) from None
    levels: list[dict[str, Any]] = []
    total = sum(load.concurrencies) * load.rounds
    with progress(f"measuring {target.model}", total, "items") as bar:
        for clients in load.concurrencies:
            levels.append(await _level(target, load, body, prompts, clients, bar))
            if not levels[-1]["streams"]:
                notes.append("no stream came to its end any more: nothing further was measured")
                break
    server = {"url": url, "model": target.model, "prompts": "token ids" if prompts.ids else "words"}
    asked = {
        name: getattr(load, name) for name in ("rounds", "tokens", "prompt_tokens", "temperature", "seed")
    }
    return {"server": server, "load": asked, "levels": levels, "notes": [*notes, *_remarks(levels, load)]}


# -- before --------------------------------------------------------------------------------------------


async def _first_model(target: Target) -> str:
    found = await get_json(target, "GET", "/v1/models")
    try:
        name = found["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise Failure("the server lists no model")
    return name


async def _token_ids(target: Target, load: Load) -> list[int]:
    """Ids that the server makes of random words; none if it does not tell. vLLM does, and this project's."""
    words = " ".join(random_words(_random(load), 500))
    try:
        found = await get_json(target, "POST", "/tokenize", {"model": target.model, "prompt": words})
    except Failure as failure:
        if failure.status is None:
            raise
        return []
    ids = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        return []
    return list(ids[1:])  # the first may be the token that begins a text


async def _warm_up(target: Target, load: Load, prompts: _Prompts) -> tuple[dict[str, Any], list[str]]:
    """Find the most that the server takes, with one stream each try; the notes say what it does not.

    Raises:
        Failure: it takes not even what the API always had, or fails otherwise.
    """
    body: dict[str, Any] = {"max_tokens": load.tokens, "temperature": load.temperature, "stream": True}
    for ids in (prompts.ids, []) if prompts.ids else ([],):
        prompts.ids = ids
        for names in _SUBSETS:
            asked = body | {name: _OPTIONAL[name][0] for name in names}
            tried = await stream_once(target, asked | {"prompt": prompts.next()}, _most(load))
            if tried.failure is None:
                notes = [note for name, (_, note) in _OPTIONAL.items() if name not in names]
                if "stream_options" in names and tried.count("completion_tokens") is None:
                    notes.append(_OPTIONAL["stream_options"][1])
                return asked, notes
            if tried.status not in (400, 422):
                raise Failure(tried.failure, tried.status)
    raise Failure(tried.failure or "", tried.status)


def _server_error(url: str, failure: Failure) -> ServerError:
    hints = {
        401: "give the server's key with DIJIANG_API_KEY or --api-key",
        403: "give the server's key with DIJIANG_API_KEY or --api-key",
        404: "give the address of its API, such as http://127.0.0.1:8000/v1, and a --model that it has",
    }
    return ServerError(
        f"{url} cannot be measured", got=str(failure), expected="a server with an OpenAI-compatible API",
        hint=hints.get(failure.status or 0),
    )  # fmt: skip


# -- one concurrency -----------------------------------------------------------------------------------


def _most(load: Load) -> int:
    return 2 * load.tokens + 16


async def _level(
    target: Target, load: Load, body: dict[str, Any], prompts: _Prompts, clients: int, bar: Progress
) -> dict[str, Any]:
    streams: list[Stream] = []
    bodies = [[body | {"prompt": prompts.next()} for _ in range(load.rounds)] for _ in range(clients)]

    async def client(number: int) -> None:
        for each in bodies[number]:
            streams.append(await stream_once(target, each, _most(load)))
            bar.advance()

    # So many at a time for the first time: buffers grow, and clocks rise. What fails here fails below too.
    short = body | {"max_tokens": min(load.tokens, _WARM_TOKENS)}
    await asyncio.gather(
        *(stream_once(target, short | {"prompt": prompts.next()[:_WARM_TOKENS]}, _most(load)) for _ in bodies)
    )
    computed = time.process_time()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return _figures(clients, streams, time.process_time() - computed)


def _figures(clients: int, streams: Sequence[Stream], computed: float) -> dict[str, Any]:
    good = [stream for stream in streams if stream.failure is None]
    seconds = max(s.ended for s in streams) - min(s.begun for s in streams)
    tokens = sum(stream.tokens for stream in good)
    reasons = Counter(stream.failure for stream in streams if stream.failure is not None)
    told = [n for stream in good if (n := stream.count("prompt_tokens")) is not None]
    return {
        "concurrency": clients,
        "streams": len(good),
        "seconds": seconds,
        "tokens": tokens,
        "chunks": sum(stream.chunks for stream in good),
        "prompt_tokens": sum(told) if len(told) == len(good) else None,
        "tokens_per_second": tokens / seconds if good else None,
        "first_token": percentiles([s.first for s in good if s.first is not None], (50, 95)),
        "between_tokens": percentiles([gap for s in good for gap in s.gaps], (50, 95, 99)),
        "failures": len(streams) - len(good),
        "reasons": dict(reasons.most_common(_REASONS)),
        "client_cores": computed / seconds,
    }


def percentiles(values: Sequence[float], of: Sequence[int]) -> dict[str, float] | None:
    """{"p50": …}, linear between values; None of nothing."""
    import numpy as np

    if not values:
        return None
    return {f"p{p}": float(value) for p, value in zip(of, np.percentile(values, of), strict=True)}


def _remarks(levels: Sequence[dict[str, Any]], load: Load) -> list[str]:
    """What a reader of the figures should know."""
    remarks = []
    if any(level["client_cores"] > _BUSY for level in levels):
        most = max(level["client_cores"] for level in levels)
        remarks.append(f"the client itself computed on up to {most:.1f} cores: it may be what was measured")
    if any(level["tokens"] < level["streams"] * load.tokens for level in levels):
        remarks.append(f"some streams ended before {load.tokens} tokens")
    if any(level["chunks"] < 0.9 * level["tokens"] for level in levels):
        remarks.append("there were fewer chunks than tokens: between tokens means between chunks")
    return remarks
