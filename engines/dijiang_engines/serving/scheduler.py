"""Continuous batching: jobs join and leave a running batch, and prompts are read between its steps.

A round reads one piece of one prompt, by itself and never padded into the batch, and then makes one step of
all texts. So a long prompt delays the others' tokens by one piece, and prompts that wait take turns. Nothing
here knows of threads or networks: `worker` calls it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import DijiangError, RunnerError
from dijiang_engines.generation.row import Row, begin_row
from dijiang_engines.generation.session import Session
from dijiang_engines.runners.base import FloatArray, Runner, State
from dijiang_engines.sampling import Uniforms
from dijiang_engines.serving.batch import Batch
from dijiang_engines.serving.choosing import Chooser, choose, token_out
from dijiang_engines.serving.job import Job, Update
from dijiang_engines.serving.pieces import piece_ends, state_keys
from dijiang_engines.serving.prefix_cache import PrefixCache
from dijiang_engines.serving.shared_prefixes import Lookup, SharedPrefixes
from dijiang_engines.tokenizer.tokenizer import Tokenizer


@dataclass
class Text:
    """One text of a job."""

    job: Job
    row: Row
    chooser: Chooser

    @property
    def ids(self) -> list[int]:
        """All its tokens."""
        return self.row.ids

    @property
    def consumed(self) -> int:
        """How many of them are in its state."""
        return self.row.consumed

    @consumed.setter
    def consumed(self, value: int) -> None:
        self.row.consumed = value


@dataclass
class Reading:
    """A job whose prompt is being read, in a state of its own."""

    job: Job
    state: State | None
    """None before it has begun."""
    ends: list[int]
    """Where the pieces that are left end."""
    keys: list[bytes]
    """Of the states after them; empty for a prompt that goes on from a session."""
    consumed: int
    lookup: Lookup | None = None
    """Whether another server has read its beginning: an answer that is on its way, or has come."""

    @property
    def waits(self) -> bool:
        """For what is known elsewhere of its beginning."""
        return self.lookup is not None and not self.lookup.settled


@dataclass
class Counts:
    """What has happened since the start, for metrics."""

    prompt_tokens: int = 0
    """That were read."""
    cached_tokens: int = 0
    """That need not be read."""
    shared_tokens: int = 0
    """Of these, those whose state another server had read."""
    generated_tokens: int = 0
    rounds: int = 0
    steps: int = 0
    stepped_rows: int = 0
    """Texts of all steps together."""


@dataclass(frozen=True)
class Limits:
    """How much the scheduler takes on at once."""

    slots: int = 32
    """Texts in the batch, with those whose prompts are being read."""
    piece: int = 64
    """Most tokens of a prompt between two steps of the others."""
    queue: int = 256
    """Jobs that wait while all slots are taken; `worker` counts them."""
    prefix_bytes: int = 256 << 20
    """Of kept states after the beginnings of prompts."""


_LOOKUP_SECONDS = 0.005
"""That a round waits for what others have read, when there is nothing else to do."""


class Scheduler:
    """All jobs of one runner.

    Args:
        runner: any runner; used by one thread at a time.
        tokenizer: the model's; without one, texts are token ids alone.
        limits: see there. A runner that takes fewer sequences at once bounds the slots.
        shared: where states are looked for that are not in memory; None: nowhere.

    Attributes:
        cache: states after the beginnings of prompts.
        shared: the argument.
        counts: what has happened.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        limits: Limits,
        shared: SharedPrefixes | None = None,
    ) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.limits, self.shared = limits, shared
        self.cache = PrefixCache(limits.prefix_bytes)
        self.counts = Counts()
        self.waiting: deque[Job] = deque()
        self.reading: deque[Reading] = deque()
        self._batch: Batch[Text] = Batch(runner, limits.slots)
        self._banned: npt.NDArray[np.bool_] | None = None
        if tokenizer is not None:  # ids that pad the vocabulary are no tokens
            banned = ~tokenizer.token_mask(runner.spec.vocab_size)
            self._banned = banned if banned.any() else None

    # -- from outside ------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not (self.waiting or self.reading or self._batch.texts)

    @property
    def running(self) -> int:
        """Texts in the batch and prompts that are being read."""
        return len(self._batch.texts) + len(self.reading)

    def submit(self, job: Job) -> None:
        """Queue a job. Whoever makes it has checked it against the model."""
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Forget a job, wherever it is; its slots are free."""
        job.done = True
        self.waiting = deque(other for other in self.waiting if other is not job)
        self.reading = deque(other for other in self.reading if other.job is not job)
        self._batch.leave(lambda text: text.job is job)

    def jobs(self) -> list[Job]:
        """All that have not ended."""
        running = dict.fromkeys(text.job for text in self._batch.texts)
        return [*self.waiting, *(reading.job for reading in self.reading), *running]

    def round(self) -> list[Update]:
        """A piece of a prompt and a step of all texts, as far as there are any."""
        self.counts.rounds += 1
        self._admit()
        return self._read_piece() + self._step()

    # -- prompts -----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin to read the prompts that wait, in their order, while there are slots for their texts."""
        while self.waiting:
            taken = sum(reading.job.options.choices for reading in self.reading)
            if self.waiting[0].options.choices > self._batch.free - taken:
                return
            self.reading.append(self._begin(self.waiting.popleft()))

    def _begin(self, job: Job) -> Reading:
        if job.session is not None:
            consumed = int(job.session.positions[0])
            state = self.runner.import_state(job.session.layers)
            return Reading(
                job, state, piece_ends(len(job.prompt), self.limits.piece, (), consumed), [], consumed
            )
        ends = piece_ends(len(job.prompt), self.limits.piece, job.splits)
        wanted = self.cache.max_bytes > 0 or self.shared is not None
        keys = list(state_keys(job.salt, job.prompt, ends[:-1])) if wanted else []
        reading = Reading(job, None, ends, keys, 0)
        unknown = keys[self.cache.longest(keys) + 1 :]
        if self.shared is not None and unknown:
            reading.lookup = self.shared.look(unknown)
        return reading

    def _open(self, reading: Reading) -> None:
        """Begin from the longest beginning whose state is in memory, or was found elsewhere."""
        keys, ends = reading.keys, reading.ends
        last = self.cache.longest(keys)
        layers = self.cache.get(keys[last]) if last >= 0 else None
        if reading.lookup is not None and reading.lookup.found is not None:
            key, found = reading.lookup.found
            self.cache.put(key, found)
            if keys.index(key) > last:
                last, layers = keys.index(key), found
                self.counts.shared_tokens += ends[last]
        reading.lookup = None
        if layers is None:
            self.cache.misses += 1
            reading.state = self.runner.new_state(1)
            return
        self.cache.hits += 1
        reading.consumed = reading.job.cached_tokens = ends[last]
        self.counts.cached_tokens += ends[last]
        reading.state = self.runner.import_state(layers)
        reading.ends, reading.keys = ends[last + 1 :], keys[last + 1 :]

    def _next_reading(self) -> Reading | None:
        """Whose turn it is, taken out of the queue; None: nobody's yet."""
        place = self._ready()
        if place is None and self.reading and not self._batch.texts:  # all wait, and nobody's token is due
            lookup = self.reading[0].lookup
            assert lookup is not None
            lookup.wait(_LOOKUP_SECONDS)
            place = self._ready()
        if place is None:
            return None
        reading = self.reading[place]
        del self.reading[place]
        if reading.state is None:
            self._open(reading)
        return reading

    def _ready(self) -> int | None:
        return next((i for i, reading in enumerate(self.reading) if not reading.waits), None)

    def _read_piece(self) -> list[Update]:
        reading = self._next_reading()
        if reading is None:
            return []
        end = reading.ends.pop(0)
        ids = np.array([reading.job.prompt[reading.consumed : end]], np.int64)
        length = ids.shape[1]
        call = self.runner.step if length == 1 else self.runner.prefill
        logits = call(ids, np.array([reading.consumed]), np.array([length]), reading.state)
        self.counts.prompt_tokens += length
        reading.consumed = end
        if reading.keys:
            self._keep(reading.keys.pop(0), reading.state)
        if reading.ends:
            self.reading.append(reading)
            return []
        last = length - 1 if logits.shape[1] > 1 else 0
        return self._start_texts(reading, logits[0, last])

    def _keep(self, key: bytes, state: State) -> None:
        """The state after a piece, for prompts that begin alike; another may have read the same meanwhile."""
        if key in self.cache:
            return
        layers = self.runner.get_rows(state, [0])
        self.cache.put(key, layers)
        if self.shared is not None:
            self.shared.put(key, layers)

    def _start_texts(self, reading: Reading, logits: FloatArray) -> list[Update]:
        """The prompt is read: every text of the job begins with its first token."""
        job = reading.job
        texts = [self._text(job, choice, reading.consumed) for choice in range(job.options.choices)]
        updates = self._choose([(text, logits) for text in texts], reading.state)
        for text in texts:
            if text.row.finish is None and not job.done:
                self._batch.join(text, reading.state)
        return updates

    def _text(self, job: Job, choice: int, consumed: int) -> Text:
        options, session = job.options, job.session
        old = [] if session is None else session.token_ids[0]
        held = 0 if session is None or session.held is None else int(session.held[0])
        row = begin_row(
            self.tokenizer, old, job.prompt[len(old) :], consumed=consumed, held=held,
            limit=options.max_tokens, stream_id=choice, stop=options.stop,
        )  # fmt: skip
        seen = None
        if options.sampling.repetition_penalty != 1:
            seen = np.zeros(self.runner.spec.vocab_size, np.bool_)
            seen[row.ids] = True
        guide = None if options.guide is None else options.guide()
        uniforms = Uniforms(options.seed, choice)
        return Text(job, row, Chooser(options.sampling, uniforms, seen, guide, options.logprobs))

    # -- texts -------------------------------------------------------------------------------------------

    def _step(self) -> list[Update]:
        texts = len(self._batch.texts)
        if not texts:
            return []
        self.counts.steps += 1
        self.counts.stepped_rows += texts
        updates = self._choose(self._batch.step(), None)
        self._batch.leave(lambda text: text.row.finish is not None or text.job.done)
        return updates

    def _choose(self, found: Sequence[tuple[Text, FloatArray]], state: State | None) -> list[Update]:
        """Give every text its next token.

        Args:
            found: texts with their logits.
            state: the one row that all of them are in; None: each is in its row of the batch.
        """
        choosers = [(text.chooser, len(text.ids)) for text, _ in found]
        tokens = choose(choosers, [logits for _, logits in found], self._banned)
        updates = []
        for (text, logits), token in zip(found, tokens, strict=True):
            if text.job.done:
                continue
            if isinstance(token, RunnerError):
                updates.append(self._fail(text.job, token))
                continue
            updates.append(self._accept(text, token, logits, state))
        return updates

    def _accept(self, text: Text, token: int, logits: FloatArray, state: State | None) -> Update:
        job, row, guide = text.job, text.row, text.chooser.guide
        self.counts.generated_tokens += 1
        options = job.options
        ends = () if options.ignore_eos else self.runner.spec.eos_token_ids
        complete = guide is not None and guide.accept(token)
        piece = row.accept(token, ends, complete=complete)
        if row.new_tokens == 1:
            piece = row.opening + piece
        session = None
        if row.finish is not None and options.save and row.stream_id == 0:
            layers = self._batch.row_state(text) if state is None else self.runner.get_rows(state, [0])
            session = Session(layers, np.array([row.consumed]), [row.ids], np.array([row.held]))
        out = token_out(token, logits, options.logprobs)
        return Update(job, row.stream_id, out, piece, row.finish, session)

    def _fail(self, job: Job, error: DijiangError) -> Update:
        self.cancel(job)
        return Update(job, error=error)
