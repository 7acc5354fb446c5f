"""The sampling kernel on a CPU, on emulated threads of blocks and of clusters, against sampling.py."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from support.linear_emulator import compiled
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
    team: int = 1,
    staged: bool = True,
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
    emulated.emulate_sample(ctypes.byref(given), ctypes.byref(buffers), team, int(staged), int(backwards))
    return tokens.tolist(), status.tolist()


FEW = ["greedy", "plain", "top-k", "top-p", "all", "few"]


@pytest.mark.parametrize(
    ("vocabulary", "team", "staged", "backwards", "kinds", "names"),
    [
        (7, 1, True, False, ["normal"], OPTIONS), (2049, 1, True, True, KINDS, FEW),
        (3001, 1, False, False, ["ties", "zeros"], FEW),
        (2500, 2, True, False, ["wide", "sparse", "equal"], FEW),
        (4100, 2, False, True, ["normal"], ["large top-k", "min-p", "top-k 1"]),
        (9001, 8, True, True, ["wide"], ["all", "few"]),
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


def test_the_cut_does_not_change_the_token(emulated: Any) -> None:
    logits = normal(2)(np.random.default_rng(3), 1, 6001)
    for name in ("plain", "all", "few"):
        cuts = ((1, False), (1, True), (2, False), (4, True), (8, True))
        found = {
            choose(emulated, logits, OPTIONS[name], team=team, staged=staged, first_draw=5)[0][0]
            for team, staged in cuts
        }
        assert len(found) == 1, (name, found)


@pytest.mark.parametrize("team", [1, 2])
def test_rows_without_a_token_say_why(emulated: Any, team: int) -> None:
    logits = normal(1)(np.random.default_rng(1), 4, 3005)
    logits[0] = -np.inf
    logits[1, -1] = np.nan
    logits[2, 2] = np.inf
    for name in ("greedy", "top-p"):
        tokens, status = choose(emulated, logits, OPTIONS[name], team=team)
        assert status == [2, 1, 1, 0] and tokens[:3] == [-1] * 3 and tokens[3] >= 0
    impossible = SamplingOptions(1.0)
    object.__setattr__(impossible, "top_p", 1.5)  # the host would refuse it
    for options, expected in ((impossible, 3), (OPTIONS["top-k"], 0)):
        _, status = choose(emulated, logits[3:], options, team=team, of_row=True)
        assert status == [expected]
