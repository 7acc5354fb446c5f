"""States that servers share: found bit for bit or not at all, and no token waits for the store.

The store is a fake: it proves orchestration. tests/samples/test_scale_prefixes.py has a real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes.runner import ToyRunner
from support.makers.toy_bundle import make_bundle

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.runners.base import Runner
from dijiang_engines.sampling import SamplingOptions
from dijiang_engines.serving.job import Job, JobOptions
from dijiang_engines.serving.prefix_store import from_value, namespace, stored_name, to_value
from dijiang_engines.serving.scheduler import Limits, Scheduler
from dijiang_engines.serving.serve import ServerOptions
from dijiang_engines.serving.shared_prefixes import SEARCHES, SharedPrefixes
from dijiang_engines.tokenizer.load import load_tokenizer

PATIENT = 30.0
"""Seconds: longer than anything here takes, however busy the machine is."""
SAMPLED = JobOptions(6, SamplingOptions(temperature=0.9, top_p=0.95), seed=1, logprobs=3, ignore_eos=True)
KEY = b"k" * 16


class FakeStore:
    """A dictionary, with what may go wrong across a network."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.finds = self.puts = self.closed = 0
        self.before_find: Callable[[], object] = lambda: None
        self.before_put: Callable[[], object] = lambda: None

    def find(self, names: Sequence[str]) -> tuple[int, bytes] | None:
        self.finds += 1
        self.before_find()
        return next(((i, self.values[name]) for i, name in enumerate(names) if name in self.values), None)

    def put(self, name: str, value: bytes) -> None:
        self.puts += 1
        self.before_put()
        self.values[name] = value

    def close(self) -> None:
        self.closed += 1


def fail() -> None:
    raise ConnectionError("the store is gone")


def until(condition: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < PATIENT
        time.sleep(0.002)


def prefix_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("dijiang-prefix")]


@contextmanager
def sharing(store: FakeStore, runner: Any, **how: Any) -> Iterator[SharedPrefixes]:
    shared = SharedPrefixes(store, runner.spec, **({"seconds": PATIENT} | how))
    shared.start()
    try:
        yield shared
    finally:
        shared.close()


@pytest.fixture
def toy(tmp_path: Path) -> ToyRunner:
    return ToyRunner(make_bundle(tmp_path / "toy"))


def tokens_of(scheduler: Scheduler, job: Job) -> list[Any]:
    """What a job gives, alone; what it read is in the store afterwards."""
    scheduler.submit(job)
    found = []
    while not scheduler.idle:
        found += [update.token for update in scheduler.round() if update.job is job]
    if (shared := scheduler.shared) is not None:
        until(lambda: shared._queued == 0)
    return found


# -- values ------------------------------------------------------------------------------------------------


def test_a_value_is_what_was_put_or_nothing(toy: ToyRunner) -> None:
    rng = np.random.default_rng(0)
    spec = toy.spec
    layers = [rng.standard_normal((1, *spec.state_shape)).astype(np.float32) for _ in range(spec.num_layers)]
    layers[0].reshape(-1)[:3] = [-0.0, np.nan, 1e-42]
    value = to_value(KEY, layers)
    found = from_value(KEY, value, spec)
    assert found is not None and len(found) == len(layers)
    for one, other in zip(found, layers, strict=True):
        assert one.dtype == np.float32 and one.shape == other.shape and one.tobytes() == other.tobytes()
    for place in (0, 31, 32, 33, len(value) // 2, len(value) - 1):
        damaged = bytearray(value)
        damaged[place] ^= 1
        assert from_value(KEY, bytes(damaged), spec) is None
    for wrong in (b"", value[:-1], value[:-4], value + b"\0", value[:32], bytes(len(value)), value[::-1]):
        assert from_value(KEY, wrong, spec) is None
    assert from_value(b"j" * 16, value, spec) is None
    assert from_value(KEY, value, replace(spec, num_layers=spec.num_layers + 1)) is None


def test_a_name_does_not_tell_the_key_that_proves_values() -> None:
    assert len(stored_name(KEY)) == 32 and KEY.hex() not in stored_name(KEY)
    assert stored_name(KEY) != stored_name(b"j" * 16)


def test_the_namespace_tells_model_runtime_settings_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dijiang_engines.serving import prefix_store

    runner = ToyRunner(make_bundle(tmp_path / "a"))
    other_model = make_bundle(tmp_path / "b", seed=5)
    a, b = open_bundle(tmp_path / "a"), open_bundle(tmp_path / "b")
    machine = prefix_store.describe_machine()
    first = namespace(a, runner)
    assert namespace(open_bundle(tmp_path / "a"), ToyRunner(runner.model)) == first
    found = [first, namespace(b, ToyRunner(other_model))]
    runner.name = "another"
    found.append(namespace(a, runner))
    runner.settings = lambda: {"threads": 2}  # type: ignore[attr-defined]
    found.append(namespace(a, runner))
    monkeypatch.setattr(prefix_store, "package_versions", lambda names: {"onnxruntime": "0.1"})
    found.append(namespace(a, runner))
    monkeypatch.setattr(prefix_store, "describe_machine", lambda: replace(machine, cpu="another"))
    found.append(namespace(a, runner))
    monkeypatch.setattr(prefix_store, "RULES", 0)
    found.append(namespace(a, runner))
    assert len(set(found)) == 7


# -- two servers -------------------------------------------------------------------------------------------


def test_what_one_has_read_another_finds_bit_for_bit(model: Bundle, runner: Runner) -> None:
    """Tokens and log-probabilities of a hit are those of reading, to the last bit."""
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    shared_ids = tokenizer.encode("def function(argument):\n    return argument\n" * 8)
    prompts = [[*shared_ids, *tokenizer.encode(end)] for end in ("x = 1", "class B:")]
    plain = Scheduler(runner, tokenizer, Limits(piece=16, prefix_bytes=0))
    expected = [tokens_of(plain, Job(list(prompt), SAMPLED)) for prompt in prompts]
    store = FakeStore()
    with sharing(store, runner) as a, sharing(store, runner) as b:
        first = Scheduler(runner, tokenizer, Limits(piece=16), a)
        one = Job(list(prompts[0]), SAMPLED, splits=(len(shared_ids),), salt=b"s")
        other = Job(list(prompts[1]), SAMPLED, splits=(len(shared_ids),), salt=b"s")
        assert tokens_of(first, one) == expected[0] and one.cached_tokens == 0
        assert len(store.values) == a.counts.written == len(first.cache)
        for memory in (0, 1 << 20):  # also without any of its own
            second = Scheduler(runner, tokenizer, Limits(piece=16, prefix_bytes=memory), b)
            other.done = False
            assert tokens_of(second, other) == expected[1]
            assert other.cached_tokens == len(shared_ids) == second.counts.shared_tokens
            assert second.counts.cached_tokens == len(shared_ids)
        finds = store.finds
        again = Job(list(prompts[1]), SAMPLED, splits=(len(shared_ids),), salt=b"s")
        assert tokens_of(second, again) == expected[1] and again.cached_tokens == len(shared_ids)
        assert store.finds == finds and second.counts.shared_tokens == len(shared_ids)  # now in memory
        strange = [
            (Limits(piece=16), Job(list(prompts[1]), SAMPLED, splits=(len(shared_ids),), salt=b"t")),
            (Limits(piece=24), Job(list(prompts[1]), SAMPLED, splits=(len(shared_ids),), salt=b"s")),
        ]
        for limits, job in strange:
            tokens_of(Scheduler(runner, tokenizer, limits, b), job)
            assert job.cached_tokens == 0


def test_the_longest_of_memory_and_store_is_taken(toy: ToyRunner) -> None:
    prompt, options = list(range(1, 40)), JobOptions(3, ignore_eos=True, logprobs=1)
    expected = tokens_of(Scheduler(toy, None, Limits(prefix_bytes=0, piece=8)), Job(prompt[:], options))
    store = FakeStore()
    with sharing(store, toy) as a, sharing(store, toy) as b:
        second = Scheduler(toy, None, Limits(piece=8), b)
        tokens_of(second, Job(prompt[:12], options))  # 8 tokens are in its memory
        tokens_of(Scheduler(toy, None, Limits(piece=8), a), Job(prompt[:30], options))  # 24 in the store
        job = Job(prompt[:], options)
        assert tokens_of(second, job) == expected and job.cached_tokens == 24
        assert second.counts.shared_tokens == 24
        finds = store.finds
        job = Job(prompt[:], options)  # all 32 are in memory by now
        assert tokens_of(second, job) == expected and job.cached_tokens == 32 and store.finds == finds


def test_memory_that_has_grown_meanwhile_is_better_than_what_was_found(toy: ToyRunner) -> None:
    prompt, options = list(range(1, 40)), JobOptions(3, ignore_eos=True, logprobs=1)
    plain = Scheduler(toy, None, Limits(piece=8))
    expected = tokens_of(plain, Job(prompt[:], options))
    store, gate = FakeStore(), threading.Event()
    with sharing(store, toy) as a, sharing(store, toy) as b:
        tokens_of(Scheduler(toy, None, Limits(piece=8), a), Job(prompt[:12], options))  # 8 in the store
        store.before_find = gate.wait
        second, job = Scheduler(toy, None, Limits(piece=8), b), Job(prompt[:], options)
        second.submit(job)
        assert second.round() == [] and second.reading[0].waits
        key = second.reading[0].keys[2]
        second.cache.put(key, plain.cache.get(key))  # as reading another prompt would
        gate.set()
        found = []
        while not second.idle:
            found += [update.token for update in second.round()]
        assert found == expected and job.cached_tokens == 24 and b.counts.hits == 1
        assert second.counts.shared_tokens == 0


def test_what_is_damaged_is_read_and_written_anew(toy: ToyRunner) -> None:
    prompt, options = list(range(1, 20)), JobOptions(3, ignore_eos=True, logprobs=1)
    store = FakeStore()
    with sharing(store, toy) as a, sharing(store, toy) as b, sharing(store, toy) as c:
        expected = tokens_of(Scheduler(toy, None, Limits(piece=8), a), Job(prompt[:], options))
        whole = dict(store.values)
        names = list(whole)
        store.values[names[1]] = whole[names[0]]  # a good one, of another prompt
        for wrong in (whole[names[0]], b"", bytes(len(whole[names[1]]))):
            store.values[names[1]] = wrong
            job = Job(prompt[:], options)
            assert tokens_of(Scheduler(toy, None, Limits(piece=8), b), job) == expected
            assert job.cached_tokens == 0 and store.values == whole
        assert b.counts.damaged == b.counts.misses == 3 and b.counts.hits == b.counts.failures == 0
        job = Job(prompt[:], options)
        assert tokens_of(Scheduler(toy, None, Limits(piece=8), c), job) == expected
        assert job.cached_tokens == 16 and c.counts.hits == 1


# -- a store that fails ------------------------------------------------------------------------------------


def test_tokens_come_while_a_prompt_waits_for_a_store_that_hangs(toy: ToyRunner) -> None:
    """Texts go on as if there were no store; the prompt is read when its time is over; then nobody waits."""
    store, gate = FakeStore(), threading.Event()
    options = JobOptions(4, ignore_eos=True)
    expected = tokens_of(Scheduler(toy, None, Limits(piece=8)), Job(list(range(1, 20)), options))
    with sharing(store, toy, seconds=0.3) as shared:
        scheduler = Scheduler(toy, None, Limits(piece=8), shared)
        running = Job([7], JobOptions(100_000, ignore_eos=True))
        scheduler.submit(running)
        while not scheduler.counts.steps:
            scheduler.round()
        store.before_find = gate.wait
        job = Job(list(range(1, 20)), options)
        scheduler.submit(job)
        begun, meanwhile, found = time.monotonic(), 0, []
        while len(found) < 4:
            updates = scheduler.round()
            found += [update.token for update in updates if update.job is job]
            meanwhile += not found
        assert found == expected and job.cached_tokens == 0
        assert time.monotonic() - begun >= 0.3 and meanwhile > 10
        until(lambda: shared._asked is not None and time.monotonic() - shared._asked > 0.3)
        assert shared.look([KEY]) is None
        assert store.finds == 1
        gate.set()
        until(lambda: shared.counts.failures == 1)
        assert shared.look([KEY]) is None  # it has come back, and is left alone all the same
        scheduler.cancel(running)


def test_who_is_in_memory_overtakes_who_waits_and_who_leaves_is_forgotten(toy: ToyRunner) -> None:
    store, gate = FakeStore(), threading.Event()
    options = JobOptions(3, ignore_eos=True)
    with sharing(store, toy, seconds=PATIENT) as shared:
        scheduler = Scheduler(toy, None, Limits(piece=8), shared)
        known = list(range(1, 10))
        tokens_of(scheduler, Job(known[:], options))
        store.before_find = gate.wait
        waits, quick = Job(list(range(30, 50)), options), Job(known[:], options)
        scheduler.submit(waits)
        assert scheduler.round() == []
        scheduler.submit(quick)
        found = [update for _ in range(4) for update in scheduler.round()]
        assert {update.job for update in found} == {quick} and found[-1].finish == "length"
        assert scheduler.jobs() == [waits] and not scheduler.idle
        scheduler.cancel(waits)
        assert scheduler.idle
        gate.set()
        until(lambda: shared._asked is None)
        assert scheduler.idle and scheduler.round() == []


def test_a_store_that_fails_is_left_alone_for_a_while(toy: ToyRunner) -> None:
    store = FakeStore()
    options, prompt = JobOptions(2, ignore_eos=True), list(range(1, 20))
    expected = tokens_of(Scheduler(toy, None, Limits(piece=8)), Job(prompt[:], options))
    store.before_find = store.before_put = fail
    with sharing(store, toy, rest_seconds=1000.0) as shared:
        for _ in range(3):
            job = Job(prompt[:], options)
            assert tokens_of(Scheduler(toy, None, Limits(piece=8), shared), job) == expected
        assert (store.finds, store.puts) == (1, 1) and shared.counts.failures == 2
        assert shared.counts.dropped == 6 and shared.counts.written == 0
    with sharing(store, toy, rest_seconds=0.05) as shared:
        lookup = shared.look([KEY])
        assert lookup is not None
        until(lambda: lookup.settled)
        assert lookup.found is None
        store.before_find = store.before_put = lambda: None
        time.sleep(0.06)
        job = Job(prompt[:], options)
        assert tokens_of(Scheduler(toy, None, Limits(piece=8), shared), job) == expected
        assert len(store.values) == 2 == shared.counts.written


def test_what_waits_to_be_written_is_bounded(toy: ToyRunner) -> None:
    store, gate = FakeStore(), threading.Event()
    layers = toy.export_state(toy.new_state(1))
    size = sum(layer.nbytes for layer in layers)
    store.before_put = lambda: gate.wait(PATIENT)
    with sharing(store, toy, queue_bytes=3 * size + 1) as shared:
        for number in range(10):
            shared.put(bytes([number]) * 16, layers)
        assert shared.counts.dropped == 7 and shared._queued == 3 * size
        gate.set()
        until(lambda: shared._queued == 0)
        assert shared.counts.written == 3 and len(store.values) == 3
        shared.put(KEY, layers)
        until(lambda: len(store.values) == 4)


def test_searches_that_wait_are_bounded_and_those_that_are_late_are_not_made(toy: ToyRunner) -> None:
    store, gate = FakeStore(), threading.Event()
    store.before_find = gate.wait
    with sharing(store, toy, seconds=1.0, rest_seconds=0.0) as shared:
        lookups = [shared.look([KEY]) for _ in range(SEARCHES + 10)]
        taken = [lookup for lookup in lookups if lookup is not None]
        assert SEARCHES <= len(taken) <= SEARCHES + 1
        until(lambda: all(lookup.settled for lookup in taken))
        gate.set()
        until(lambda: all(lookup._done.is_set() for lookup in taken))
        assert store.finds == 1 and all(lookup.found is None for lookup in taken)


# -- the end -----------------------------------------------------------------------------------------------


def test_closing_ends_the_threads_and_is_harmless_twice(toy: ToyRunner) -> None:
    store = FakeStore()
    assert prefix_threads() == []
    with sharing(store, toy) as shared:
        assert sorted(prefix_threads()) == ["dijiang-prefix-reader", "dijiang-prefix-writer"]
        shared.close()
        assert prefix_threads() == [] and store.closed == 1
        assert shared.look([KEY]) is None
        shared.put(KEY, toy.export_state(toy.new_state(1)))
        assert shared._queued == 0
    assert store.closed == 1
    SharedPrefixes(store, toy.spec).close()  # never started
    assert store.closed == 2


def test_closing_does_not_wait_for_a_store_that_hangs(toy: ToyRunner) -> None:
    store, gate = FakeStore(), threading.Event()
    store.before_find = store.before_put = gate.wait
    shared = SharedPrefixes(store, toy.spec, seconds=PATIENT)
    shared.start()
    try:
        lookups = [shared.look([KEY]) for _ in range(SEARCHES + 1)]
        shared.put(KEY, toy.export_state(toy.new_state(1)))
        until(lambda: store.finds == store.puts == 1)
        begun = time.monotonic()
        shared.close(0.2)
        assert time.monotonic() - begun < 2 and store.closed == 1
    finally:
        gate.set()
    until(lambda: prefix_threads() == [])
    until(lambda: all(lookup is None or lookup._done.is_set() for lookup in lookups))


# -- whole servers -----------------------------------------------------------------------------------------


def test_two_servers_share_what_they_read_within_an_api_key(model: Bundle, runner: Runner) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    from support.http import ask
    from support.server import serving

    store = FakeStore()
    options = ServerOptions(piece=16, keys=("alpha", "beta"), shared_seconds=PATIENT)
    body = {
        "prompt": "def read(path):\n    return path\n" * 8, "max_tokens": 5, "logprobs": 2, "temperature": 0,
    }  # fmt: skip

    def answer(running: Any, key: str) -> tuple[int, Any]:
        found = ask(running.port, "POST", "/v1/completions", body, key)
        assert found.status == 200
        until(lambda: running.service.scheduler.shared._queued == 0)
        return found.json["usage"]["prompt_tokens_details"]["cached_tokens"], found.json["choices"]

    with serving(model, runner, options, prefixes=store) as one:
        first = answer(one, "alpha")
        assert first[0] == 0 and store.values
    with serving(model, runner, options, prefixes=store) as other:
        second = answer(other, "alpha")
        assert second[0] >= 64 and second[1] == first[1]
        assert answer(other, "beta") == (0, first[1])
        metrics = ask(other.port, "GET", "/metrics").data.decode()
        assert f"dijiang:shared_prefix_tokens_total {second[0]}.0\n" in metrics
        assert "dijiang:shared_prefix_hits_total 1.0\n" in metrics
        assert "dijiang:shared_prefix_misses_total 1.0\n" in metrics
    assert store.closed == 2 and prefix_threads() == []
    with serving(model, runner, replace(options, piece=32), prefixes=store) as strange:
        assert answer(strange, "alpha")[0] == 0
    with serving(model, runner, ServerOptions(piece=16)) as alone:
        assert "shared_prefix" not in ask(alone.port, "GET", "/metrics").data.decode()
    with pytest.raises(UsageError):
        ServerOptions(shared_seconds=0)
