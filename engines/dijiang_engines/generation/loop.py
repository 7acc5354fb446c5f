"""The decode loop: what was asked for, what comes out, and how rows of unequal length go through a runner.

`dijiang_engines.generation.generator` is the way in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.generation.guide import keep_allowed
from dijiang_engines.generation.row import FinishReason, Row
from dijiang_engines.generation.session import Session
from dijiang_engines.op_contract import chunk_size
from dijiang_engines.runners.base import FloatArray, Runner, WarmsUp
from dijiang_engines.runners.decoding import Decoder, DecodeRequest, Decodes
from dijiang_engines.sampling import SamplingOptions, Uniforms, sample

if TYPE_CHECKING:
    from dijiang_engines.generation.grammar import Grammar, GrammarGuide

_LOGITS_BYTES = 256 << 20
"""Most bytes of logits that one prefill call may return, for bundles with logits of every token."""


@dataclass(frozen=True)
class GenerateOptions:
    """When to stop and how to choose.

    Raises:
        UsageError: a value out of range.
    """

    max_tokens: int | None = None
    """New tokens per row; None is 128, or as many as a model with a last position has room for."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    stop: tuple[str, ...] = ()
    """A row ends when its text contains one of these; that and what follows is not given out."""
    ignore_eos: bool = False
    grammar: Grammar | None = None
    """What the new tokens of each row are kept to. A row ends when nothing can follow."""
    resumable: bool = False
    """The session will be saved: what is not certain at the end is kept for whoever goes on, rather than
    given out as it is."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UsageError("max-tokens must not be negative", got=self.max_tokens)
        if not all(self.stop):
            raise UsageError("a stop string must not be empty")
        if self.grammar is not None and self.ignore_eos:
            raise UsageError("a text that is kept to a grammar cannot go on after its end", got="ignore-eos")
        if self.grammar is not None and self.max_tokens == 0:
            raise UsageError("there is nothing to keep to a grammar", got="max-tokens 0")


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one row."""

    row: int
    token: int
    text: str
    """What became certain with it: whole characters, and nothing that may yet turn out a stop string."""
    finish_reason: FinishReason | None
    """Set on the row's last token."""


@dataclass(frozen=True)
class Completion:
    """What one prompt became."""

    row: int
    text: str
    token_ids: list[int]
    """The new tokens, including one that ended the row."""
    finish_reason: FinishReason
    prompt_tokens: int
    """New tokens that were read before the first was generated."""
    grammar_complete: bool | None = None
    """Whether the text satisfies its grammar; False where a stop string cut it. None without a grammar."""


@dataclass
class Stats:
    """Where the time went. Seconds; loading a runtime and the caller's own work are not in them."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    """All rows' tokens."""
    decoded_tokens: int = 0
    """Those after each row's first, which comes from the prefill."""
    decode_seconds: float = 0.0
    load_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; 0 before there was a prefill."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second of all rows together; 0 before there was a step."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def add(self, other: Stats) -> None:
        """Add another generation's."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Generation:
    """A running generation: iterate over it once, then ask for `completions` and `session`.

    Attributes:
        stats: counts and times so far.
    """

    def __init__(
        self,
        runner: Runner,
        rows: list[Row],
        options: GenerateOptions,
        session: Session | None,
        prefill_tokens: int,
        banned: npt.NDArray[np.int64] | None,
        guides: list[GrammarGuide] | None = None,
    ) -> None:
        """
        Args:
            runner: where to run.
            rows: what to start from; `Generator.start` makes them.
            options: when to stop and how to choose.
            session: what `rows` go on from.
            prefill_tokens: tokens of all rows together that one call may take.
            banned: token ids that are never chosen.
            guides: each row's, if there is a grammar.
        """
        self._runner = runner
        self._prefill_tokens = prefill_tokens
        self._banned = banned
        self._rows = rows
        self._uniforms = [Uniforms(options.seed, row.stream_id) for row in rows]
        self._options = options
        self._guides = guides
        self._failed: RunnerError | None = None
        self.stats = Stats(prompt_tokens=sum(row.prompt_tokens for row in rows))
        if session is None:
            self._state = self._runner.new_state(len(rows))
        else:
            self._state = self._runner.import_state(session.layers)
        self._seen: npt.NDArray[np.bool_] | None = None
        if options.sampling.repetition_penalty != 1:
            self._seen = np.zeros((len(rows), self._runner.spec.vocab_size), np.bool_)
            for seen, row in zip(self._seen, rows, strict=True):
                seen[row.ids] = True
        self._events = self._run()

    def __iter__(self) -> Iterator[TokenEvent]:
        return self._events

    @property
    def openings(self) -> list[str]:
        """Text of each row that the session had held back and that ends where a new prompt begins; it comes
        before all events. Mostly empty."""
        return [row.opening for row in self._rows]

    @property
    def completions(self) -> list[Completion]:
        """What each row has become so far, in order."""
        return [
            Completion(
                index,
                row.opening + "".join(row.parts),
                row.ids[row.start :],
                row.finish or "length",
                row.prompt_tokens,
                self._is_complete(index),
            )
            for index, row in enumerate(self._rows)
        ]

    def _is_complete(self, index: int) -> bool | None:
        if self._guides is None:
            return None
        row = self._rows[index]
        return self._guides[index].complete and not row.stop.found and row.finish != "error"

    def session(self) -> Session:
        """Where the rows stand, to be saved or resumed; any rest of the generation is run first."""
        for _ in self._events:
            pass
        return Session(
            self._runner.export_state(self._state),
            np.array([row.consumed for row in self._rows], np.int64),
            [list(row.ids) for row in self._rows],
            np.array([row.held for row in self._rows], np.int64),
        )

    # -- the loop --------------------------------------------------------------------------------------

    def _run(self) -> Iterator[TokenEvent]:
        if self._options.max_tokens == 0:
            # Reading only. The last token stays unread, so that what goes on from here gets its logits.
            self._prefill(keep=1)
            return
        logits = self._prefill(keep=0)
        decoder: Decoder | None = None
        while True:
            started = time.perf_counter()
            active = self._active()
            if decoder is None:
                tokens = self._choose(logits, active)
            else:
                tokens = self._next(decoder, active)
            events = [self._accept(index, token) for index, token in zip(active, tokens, strict=True)]
            if decoder is not None:
                for event in events:
                    if event.finish_reason == "stop":
                        decoder.stop_row(event.row)
            if self.stats.decoded_tokens:
                self.stats.decode_seconds += time.perf_counter() - started
            yield from events
            if all(row.finish for row in self._rows):
                if decoder is not None:
                    decoder.close()
                if self._failed is not None:
                    raise self._failed
                return
            if self.stats.generated_tokens == len(self._rows):
                decoder = self._start_decoder()
            if decoder is None:
                logits = self._step()

    def _start_decoder(self) -> Decoder | None:
        """The runner's own loop, if it has one. It knows no guides."""
        if not isinstance(self._runner, Decodes) or self._guides is not None:
            return None
        self._load(prefill=False)
        started = time.perf_counter()
        rows, options = self._rows, self._options
        request = DecodeRequest(
            tokens=np.array([row.ids[-1] for row in rows]),
            positions=np.array([row.consumed for row in rows]),
            remaining=np.array([0 if row.finish else row.limit - row.new_tokens for row in rows]),
            sampling=options.sampling,
            seed=options.seed,
            streams=np.array([row.stream_id for row in rows]),
            draws=np.array([len(row.ids) for row in rows]),
            stop_ids=() if options.ignore_eos else tuple(self._runner.spec.eos_token_ids),
            banned=self._banned,
            seen=self._seen,
            ahead=not options.stop,
        )
        decoder = self._runner.start_decoding(self._state, request)
        self.stats.load_seconds += time.perf_counter() - started
        return decoder

    def _next(self, decoder: Decoder, active: list[int]) -> list[int]:
        tokens = decoder.next()
        for index in active:
            self._rows[index].consumed += 1
        self.stats.decoded_tokens += len(active)
        return [int(tokens[index]) for index in active]

    def _prefill(self, keep: int) -> FloatArray:
        """Read every row's tokens but the last `keep`; returns the last logits, [B, V]."""
        rows, spec = self._rows, self._runner.spec
        result = np.zeros((len(rows), spec.vocab_size), np.float32)
        left = np.array([len(row.ids) - row.consumed - keep for row in rows])
        if left.max() > 1:
            self._load(prefill=True)
        elif left.max() == 1:
            self._load(prefill=False)
        started = time.perf_counter()
        while left.max() > 0:
            length = min(int(left.max()), self._piece())
            lens = np.minimum(left, length)
            ids = np.zeros((len(rows), length), np.int64)
            for index, row in enumerate(rows):
                ids[index, : lens[index]] = row.ids[row.consumed : row.consumed + int(lens[index])]
            positions = np.array([row.consumed for row in rows])
            call = self._runner.step if length == 1 else self._runner.prefill
            logits = call(ids, positions, lens, self._state)
            left -= lens
            for index, row in enumerate(rows):
                row.consumed += int(lens[index])
                if lens[index] and not left[index]:
                    last = lens[index] - 1 if self._runner.all_logits else 0
                    result[index] = logits[index, last]
        self.stats.prefill_seconds = time.perf_counter() - started
        return result

    def _piece(self) -> int:
        """Tokens per row and call."""
        batch, spec = len(self._rows), self._runner.spec
        piece = self._prefill_tokens // batch
        if self._runner.all_logits:
            piece = min(piece, _LOGITS_BYTES // (4 * spec.vocab_size * batch))
        chunk = chunk_size(spec.head_dim)  # shorter pieces waste the rest of one
        return max(1, piece // chunk * chunk if piece > chunk else piece)

    def _step(self) -> FloatArray:
        """Read the token that each unfinished row got last; returns logits [B, V]."""
        if not self.stats.decoded_tokens:
            self._load(prefill=False)
        rows = self._rows
        started = time.perf_counter()
        lens = np.array([int(row.finish is None) for row in rows])
        ids = np.array([[row.ids[-1]] for row in rows])
        positions = np.array([row.consumed for row in rows])
        logits = self._runner.step(ids, positions, lens, self._state)
        for row, length in zip(rows, lens.tolist(), strict=True):
            row.consumed += length
        self.stats.decoded_tokens += int(lens.sum())
        self.stats.decode_seconds += time.perf_counter() - started
        return logits[:, 0]

    def _load(self, prefill: bool) -> None:
        """Let the runner load what comes next, outside of what is timed as work."""
        if isinstance(self._runner, WarmsUp):
            started = time.perf_counter()
            self._runner.warm_up(prefill=prefill, step=not prefill)
            self.stats.load_seconds += time.perf_counter() - started

    def _active(self) -> list[int]:
        """Rows that go on; one whose guide fails ends here, and the others do not."""
        active = []
        for index, row in enumerate(self._rows):
            if row.finish is not None:
                continue
            try:
                if self._guides is not None:
                    self._guides[index].allowed()
                active.append(index)
            except RunnerError as error:
                row.finish = "error"
                self._failed = self._failed or RunnerError(f"{error.what} (row {index})", got=error.got)
        return active

    def _choose(self, logits: FloatArray, active: list[int]) -> list[int]:
        if not active:
            return []
        options = self._options
        uniforms = None
        if not options.sampling.greedy:
            # The index is the token's place in the text, so that a resumed text draws the same numbers.
            uniforms = np.array([self._uniforms[index].at(len(self._rows[index].ids)) for index in active])
        seen = None if self._seen is None else self._seen[active]
        chosen = logits[active]
        if self._guides is not None:
            allowed = [self._guides[index].allowed() for index in active]
            chosen = np.stack([keep_allowed(*pair) for pair in zip(chosen, allowed, strict=True)])
        tokens = sample(chosen, options.sampling, uniforms, seen=seen, banned=self._banned)
        if self._seen is not None:
            self._seen[active, tokens] = True
        return [int(token) for token in tokens]

    def _accept(self, index: int, token: int) -> TokenEvent:
        row, options = self._rows[index], self._options
        self.stats.generated_tokens += 1
        ends = () if options.ignore_eos else self._runner.spec.eos_token_ids
        complete = self._guides is not None and self._guides[index].accept(token)
        text = row.accept(token, ends, complete=complete, resumable=options.resumable)
        return TokenEvent(index, token, text, row.finish)
