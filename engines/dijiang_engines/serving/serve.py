"""Put a server together: a model, a runner, a scheduler, limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.folder import Model
from dijiang_engines.runners.base import LimitsBatch, Runner, WarmsUp
from dijiang_engines.serving.chat_template import load_chat_template
from dijiang_engines.serving.piece_size import measured_piece
from dijiang_engines.serving.prefix_store import PrefixStore, namespace
from dijiang_engines.serving.scheduler import Limits, Scheduler
from dijiang_engines.serving.session_store import MemoryStore, SessionStore
from dijiang_engines.serving.shared_prefixes import SharedPrefixes
from dijiang_engines.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from dijiang_engines.serving.http.service import Service


@dataclass(frozen=True)
class ServerOptions:
    """What a server may be told.

    Raises:
        UsageError: a value out of range.
    """

    name: str | None = None
    """Of the model, for clients; None: the model's own."""
    slots: int = 32
    piece: int | None = None
    """Most tokens of a prompt between two tokens of the others; None: measured as the server starts."""
    queue: int = 256
    max_tokens: int = 4096
    max_prompt_tokens: int = 1 << 17
    max_body_bytes: int = 16 << 20
    body_seconds: float = 60.0
    prefix_bytes: int = 256 << 20
    session_bytes: int = 256 << 20
    shared_seconds: float = 0.1
    """That a prompt waits at most for what other servers have read of it."""
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("slots", "piece", "queue", "max_tokens", "max_prompt_tokens", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1", got=value)
        if not self.shared_seconds > 0:
            raise UsageError(
                "the time to wait for shared prefixes must be above zero", got=self.shared_seconds
            )
        if not all(self.keys):
            raise UsageError("an API key must not be empty")


def make_service(
    model: Model,
    runner: Runner,
    options: ServerOptions,
    sessions: SessionStore | None = None,
    prefixes: PrefixStore | None = None,
) -> Service:
    """Everything behind the endpoints; nothing runs yet.

    Args:
        model: the opened bundle or engine.
        runner: of it; the service's from here on.
        options: see there.
        sessions: where conversations are kept; by default in memory.
        prefixes: where states after beginnings of prompts are shared with other servers of the same model,
            runtime, kind of machine and `piece`; by default nowhere. Closed with the service.

    Raises:
        BundleError: the tokenizer or the chat template is damaged.
        RunnerError: the runner failed as it was measured.
    """
    from dijiang_engines.serving.http.service import Served, Service

    slots = min(options.slots, runner.max_batch) if isinstance(runner, LimitsBatch) else options.slots
    tokenizer = load_tokenizer(model)
    served = Served(
        model, options.name or model.name, tokenizer, load_chat_template(model),
        options.max_tokens, options.max_prompt_tokens, options.max_body_bytes, options.body_seconds,
        options.keys,
    )  # fmt: skip
    if isinstance(runner, WarmsUp):
        runner.warm_up()
    piece = options.piece or measured_piece(runner)
    secret = None if prefixes is None else namespace(model, runner)
    shared = (
        None if prefixes is None else SharedPrefixes(prefixes, runner.spec, seconds=options.shared_seconds)
    )
    limits = Limits(slots, piece, options.queue, options.prefix_bytes)
    scheduler = Scheduler(runner, tokenizer, limits, shared)
    return Service(served, scheduler, sessions or MemoryStore(options.session_bytes), secret)
