"""The sampling kernel on a CPU, on emulated threads of blocks and of clusters, against sampling.py."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from support.linear_emulator import compiled
from support.oracles import integer_sampling
from support.sampling_cases import KINDS, NEAR, OPTIONS, SEED, Floats, bitmask, gap, normal

from dijiang_engines import sampling
from dijiang_engines.kernels import abi
from dijiang_engines.sampling import SamplingOptions, uniform


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    target = tmp_path_factory.mktemp("sampling") / "sampling.so"
    return ctypes.CDLL(str(compiled(target, ("tests/emulator/sampling.cpp",))))


def choose(
    emulated: Any,
    logits: Floats,
    options: SamplingOptions,
    *,
    threads: int = 512,
    team: int = 1,
    staged: int = 1,
    backwards: bool = False,
    first_draw: int = 0,
    allowed: Any = None,
    seen: Any = None,
    of_row: bool = False,
) -> tuple[list[int], list[int]]:
    """Tokens and row status; row r draws number first_draw + r of stream r."""
    batch, vocabulary = logits.shape
    tokens, status = np.full(batch, -77, np.int64), np.full(batch, -77, np.int32)
    draws = np.arange(first_draw, first_draw + batch, dtype=np.int64)
    given = abi.SamplingOptionsStruct(
        options.temperature, options.top_p, options.min_p, options.repetition_penalty, SEED, options.top_k
    )
    words = -(-vocabulary // 32)
    buffers = abi.SampleBuffersStruct(
        logits=logits.ctypes.data, logits_row_stride=vocabulary, draws=draws.ctypes.data,
        allowed=None if allowed is None else allowed.ctypes.data,
        seen=None if seen is None else seen.ctypes.data, seen_row_stride=words,
        row_options=ctypes.addressof(given) if of_row else None, tokens=tokens.ctypes.data,
        row_status=status.ctypes.data, batch=batch, vocabulary=vocabulary, integers=1,
    )  # fmt: skip
    emulated.emulate_sample(
        ctypes.byref(given), ctypes.byref(buffers), threads, team, int(staged), int(backwards)
    )
    return tokens.tolist(), status.tolist()


FEW = ["greedy", "plain", "top-k", "top-p", "all", "few"]


@pytest.mark.parametrize(
    ("vocabulary", "team", "staged", "backwards", "kinds", "names"),
    [
        (7, 1, True, False, ["normal"], OPTIONS), (2049, 1, True, True, KINDS, FEW),
        (3001, 1, False, False, ["ties", "zeros"], FEW),
        (2500, 2, True, False, ["wide", "sparse", "equal"], FEW),
        (4100, 2, False, True, ["normal"], ["large top-k", "min-p", "top-k 1"]),
        (9001, 8, True, True, ["wide"], ["all", "few"]), (9001, 16, True, False, ["wide"], ["top-p"]),
    ],
)  # fmt: skip
def test_same_tokens_as_on_the_host(
    emulated: Any,
    vocabulary: int,
    team: int,
    staged: bool,
    backwards: bool,
    kinds: list[str],
    names: list[str],
) -> None:
    for kind in kinds:
        same_tokens(emulated, kind, vocabulary, team, staged, backwards, list(names))


def same_tokens(
    emulated: Any, kind: str, vocabulary: int, team: int, staged: bool, backwards: bool, names: list[str]
) -> None:
    rng = np.random.default_rng([vocabulary, list(KINDS).index(kind)])
    logits = KINDS[kind](rng, 1, vocabulary)
    seen = rng.random(logits.shape) < 0.1
    banned = rng.choice(vocabulary, vocabulary // 5, replace=False) if kind != "sparse" else np.zeros(0, int)
    allowed = np.ones(vocabulary, np.bool_)
    allowed[banned] = False
    poisoned = logits.copy()
    poisoned[:, banned] = np.nan  # what may not be chosen is not looked at
    for draw, name in enumerate(names):
        options = OPTIONS[name]
        uniforms = np.array([uniform(SEED, 0, draw)])
        expected = sampling.sample(logits, options, uniforms, seen=seen, banned=banned)
        got, status = choose(
            emulated, poisoned, options, team=team, staged=staged, backwards=backwards, first_draw=draw,
            allowed=bitmask(allowed), seen=bitmask(seen),
        )  # fmt: skip
        assert status == [0], name
        if got != expected.tolist():
            assert not options.greedy, (name, got, expected)
            scores = logits[0].copy()
            scores[banned] = -np.inf
            applies = seen[0] if options.repetition_penalty != 1 else None
            assert gap(scores, options, uniforms[0], got[0], applies) < NEAR, (name, got, expected)


FILTERS = [
    SamplingOptions(1.0, top_p=0.9), SamplingOptions(1.0, top_k=400, top_p=0.95, min_p=0.002),
    SamplingOptions(0.8, top_k=600), SamplingOptions(2.0, top_k=1, top_p=0.5),
    SamplingOptions(1.0, top_p=1e-7), SamplingOptions(0.7, top_k=191, top_p=0.999999, repetition_penalty=1.3),
    SamplingOptions(1.0, min_p=0.3), SamplingOptions(1e-3, top_k=50, top_p=0.9),
    SamplingOptions(1e30, top_k=5000, top_p=0.9), SamplingOptions(1.0, top_p=0.999, min_p=0.3),
]  # fmt: skip


def the_same(emulated: Any, logits: Floats, options: SamplingOptions, draw: int, **how: Any) -> None:
    """The token is the oracle's, exactly."""
    rng = np.random.default_rng([draw, logits.size])
    masked = draw % 3 == 0
    seen, allowed = rng.random(logits.size) < 0.1, rng.random(logits.size) < 0.8
    allowed[int(rng.integers(logits.size))] = True
    got, status = choose(
        emulated, logits[None], options, first_draw=draw, seen=bitmask(seen),
        allowed=bitmask(allowed) if masked else None, **how,
    )  # fmt: skip
    if masked and not np.isfinite(logits[allowed]).any():
        assert status == [2]
        return
    expected = integer_sampling.choose(
        logits, options, uniform(SEED, 0, draw), seen=seen, allowed=allowed if masked else None
    )
    assert (status, got) == ([0], [expected]), (options, draw, how)


@pytest.mark.parametrize(
    ("vocabulary", "threads", "team", "staged", "backwards"),
    [(1, 512, 1, 1, False), (33, 1024, 1, 0, True), (1024, 512, 1, 2, False), (2049, 1024, 2, 1, True),
     (3001, 512, 4, 0, False), (6001, 1024, 4, 1, False), (10007, 512, 16, 1, True)],
)  # fmt: skip
def test_tokens_are_those_of_exact_integers(
    emulated: Any, vocabulary: int, threads: int, team: int, staged: int, backwards: bool
) -> None:
    for number, kind in enumerate(list(KINDS)[:: 1 if team < 4 else 3 if team < 16 else 4]):
        logits = KINDS[kind](np.random.default_rng([number, vocabulary]), 1, vocabulary)[0]
        for draw in range(1 if team > 4 else 2):
            options = FILTERS[(number + 3 * draw + vocabulary) % len(FILTERS)]
            the_same(
                emulated, logits, options, number + 8 * draw, threads=threads, team=team, staged=staged,
                backwards=backwards,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("threads", "team", "staged"), [(512, 1, 0), (1024, 1, 2), (1024, 2, 2), (512, 16, 1)]
)
def test_top_k_of_few_tokens(emulated: Any, threads: int, team: int, staged: int) -> None:
    """They are listed and drawn from without a histogram of all."""
    logits = KINDS["wide"](np.random.default_rng(team), 1, 5003)[0]
    for draw, options in enumerate([
        SamplingOptions(0.9, top_k=50), SamplingOptions(0.9, top_k=50, top_p=0.95),
        SamplingOptions(2.0, top_k=1), SamplingOptions(1.0, top_k=2, top_p=0.01),
        SamplingOptions(1.5, top_k=120, top_p=0.9, min_p=0.01),
    ]):  # fmt: skip
        the_same(emulated, logits, options, draw, threads=threads, team=team, staged=staged)
    for draw in range(6):  # one token more or less would be chosen, or missed, as often as any other
        options = SamplingOptions(1e6, top_k=2 + draw % 2, top_p=1 if draw < 3 else 0.6)
        the_same(emulated, logits, options, draw, threads=threads, team=team, staged=staged)
    twice = logits.copy()
    twice[[7, 4001]] = logits.max() + 1
    for draw in range(1, 6):  # half of what two equal ones weigh: the first alone
        options = SamplingOptions(1.0, top_k=2, top_p=0.5)
        the_same(emulated, twice, options, draw, threads=threads, team=team, staged=staged)
    few = np.full(5003, -np.inf, np.float32)
    few[::251] = np.arange(20, dtype=np.float32) / 8  # fewer than are kept
    the_same(emulated, few, SamplingOptions(1.0, top_k=50, top_p=0.9), 1, team=team, staged=staged)


@pytest.mark.parametrize(("threads", "team", "staged"), [(1024, 1, 2), (512, 1, 0), (512, 16, 1)])
def test_few_tokens_that_cannot_be_listed(emulated: Any, threads: int, team: int, staged: int) -> None:
    """Too many are about as good, or one block has most of them: filters of many tokens go on from there."""
    rng = np.random.default_rng(5)
    logits = normal(1)(rng, 1, 5003)[0] - np.float32(30)
    logits[rng.choice(5003, 400, replace=False)] = normal(1e-4)(rng, 1, 400)[0]
    in_order = np.sort(normal(2.5)(rng, 1, 5003)[0])
    for options in (SamplingOptions(1.0, top_k=50), SamplingOptions(1.0, top_k=100, top_p=0.9)):
        the_same(emulated, logits, options, 1, threads=threads, team=team, staged=staged)
        the_same(emulated, in_order, options, 3, threads=threads, team=team, staged=staged)


@pytest.mark.parametrize(
    ("close", "options"),
    [(60, SamplingOptions(1.0, top_k=50, min_p=0.9999)), (60, SamplingOptions(1.0, top_p=0.8, min_p=0.9999)),
     (100, FILTERS[0]), (200, FILTERS[0]), (200, SamplingOptions(1.0, top_k=90)), (300, FILTERS[1]),
     (600, SamplingOptions(1.0, top_k=300, top_p=0.5))],
)  # fmt: skip
def test_neighbours_that_weigh_the_same(emulated: Any, close: int, options: SamplingOptions) -> None:
    """The tokens where the cuts are belong to one block of sixteen: its list is full, or is not."""
    logits = normal(0.3)(np.random.default_rng(close), 1, 10007)[0] - np.float32(30)
    logits[1300 : 1300 + close] = normal(1e-4)(np.random.default_rng(8), 1, close)
    the_same(emulated, logits, options, 1, team=16)
    the_same(emulated, np.sort(logits), options, 4, team=1)


def test_crowded_bins_are_cut_to_the_token(emulated: Any) -> None:
    """More tokens than can be listed, two of each score: a cut is between the two or behind both."""
    rng = np.random.default_rng(12)
    logits = normal(1)(rng, 1, 3001)[0] - np.float32(30)
    logits[rng.choice(3001, 700, replace=False)] = np.repeat(normal(1e-4)(rng, 1, 350)[0], 2)
    for draw, kept in enumerate((1, 2, 3, 6, 7)):
        the_same(emulated, logits, SamplingOptions(1.0, top_k=kept), 3 * draw + 1, team=1)
        options = SamplingOptions(1.0, top_k=650, top_p=(kept - 0.5) / 650)
        the_same(emulated, logits, options, 3 * draw + 2, team=1, staged=False)


@pytest.mark.parametrize(("width", "team"), [(2e-7, 1), (1e-3, 2)])
def test_more_tokens_in_a_bin_than_can_be_sorted(emulated: Any, width: float, team: int) -> None:
    """Many scores so close that bins of scores do not part them, and one far below."""
    logits = normal(width)(np.random.default_rng(7), 1, 4000) + np.float32(3)
    logits[0, 77] = -40
    for draw, options in enumerate([
        SamplingOptions(1.0, top_k=2000), SamplingOptions(1.0, top_p=0.7),
        SamplingOptions(1.0, top_k=2900, top_p=0.5),
    ]):  # fmt: skip
        u = np.array([uniform(SEED, 0, draw)])
        expected = sampling.sample(logits, options, u)
        got, status = choose(emulated, logits, options, team=team, first_draw=draw)
        assert status == [0]
        assert got == expected.tolist() or gap(logits[0], options, u[0], got[0], None) < NEAR


@pytest.mark.parametrize("staged", [0, 2])
def test_all_warps_look_for_the_token_of_one(emulated: Any, staged: int) -> None:
    """Where a warp has 1,024 ids and more."""
    logits = normal(1)(np.random.default_rng(9), 1, 18003)[0]
    for draw, options in enumerate(
        [SamplingOptions(1.0), SamplingOptions(1.0, top_p=0.9), SamplingOptions(3.0)]
    ):
        the_same(emulated, logits, options, draw + 1, staged=staged)


def test_the_cut_does_not_change_the_token(emulated: Any) -> None:
    logits = normal(2)(np.random.default_rng(3), 1, 6001)
    for name in ("plain", "all", "few"):
        cuts = ((512, 1, 0), (1024, 1, 2), (1024, 2, 0), (512, 4, 1), (1024, 8, 2), (512, 16, 1))
        found = {
            choose(emulated, logits, OPTIONS[name], threads=threads, team=team, staged=staged, first_draw=5)[
                0
            ][0]
            for threads, team, staged in cuts
        }
        assert len(found) == 1, (name, found)


@pytest.mark.parametrize(("team", "staged"), [(1, True), (2, False), (2, True)])
def test_rows_without_a_token_say_why(emulated: Any, team: int, staged: bool) -> None:
    logits = normal(1)(np.random.default_rng(1), 5, 3005)
    logits[0] = -np.inf
    logits[1, -1] = np.nan
    logits[2, 2] = np.inf
    logits[3, 700] = -np.float32(np.nan)
    for name in ("greedy", "top-p"):
        tokens, status = choose(emulated, logits, OPTIONS[name], team=team, staged=staged)
        assert status == [2, 1, 1, 1, 0] and tokens[:4] == [-1] * 4 and tokens[4] >= 0
    impossible = SamplingOptions(1.0)
    object.__setattr__(impossible, "top_p", 1.5)  # the host would refuse it
    for options, expected in ((impossible, 3), (OPTIONS["top-k"], 0)):
        _, status = choose(emulated, logits[4:], options, team=team, of_row=True)
        assert status == [expected]
