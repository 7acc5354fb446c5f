"""The sampling kernels on a GPU against sampling.py: the same tokens, and errors instead of wrong ones.

Skipped, with the reason, without a GPU or without the compiled kernels.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.oracles import integer_sampling
from support.sampling_cases import KINDS, NEAR, OPTIONS, SEED, bitmask, gap, normal

from dijiang_engines import sampling
from dijiang_engines.errors import KernelError, PluginError
from dijiang_engines.kernels.attention import Kernels, load_kernels
from dijiang_engines.sampling import SamplingOptions, uniform

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return load_kernels()
    except PluginError as error:
        if os.environ.get("DIJIANG_KERNELS"):
            raise
        pytest.skip(f"no compiled kernels: {error.what}")


def cuda(array: npt.NDArray[Any]) -> Any:
    signed = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}.get(array.dtype)
    return torch.from_numpy(np.ascontiguousarray(array if signed is None else array.view(signed))).cuda()


def on_device(
    kernels: Kernels,
    logits: Any,
    options: SamplingOptions,
    *,
    dtype: Any = None,
    seed: int = SEED,
    first_draw: int = 0,
    **arrays: Any,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Tokens and row status; row r draws number first_draw + r of stream r. Outputs start as garbage."""
    batch = logits.shape[0]
    tokens = torch.full((batch,), -77, dtype=dtype or torch.int64, device="cuda")
    status = torch.full((batch,), -77, dtype=torch.int32, device="cuda")
    draws = torch.arange(first_draw, first_draw + batch, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    kernels.sample(options, logits=logits, tokens=tokens, row_status=status, seed=seed, draws=draws,
                   stream=stream.cuda_stream, **arrays)  # fmt: skip
    stream.synchronize()
    return tokens.cpu().numpy().astype(np.int64), status.cpu().numpy()


@pytest.mark.parametrize("vocabulary", [1, 7, 33, 2049, 16385, 50304, 256000])
def test_same_tokens_as_on_the_host(kernels: Kernels, vocabulary: int) -> None:
    different = checked = 0
    for number, (kind, make) in enumerate(KINDS.items()):
        rng = np.random.default_rng([vocabulary, number])
        batch = 2 if vocabulary > 100_000 else 5
        logits = make(rng, batch, vocabulary)
        seen = rng.random(logits.shape) < 0.1
        banned = (
            rng.choice(vocabulary, vocabulary // 5, replace=False) if kind != "sparse" else np.zeros(0, int)
        )
        allowed = np.ones(vocabulary, np.bool_)
        allowed[banned] = False
        poisoned = logits.copy()
        poisoned[:, banned] = np.nan  # what may not be chosen is not looked at
        device, mask, marks = cuda(poisoned), cuda(bitmask(allowed)), cuda(bitmask(seen))
        for name, options in OPTIONS.items():
            draw = 1000 * number + len(name)
            uniforms = np.array([uniform(SEED, row, draw + row) for row in range(batch)])
            expected = sampling.sample(logits, options, uniforms, seen=seen, banned=banned)
            dtype = torch.int32 if number % 2 else torch.int64
            got, status = on_device(
                kernels, device, options, dtype=dtype, first_draw=draw, allowed=mask, seen=marks
            )
            assert (status == 0).all(), (kind, name)
            checked += batch
            for row in np.flatnonzero(got != expected):
                different += 1
                assert not options.greedy, (kind, name, row, got[row], expected[row])
                scores = logits[row].copy()
                scores[banned] = -np.inf
                applies = seen[row] if options.repetition_penalty != 1 else None
                distance = gap(scores, options, uniforms[row], int(got[row]), applies)
                assert distance < NEAR, (kind, name, row, got[row], expected[row], distance)
    print(f"\nV={vocabulary}: {checked} rows, {different} differ by rounding")
    assert different <= checked / 100


def test_random_numbers_are_those_of_the_host(kernels: Kernels) -> None:
    """At an enormous temperature all tokens weigh the same, so that the token is floor(u V)."""
    vocabulary, batch = 1 << 18, 16
    logits = cuda(normal(1)(np.random.default_rng(0), batch, vocabulary))
    streams = np.arange(batch, dtype=np.uint64) * 0x1234567890ABCDEF
    draws = np.array([0, 1, 2**40, *range(100, 113)], np.int64)
    for seed in (0, 1, SEED, -1):
        tokens = torch.empty(batch, dtype=torch.int64, device="cuda")
        status = torch.empty(batch, dtype=torch.int32, device="cuda")
        kernels.sample(SamplingOptions(1e30), logits=logits, tokens=tokens, row_status=status, seed=seed,
                       streams=cuda(streams), draws=cuda(draws))  # fmt: skip
        expected = [
            int(uniform(seed, int(stream), int(draw)) * vocabulary)
            for stream, draw in zip(streams, draws, strict=True)
        ]
        assert tokens.tolist() == expected


def test_rows_without_a_token_say_why(kernels: Kernels) -> None:
    for vocabulary in (5, 50304):
        logits = normal(1)(np.random.default_rng(1), 6, vocabulary)
        logits[0] = -np.inf
        logits[1, vocabulary - 1] = np.nan
        logits[2, 2] = np.inf
        logits[3, 3] = np.nan  # not allowed below
        allowed = np.ones(logits.shape, np.bool_)
        allowed[3, 3] = False
        allowed[4] = False
        for options in (OPTIONS["greedy"], OPTIONS["top-p"]):
            tokens, status = on_device(kernels, cuda(logits), options, allowed=cuda(bitmask(allowed)))
            assert status.tolist() == [2, 1, 1, 0, 2, 0]
            assert tokens[[0, 1, 2, 4]].tolist() == [-1] * 4
            assert (tokens[[3, 5]] >= 0).all()


def test_options_of_each_row(kernels: Kernels) -> None:
    fields = [("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("repetition_penalty", "f8"),
              ("seed", "u8"), ("top_k", "i4"), ("reserved", "i4")]  # fmt: skip
    rows = np.array(
        [(0.0, 1, 0, 1, 5, 0, 0), (0.8, 0.9, 0, 1, 6, 0, 0), (1.0, 1, 0, 1, 7, 3, 0),
         (1.0, 1.5, 0, 1, 8, 0, 0), (np.nan, 1, 0, 1, 9, 0, 0)], dtype=fields,
    )  # fmt: skip
    logits = normal(3)(np.random.default_rng(2), 5, 3000)
    device = torch.from_numpy(rows.view(np.uint8)).cuda()
    tokens, status = on_device(kernels, cuda(logits), SamplingOptions(), row_options=device)
    assert status.tolist() == [0, 0, 0, 3, 3]
    assert tokens[3:].tolist() == [-1, -1]
    for row in range(3):
        one = rows[row]
        options = SamplingOptions(float(one["temperature"]), int(one["top_k"]), float(one["top_p"]))
        u = np.array([uniform(int(one["seed"]), row, row)])
        assert tokens[row] == sampling.sample(logits[row : row + 1], options, u)[0]


def test_the_cut_does_not_change_the_token(kernels: Kernels) -> None:
    """One row over eight blocks, and the same row among many over one block: integers add up to the same."""
    row = normal(2)(np.random.default_rng(3), 1, 60001)
    padded = torch.full((140, 60010), float("nan"), device="cuda")
    many = padded[:, 3:60004]  # strides, and rows that are not aligned to 16 bytes
    many[:] = cuda(row)
    for name in ("plain", "top-p", "large top-k", "all", "greedy"):
        options = replace(OPTIONS[name], repetition_penalty=1.0)
        draws = torch.full((140,), 5, dtype=torch.int64, device="cuda")
        streams = torch.full((140,), 9, dtype=torch.int64, device="cuda")
        results = []
        for logits in (cuda(row), many):
            tokens = torch.empty(logits.shape[0], dtype=torch.int32, device="cuda")
            status = torch.empty_like(tokens)
            kernels.sample(options, logits=logits, tokens=tokens, row_status=status, seed=3,
                           streams=streams[: len(tokens)], draws=draws[: len(tokens)])  # fmt: skip
            assert not status.any()
            results.append(tokens.unique().tolist())
        assert results[0] == results[1] and len(results[0]) == 1, name


@pytest.mark.parametrize("vocabulary", [5000, 50304, 256000])
def test_the_number_of_rows_does_not_change_the_token(kernels: Kernels, vocabulary: int) -> None:
    """By how many rows there are, a row has one to sixteen blocks: exactly the tokens of one."""
    row = cuda(normal(2.5)(np.random.default_rng(vocabulary), 1, vocabulary))
    fewer = {1, 2, 8, 9, 16, 17, 33, 66, 67, 132, 133}
    for name in ("plain", "top-k", "top-p", "large top-k", "min-p", "all", "few", "high top-p"):
        options = replace(OPTIONS[name], repetition_penalty=1.0)
        for draw in range(3):
            found = {}
            for batch in fewer | {256}:
                streams = torch.full((batch,), 9, dtype=torch.int64, device="cuda")
                draws = torch.full((batch,), draw, dtype=torch.int64, device="cuda")
                tokens = torch.full((batch,), -77, dtype=torch.int64, device="cuda")
                status = torch.full((batch,), -77, dtype=torch.int32, device="cuda")
                kernels.sample(options, logits=row.expand(batch, vocabulary).contiguous(), tokens=tokens,
                               row_status=status, seed=3, streams=streams, draws=draws)  # fmt: skip
                assert not status.any()
                found[batch] = set(tokens.tolist())
            assert all(tokens == found[256] and len(tokens) == 1 for tokens in found.values()), (name, found)


def test_tokens_are_those_of_exact_integers(kernels: Kernels) -> None:
    """Nearly all: the oracle's exponentials are the C library's, not the GPU's to the last bit."""
    different = checked = 0
    for vocabulary in (1, 100, 3001, 50304):
        for kind in ("normal", "wide", "ties", "zeros", "equal"):
            logits = KINDS[kind](np.random.default_rng([vocabulary, 1]), 2, vocabulary)
            for name in ("plain", "top-p", "all", "few", "large top-k"):
                got, status = on_device(kernels, cuda(logits), replace(OPTIONS[name], repetition_penalty=1.0))
                assert not status.any()
                for row in range(2):
                    options = replace(OPTIONS[name], repetition_penalty=1.0)
                    expected = integer_sampling.choose(logits[row], options, uniform(SEED, row, row))
                    checked += 1
                    different += int(got[row] != expected)
    assert different <= checked / 50


def test_distribution(kernels: Kernels) -> None:
    """Frequencies of 60,000 draws against the probabilities: Pearson's chi-squared, 99 degrees of freedom."""
    count, vocabulary = 60_000, 100
    row = normal(1)(np.random.default_rng(4), 1, vocabulary)
    logits = cuda(row).expand(count, vocabulary).contiguous()
    tokens, status = on_device(kernels, logits, SamplingOptions(1.0))
    assert not status.any()
    probability = np.exp(row[0].astype(np.float64))
    probability /= probability.sum()
    expected = count * probability
    statistic = (((np.bincount(tokens, minlength=vocabulary) - expected) ** 2) / expected).sum()
    print(f"\nchi-squared {statistic:.1f}")
    assert 50 < statistic < 160  # 0.01% below and above


def test_advance(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    batch, vocabulary, most = 300, 1000, 4
    for dtype in (np.int32, np.int64):
        state: dict[str, Any] = {
            "positions": rng.integers(0, 1000, batch).astype(dtype),
            "seq_lens": rng.integers(0, 9, batch).astype(dtype),
            "draws": rng.integers(0, 1000, batch).astype(np.int64),
            "input_ids": np.full((batch, 1), -9, dtype),
            "history": np.full((batch, most), -9, dtype),
            "history_lens": rng.integers(0, most, batch).astype(np.int32),
            "seen": bitmask(rng.random((batch, vocabulary)) < 0.01),
            "finished": (rng.random(batch) < 0.1).astype(np.int32),
        }
        stops = np.array([7, 8], np.int32)
        device = {name: cuda(value) for name, value in state.items()}
        active = torch.full((1,), -1, dtype=torch.int32, device="cuda")
        for _ in range(5):
            tokens = rng.integers(0, 12, batch).astype(dtype)
            status = (rng.random(batch) < 0.05).astype(np.int32)
            tokens[status > 0] = -1
            kernels.advance(tokens=cuda(tokens), vocabulary=vocabulary, row_status=cuda(status), pad_id=3,
                            stop_ids=cuda(stops), active=active, **device)  # fmt: skip
            for row in range(batch):
                goes_on = not state["finished"][row] and not status[row]
                if goes_on:
                    state["history"][row, state["history_lens"][row]] = tokens[row]
                    state["history_lens"][row] += 1
                    state["draws"][row] += 1
                    state["seen"][row, tokens[row] // 32] |= np.uint32(1 << int(tokens[row] % 32))
                    goes_on = tokens[row] not in stops and state["history_lens"][row] < most
                state["positions"][row] += state["seq_lens"][row]
                state["seq_lens"][row] = goes_on
                state["input_ids"][row] = tokens[row] if goes_on else 3
                state["finished"][row] = not goes_on
            for name, value in state.items():
                got = device[name].cpu().numpy()
                np.testing.assert_array_equal(got.view(value.dtype), value, err_msg=name)
            assert active.item() == (state["finished"] == 0).sum()


def test_a_loop_in_a_graph(kernels: Kernels) -> None:
    """sample and advance, captured once and launched again, walk a table of logits as the host does."""
    vocabulary, batch, most = 500, 3, 12
    table = normal(2)(np.random.default_rng(6), vocabulary, vocabulary)  # row t: logits after token t
    options, seed = SamplingOptions(0.9, top_k=40, top_p=0.95), 11
    weights = cuda(table)
    ids = torch.tensor([[1], [2], [3]], device="cuda")
    logits = torch.empty(batch, vocabulary, device="cuda")
    status = torch.empty(batch, dtype=torch.int32, device="cuda")
    draws = torch.ones(batch, dtype=torch.int64, device="cuda")
    history = torch.full((batch, most), -1, dtype=torch.int64, device="cuda")
    lens, finished = (torch.zeros(batch, dtype=torch.int32, device="cuda") for _ in range(2))
    tokens = torch.empty(batch, dtype=torch.int64, device="cuda")

    def step() -> None:
        logits.copy_(weights[ids[:, 0]])
        stream = torch.cuda.current_stream().cuda_stream
        kernels.sample(options, logits=logits, tokens=tokens, row_status=status, seed=seed, draws=draws,
                       stream=stream)  # fmt: skip
        kernels.advance(tokens=tokens, vocabulary=vocabulary, row_status=status, draws=draws, input_ids=ids,
                        history=history, history_lens=lens, finished=finished, stream=stream)  # fmt: skip

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(most + 3):
        graph.replay()
    torch.cuda.synchronize()
    for row in range(batch):
        text = [row + 1]
        for _ in range(most):
            u = np.array([uniform(seed, row, len(text))])
            text.append(int(sampling.sample(table[text[-1]][None], options, u)[0]))
        assert history[row].tolist() == text[1:]
    assert finished.tolist() == [1, 1, 1]


def test_wrong_arrays_are_refused(kernels: Kernels) -> None:
    logits = torch.zeros(2, 40, device="cuda")
    tokens = torch.zeros(2, dtype=torch.int64, device="cuda")
    status = torch.zeros(2, dtype=torch.int32, device="cuda")
    good: dict[str, Any] = {"logits": logits, "tokens": tokens, "row_status": status}
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("logits has the wrong type", {"logits": logits.half()}),
        ("logits is not dense", {"logits": torch.zeros(40, 2, device="cuda").T}),
        ("logits is not in GPU memory", {"logits": logits.cpu()}),
        ("tokens has the wrong shape", {"tokens": tokens[:1]}),
        ("allowed has the wrong shape", {"allowed": torch.zeros(1, dtype=torch.int32, device="cuda")}),
        ("row_status overlaps tokens", {"row_status": tokens.view(torch.int32)[:2]}),
    ]
    for message, change in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.sample(SamplingOptions(), **{**good, **change})
    with pytest.raises(KernelError, match="draws is missing"):
        kernels.sample(SamplingOptions(1.0), **good)


def test_times(kernels: Kernels) -> None:
    """No bound, only a record: microseconds per call, CUDA graphs of 20 calls, best of 5."""
    lines = []
    for vocabulary in (50304, 256000):
        for batch in (1, 8, 64, 256):
            logits = 2.5 * torch.randn(batch, vocabulary, device="cuda")
            tokens = torch.empty(batch, dtype=torch.int64, device="cuda")
            status = torch.empty(batch, dtype=torch.int32, device="cuda")
            draws = torch.zeros(batch, dtype=torch.int64, device="cuda")
            times = []
            for name in ("greedy", "plain", "top-k", "top-p", "all"):
                options = replace(OPTIONS[name], repetition_penalty=1.0)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(20):
                        kernels.sample(options, logits=logits, tokens=tokens, row_status=status, draws=draws,
                                       stream=torch.cuda.current_stream().cuda_stream)  # fmt: skip
                best = float("inf")
                for _ in range(5):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    best = min(best, 1000 * start.elapsed_time(end) / 20)
                assert not status.any()
                times.append(f"{name} {best:7.1f}")
            lines.append(f"V={vocabulary:6} B={batch:3} us: " + "  ".join(times))
    print("\n" + torch.cuda.get_device_name() + "\n" + "\n".join(lines))
