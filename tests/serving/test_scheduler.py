"""Continuous batching: what a text becomes does not depend on who else is there, and nothing is forgotten."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes.runner import ToyRunner
from support.makers.toy_bundle import ToyModel

from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.generation.generator import GenerateOptions, Generator
from dijiang_engines.runners import Runner, open_runner
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.serving.batch import PATIENCE
from dijiang_engines.serving.job import Job, JobOptions, Update
from dijiang_engines.serving.pieces import piece_ends, state_keys
from dijiang_engines.serving.prefix_cache import PrefixCache
from dijiang_engines.serving.scheduler import Limits, Scheduler
from dijiang_engines.tokenizer.load import load_tokenizer
from dijiang_engines.tokenizer.tokenizer import Tokenizer

SAMPLED = SamplingOptions(temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def sample(sample_bundle: Path) -> tuple[Runner, Tokenizer]:
    model = open_bundle(sample_bundle)
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    return open_runner(model, "cpu", threads=1), tokenizer


def run(scheduler: Scheduler, rounds: int = 10_000) -> list[Update]:
    updates = []
    for _ in range(rounds):
        if scheduler.idle:
            return updates
        updates += scheduler.round()
    raise AssertionError("it does not end")


def texts_of(updates: list[Update]) -> dict[tuple[int, int], tuple[str, list[int], Any]]:
    """(job, choice) -> text, token ids, how it ended."""
    parts: dict[tuple[int, int], list[Update]] = defaultdict(list)
    for update in updates:
        parts[id(update.job), update.choice].append(update)
    found = {}
    for key, each in parts.items():
        assert [u.finish is None for u in each] == [True] * (len(each) - 1) + [False]
        ids = [u.token.id for u in each if u.token is not None]
        found[key] = ("".join(u.text for u in each), ids, each[-1].finish)
    return found


def prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    words = [
        "def read(path):",
        "class A:\n",
        "import os\nimport sys\n",
        "x = [i for i in range(10)]\n" * 9,
        "\n",
    ]
    return [tokenizer.encode(words[i % len(words)] + "#" * (i // len(words))) for i in range(count)]


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
def test_alone_and_among_others(sample: tuple[Runner, Tokenizer], sampling: SamplingOptions) -> None:
    """The texts are those of `generate`, whatever comes and goes beside them, in batches of any size."""
    runner, tokenizer = sample
    given = prompts(tokenizer, 24)
    lengths = [3 + 7 * i % 40 for i in range(len(given))]
    generator = Generator(runner, tokenizer)
    expected = []
    for number, (prompt, length) in enumerate(zip(given, lengths, strict=True)):
        options = GenerateOptions(max_tokens=length, sampling=sampling, seed=number)
        generation = generator.start([prompt], options)
        list(generation)
        expected.append(generation.completions[0])
    scheduler = Scheduler(runner, tokenizer, Limits(slots=9, piece=16))
    jobs = [
        Job(list(prompt), JobOptions(length, sampling, seed=number))
        for number, (prompt, length) in enumerate(zip(given, lengths, strict=True))
    ]
    shuffled, rng, updates = list(jobs), random.Random(3), []
    rng.shuffle(shuffled)
    sizes = set()
    while shuffled or not scheduler.idle:
        for _ in range(rng.randrange(3)):
            if shuffled:
                scheduler.submit(shuffled.pop())
        updates += scheduler.round()
        sizes.add(len(scheduler._batch.rows))
    found = texts_of(updates)
    for job, whole in zip(jobs, expected, strict=True):
        assert found[id(job), 0] == (whole.text, whole.token_ids, whole.finish_reason)
    assert {1, 2, 4, 8, 9} <= sizes
    assert scheduler.counts.generated_tokens == sum(len(whole.token_ids) for whole in expected)


def test_a_batch_is_no_larger_than_it_must_be(sample: tuple[Runner, Tokenizer]) -> None:
    runner, tokenizer = sample
    scheduler = Scheduler(runner, tokenizer, Limits(slots=32))
    for prompt in prompts(tokenizer, 7):
        scheduler.submit(Job(prompt, JobOptions(4, ignore_eos=True)))
    scheduler.submit(Job([5], JobOptions(20 + 8 + 3 * PATIENCE, ignore_eos=True)))
    sizes = []
    while not scheduler.idle:
        scheduler.round()
        sizes.append(len(scheduler._batch.rows))
    assert max(sizes) <= 8
    assert sizes[-1] == 1


def test_a_slot_that_is_used_again_begins_at_zero(toy: tuple[Path, ToyModel]) -> None:
    runner, model = ToyRunner(toy[1]), toy[1]
    scheduler = Scheduler(runner, None, Limits(slots=2, piece=4, prefix_bytes=0))
    rng = np.random.default_rng(0)
    for _ in range(12):
        prompt = rng.integers(1, 200, int(rng.integers(1, 9))).tolist()
        scheduler.submit(Job(prompt, JobOptions(int(rng.integers(1, 6)), ignore_eos=True)))
    jobs = list(scheduler.waiting)
    found = texts_of(run(scheduler))
    for job in jobs:
        ids, expected = list(job.prompt), []
        for _ in range(job.options.max_tokens):
            expected.append(int(model.logits(ids).argmax()))
            ids.append(expected[-1])
        assert found[id(job), 0][1] == expected


def test_several_texts_of_one_prompt(sample: tuple[Runner, Tokenizer]) -> None:
    """The prompt is read once; each text draws its own numbers, those of `generate` with as many prompts."""
    runner, tokenizer = sample
    prompt = tokenizer.encode("import ")
    scheduler = Scheduler(runner, tokenizer, Limits(slots=4))
    scheduler.submit(Job(prompt, JobOptions(12, SAMPLED, seed=4, choices=4)))
    found = texts_of(run(scheduler))
    assert scheduler.counts.prompt_tokens == len(prompt)
    generation = Generator(runner, tokenizer).start(
        [prompt] * 4, GenerateOptions(max_tokens=12, sampling=SAMPLED, seed=4)
    )
    list(generation)
    assert [ids for _, ids, _ in found.values()] == [each.token_ids for each in generation.completions]


def test_a_long_prompt_does_not_stop_the_others(sample: tuple[Runner, Tokenizer]) -> None:
    """Between two of its pieces every text gets a token, and a short prompt that came later is read first."""
    runner, tokenizer = sample
    scheduler = Scheduler(runner, tokenizer, Limits(slots=8, piece=16))
    running = Job([5], JobOptions(60, ignore_eos=True))
    scheduler.submit(running)
    scheduler.round()
    long, short = Job([7] * 320, JobOptions(1)), Job([9] * 10, JobOptions(1))
    scheduler.submit(long)
    scheduler.submit(short)
    ended, pieces = [], 0
    while long not in ended:
        updates = scheduler.round()
        pieces += 1
        assert sum(update.job is running for update in updates) == 1
        ended += [update.job for update in updates if update.finish]
    assert ended[0] is short and pieces == 320 // 16 + 1


def test_jobs_wait_for_slots(toy: tuple[Path, ToyModel]) -> None:
    scheduler = Scheduler(ToyRunner(toy[1]), None, Limits(slots=2))
    jobs = [Job([5], JobOptions(5, ignore_eos=True, choices=1 + i % 2)) for i in range(3)]
    for job in jobs:
        scheduler.submit(job)
    while not scheduler.idle:
        scheduler.round()
        assert len(scheduler._batch.rows) <= 2
    assert scheduler.counts.generated_tokens == 4 * 5


@pytest.mark.parametrize("when", ["waiting", "reading", "running"])
def test_what_is_cancelled_is_gone(toy: tuple[Path, ToyModel], when: str) -> None:
    scheduler = Scheduler(ToyRunner(toy[1]), None, Limits(slots=1, piece=2))
    job, other = Job([5] * 5, JobOptions(50, ignore_eos=True)), Job([6], JobOptions(2, ignore_eos=True))
    scheduler.submit(job)
    for _ in range({"waiting": 0, "reading": 1, "running": 5}[when]):
        scheduler.round()
    scheduler.submit(other)
    scheduler.cancel(job)
    updates = run(scheduler)
    assert {update.job for update in updates} == {other}
    scheduler.cancel(job)  # once more does nothing
    assert not scheduler.jobs()


def test_one_text_s_trouble_is_its_own(toy: tuple[Path, ToyModel]) -> None:
    """Logits that are not finite end the job that they belong to."""
    runner = ToyRunner(toy[1])

    def tamper(name: str, arrays: dict[Any, Any]) -> None:
        arrays["logits"][arrays["positions"] == 7] = np.nan

    runner.tamper = tamper
    scheduler = Scheduler(runner, None, Limits(slots=4, piece=64))
    bad, good = Job([5] * 6, JobOptions(9, ignore_eos=True)), Job([6] * 20, JobOptions(9, ignore_eos=True))
    scheduler.submit(bad)
    scheduler.submit(good)
    updates = run(scheduler)
    errors = [update for update in updates if update.error is not None]
    assert [update.job for update in errors] == [bad] and isinstance(errors[0].error, RunnerError)
    assert sum(update.job is good for update in updates) == 9


# -- the beginnings of prompts -------------------------------------------------------------------------------


def test_pieces_end_where_messages_end() -> None:
    assert piece_ends(10, 4) == [4, 8, 10]
    assert piece_ends(8, 4) == [4, 8]
    assert piece_ends(10, 4, (3, 9)) == [3, 7, 9, 10]
    assert piece_ends(10, 4, (0, 10, 12, 5)) == [4, 5, 9, 10]
    assert piece_ends(10, 4, (), 6) == [10]
    assert piece_ends(1, 64) == [1]


def test_a_key_tells_the_tokens_the_cuts_and_the_salt() -> None:
    ids = list(range(20))

    def last(ids: list[int], ends: list[int], salt: bytes = b"a") -> bytes:
        return list(state_keys(salt, ids, ends))[-1]

    assert last(ids, [4, 8]) == last([*ids[:8], 99], [4, 8])
    others = {last(ids, [8]), last(ids, [4, 8], b"b"), last(ids[::-1], [4, 8]), last(ids, [4, 8, 12])}
    assert last(ids, [4, 8]) not in others and len(others) == 4


def test_what_was_read_is_found_bit_for_bit(sample: tuple[Runner, Tokenizer]) -> None:
    """A hit's logits, and so its text, are those of a miss to the last bit."""
    runner, tokenizer = sample
    shared = tokenizer.encode("def function(argument):\n    return argument\n" * 8)
    ends = [tokenizer.encode(text) for text in ("x = 1", "class B:", "")]
    options = JobOptions(6, SAMPLED, seed=1, logprobs=3)

    def texts(limits: Limits, salt: bytes = b"k") -> tuple[list[Any], Scheduler, list[int]]:
        scheduler, found, cached = Scheduler(runner, tokenizer, limits), [], []
        for end in ends:
            job = Job([*shared, *end], options, splits=(len(shared) - 3,), salt=salt)
            scheduler.submit(job)
            found.append([update.token for update in run(scheduler)])
            cached.append(job.cached_tokens)
        return found, scheduler, cached

    plain, _, none = texts(Limits(piece=16, prefix_bytes=0))
    hits, scheduler, cached = texts(Limits(piece=16))
    assert hits == plain
    assert none == [0, 0, 0] and cached[0] == 0 and min(cached[1:]) >= len(shared) - 3 - 16
    assert scheduler.cache.hits == 2 and scheduler.counts.cached_tokens == sum(cached)
    other = Job([*shared, *ends[0]], options, salt=b"another key")
    scheduler.submit(other)
    run(scheduler)
    assert other.cached_tokens == 0


def test_the_cache_keeps_to_its_bytes() -> None:
    cache = PrefixCache(1000)
    for number in range(5):
        cache.put(bytes([number]), [np.zeros(50, np.float32)])  # 200 bytes
    cache.get(bytes([0]))
    cache.put(b"new", [np.zeros(100, np.float32)])
    assert cache.bytes <= 1000 and bytes([0]) in cache and bytes([1]) not in cache
    cache.put(b"large", [np.zeros(1000, np.float32)])
    assert b"large" not in cache and len(cache) == 4
    cache.put(bytes([0]), [np.zeros(1, np.float32)])
    assert cache.get(bytes([0]))[0].size == 50


# -- sessions ------------------------------------------------------------------------------------------------


def test_a_session_goes_on_as_if_it_had_not_stopped(sample: tuple[Runner, Tokenizer]) -> None:
    runner, tokenizer = sample
    prompt = tokenizer.encode("def main(argv):\n")
    scheduler = Scheduler(runner, tokenizer, Limits(slots=2, piece=8))
    whole = JobOptions(20, SAMPLED, seed=9, ignore_eos=True)
    scheduler.submit(Job(list(prompt), whole))
    expected = texts_of(run(scheduler))
    scheduler.submit(Job(list(prompt), replace(whole, max_tokens=8, save=True)))
    first = run(scheduler)
    session = first[-1].session
    assert session is not None and session.batch == 1
    rest = Job(list(session.token_ids[0]), replace(whole, max_tokens=12), session=session)
    scheduler.submit(rest)
    second = run(scheduler)
    ids = [update.token.id for update in (*first, *second) if update.token is not None]
    assert ids == next(iter(expected.values()))[1]
    assert scheduler.counts.prompt_tokens == 2 * len(prompt) + 1  # the last token had not been read
