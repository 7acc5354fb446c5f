"""Perplexity of texts under a model, and how another model's predictions differ from its.

    model = dj.open_model("tiny-stdlib.bundle")
    found = dj.perplexity(dj.open_runner(model), ["def main():\\n    pass\\n"], dj.load_tokenizer(model))
    print(found.total.perplexity, found.total.bits_per_byte)

What is summed, and how texts are cut and joined: docs/perplexity.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dijiang_engines.errors import PositionError, RunnerError, UsageError
from dijiang_engines.progress import Progress, ProgressFactory, silent
from dijiang_engines.runners.base import Runner
from dijiang_engines.scoring.losses import differences, first_not_finite, losses
from dijiang_engines.scoring.readers import Logits, Reader, Reading, RunnerReader
from dijiang_engines.scoring.texts import Joining, Stream, Text, make_streams
from dijiang_engines.scoring.windows import Window, cut_into_windows, in_groups
from dijiang_engines.tokenizer.tokenizer import Tokenizer

WINDOW = 1024
"""The default: a context that any model of today was trained on and that shorter texts fill too."""


@dataclass(frozen=True)
class Cutting:
    """How streams are read."""

    window: int | None = None
    """Tokens that are read from an empty state; None: `WINDOW`, or the model's context if that is less."""
    stride: int | None = None
    """Tokens from one window's beginning to the next one's; None: no overlap."""
    carry: bool = False
    """Each stream is read to its end with its state carried on, instead of in windows."""
    batch: int | None = None
    """Most windows at a time; None: what fits the models."""


@dataclass(frozen=True)
class Score:
    """Of one text, or of all."""

    name: str
    tokens: int
    """Predicted tokens."""
    bytes: int
    """Of UTF-8, that these tokens stand for."""
    loss: float
    """Mean of -ln p(token), in nats."""
    other_loss: float | None = None
    """The other model's."""
    kl: float | None = None
    """Mean KL(other || this) of the predictions, in nats per token."""
    top1_agreement: float | None = None
    """Share of tokens for which both find the same token the likeliest."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """The loss of all tokens in bits, by the bytes; None without any."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    @property
    def other_perplexity(self) -> float | None:
        """exp(other_loss)."""
        return None if self.other_loss is None else _exp(self.other_loss)

    @property
    def ratio(self) -> float | None:
        """This perplexity by the other's."""
        return None if self.other_loss is None else _exp(self.loss - self.other_loss)


@dataclass(frozen=True)
class Perplexity:
    """What was found."""

    total: Score
    texts: tuple[Score, ...]
    """Those of which a token was predicted, in their order."""
    window: int | None
    """In force; None: each stream was read to its end."""
    stride: int | None
    seconds: float
    """Of reading and comparing, without loading."""


def perplexity(
    model: Runner | Reader,
    texts: Sequence[str | Text],
    tokenizer: Tokenizer,
    *,
    joining: Joining | None = None,
    cutting: Cutting | None = None,
    limit: int | None = None,
    against: Runner | Reader | None = None,
    bos: int | None = None,
    progress: ProgressFactory = silent,
) -> Perplexity:
    """Score texts.

    Args:
        model: a runner, or another reader.
        texts: at least one; a `Text` has a name for messages.
        tokenizer: the model's.
        joining: what stands around the texts.
        cutting: windows or carried state, and how much is read at once.
        limit: most predicted tokens.
        against: another model of the same vocabulary, which reads the same tokens.
        bos: the model's beginning-of-text token; None: a runner's own.
        progress: draws a bar of the tokens.

    Raises:
        UsageError, TextError, PositionError: before anything is read: options that exclude each other, texts
            that cannot be scored, windows or streams that are longer than a model's last position, models of
            different vocabularies.
        RunnerError: logits that are not finite; the message says of which text and token.
    """
    if not texts:
        raise UsageError("there is no text")
    if limit is not None and limit < 1:
        raise UsageError("the limit must be at least one token", got=limit)
    named = [t if isinstance(t, Text) else Text(f"text {i}", t) for i, t in enumerate(texts, 1)]
    if bos is None and isinstance(model, Runner):
        bos = model.spec.bos_token_id
    reader = reader_of(model)
    streams = make_streams(
        named, tokenizer, vocab_size=reader.vocab_size, bos=bos, joining=joining, limit=limit
    )
    other = None if against is None else reader_of(against)
    names = [text.name for text in named]
    return score_streams(reader, streams, names, cutting or Cutting(), other, progress)


def reader_of(model: Runner | Reader) -> Reader:
    """A runner as a reader; a reader as it is."""
    return RunnerReader(model) if isinstance(model, Runner) else model


def score_streams(
    reader: Reader,
    streams: Sequence[Stream],
    names: Sequence[str],
    cutting: Cutting,
    other: Reader | None = None,
    progress: ProgressFactory = silent,
) -> Perplexity:
    """Score streams of tokens; `perplexity` says what is raised.

    Args:
        reader: whose perplexity it is.
        streams: of tokens below its vocabulary's size.
        names: of the texts that the streams' parts number.
        cutting: how they are read.
        other: what it is compared with.
        progress: draws a bar of the tokens.
    """
    readers = [reader] if other is None else [reader, other]
    if other is not None and other.vocab_size != reader.vocab_size:
        raise UsageError(
            "the two models have different vocabularies: their predictions cannot be compared",
            got=f"{reader.vocab_size} and {other.vocab_size} tokens",
        )
    window, stride = _windows(readers, cutting)
    counts = [stream.predicted for stream in streams]
    windows = cut_into_windows(counts, window, stride)
    _check_lengths(readers, windows, streams, names)
    rows = cutting.batch or min(r.rows(max(w.length for w in windows)) for r in readers)
    run = _Run(readers, streams, names)
    start = time.perf_counter()
    with progress("Reading", sum(counts), "items") as bar:
        for group in in_groups(windows, rows):
            run.read(group, bar)
    seconds = time.perf_counter() - start
    return Perplexity(run.total(), run.texts(), window, stride, seconds)


def _windows(readers: Sequence[Reader], cutting: Cutting) -> tuple[int | None, int | None]:
    """Window and stride in force."""
    if cutting.batch is not None and cutting.batch < 1:
        raise UsageError("there must be at least one window at a time", got=cutting.batch)
    if not cutting.carry:
        default = min(WINDOW, *(size for r in readers for size in (r.context, r.most_tokens)))
        window = default if cutting.window is None else cutting.window
        return window, window if cutting.stride is None else cutting.stride
    if cutting.window is not None or cutting.stride is not None:
        raise UsageError("carried state and windows exclude each other", expected="one of them")
    for reader in readers:
        if not reader.recurrent:
            raise UsageError(
                "a vanilla transformer has no state that could be carried on",
                got=reader.name,
                hint="leave --carry out, or choose a --window",
            )
    return None, None


def _check_lengths(
    readers: Sequence[Reader], windows: Sequence[Window], streams: Sequence[Stream], names: Sequence[str]
) -> None:
    most = min(reader.most_tokens for reader in readers)
    for window in windows:
        if window.length > most:
            raise PositionError(
                f"{names[streams[window.stream].parts[0].text]} would be read past the last position that "
                "the model knows",
                got=f"{window.length} tokens in one go",
                expected=f"at most {most}",
                hint=f"read it in windows: --window {most}, without --carry",
            )


class _Run:
    """The streams' numbers, token by token, as they come."""

    def __init__(self, readers: Sequence[Reader], streams: Sequence[Stream], names: Sequence[str]) -> None:
        self._readers, self._streams, self._names = readers, streams, names
        kinds = 1 if len(readers) == 1 else 4
        # [kinds, predicted tokens] of each stream: loss; the other's loss, KL, agreement. Until known: NaN.
        self._found = [np.full((kinds, stream.predicted), np.nan) for stream in streams]

    def read(self, group: list[Window], bar: Progress) -> None:
        """Read windows, the longest of which comes first, to their ends."""
        lengths = np.array([window.length for window in group], np.int64)
        ids = np.zeros((len(group), lengths[0]), np.int64)
        for row, w in enumerate(group):
            ids[row, : w.length] = self._streams[w.stream].ids[w.start : w.start + w.length]
        readings = [reader.start(ids, lengths) for reader in self._readers]
        done, rows = group[0].skip, len(group)
        for reading in readings if done else []:
            reading.skip(done)
        while done < lengths[0]:
            left = int((lengths > done).sum())
            if left <= rows // 2:  # the rows that are done are the last ones
                rows = left
                for reading in readings:
                    reading.keep(rows)
            piece = max(reader.piece(rows) for reader in self._readers)
            count = min(piece, int(lengths[0]) - done)
            self._take(group[:left], done, count, readings)
            bar.advance(int(np.clip(lengths - done, 0, count).sum()))
            done += count

    def _take(self, group: list[Window], done: int, count: int, readings: list[Reading]) -> None:
        """The next `count` tokens: what all models say of them."""
        logits = [reading.read(count) for reading in readings]
        spans = [(w, min(count, w.length - done)) for w in group]
        if count == 1:  # one product of all rows rather than many of one
            self._note(spans, done, [found[: len(group), 0] for found in logits])
            return
        for row, span in enumerate(spans):
            self._note([span], done, [found[row, : span[1]] for found in logits])

    def _note(self, spans: list[tuple[Window, int]], done: int, logits: list[Logits]) -> None:
        """Logits [n, V] of each model, for the n next tokens of these windows together."""
        places = [(w.stream, w.start + done + i) for w, count in spans for i in range(count)]
        for reader, found in zip(self._readers, logits, strict=True):
            if (bad := first_not_finite(found)) is not None:
                raise self._not_finite(reader, *places[bad])
        targets = np.array([self._streams[stream].ids[at + 1] for stream, at in places], np.int64)
        if len(logits) == 1:
            values = losses(logits[0], targets)[None]
        else:
            own, other = differences(logits[0], logits[1], targets)
            values = np.stack([own, other.loss, other.kl, other.agree.astype(np.float64)])
        for (stream, at), value in zip(places, values.T, strict=True):
            self._found[stream][:, at] = value

    def _not_finite(self, reader: Reader, stream: int, at: int) -> RunnerError:
        part = next(p for p in self._streams[stream].parts if p.stop > at)
        return RunnerError(
            f"the model predicts no number (NaN or infinity) in {self._names[part.text]}",
            got=f"{reader.name}, after token {max(0, at - part.start)} of the text",
            expected="finite logits",
            hint="`validate` says whether the model is damaged; float16 may be too narrow for it",
        )

    def texts(self) -> tuple[Score, ...]:
        """One score for each text, in order."""
        found = []
        for stream, values in zip(self._streams, self._found, strict=True):
            for part in stream.parts:
                of_part = values[:, max(part.start, 1) - 1 : part.stop - 1]
                if of_part.shape[1]:
                    found.append(_score(self._names[part.text], of_part, stream.bytes_of(part)))
        return tuple(found)

    def total(self) -> Score:
        """Of all tokens."""
        size = sum(stream.bytes_of(part) for stream in self._streams for part in stream.parts)
        return _score("total", np.concatenate(self._found, axis=1), size)


def _score(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], size: int) -> Score:
    """Means over tokens: values [1 or 4, n]."""
    assert np.isfinite(values).all()
    means = [float(mean) for mean in values.mean(axis=1)]
    return Score(name, values.shape[1], size, *means)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
