"""The CUDA kernels against the float64 reference, in hostile memory (kernel_arena.py), on a GPU.

DIJIANG_KERNELS names the library; else the one that `dijiang-export build-plugin` made. Skipped, with the
reason, where there is no GPU or no library. docs/evidence/kernel-tests-h200.txt is the record of a run.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.makers.kernel_arena import Arena, Layout
from support.makers.kernel_cases import DTYPES, Case, make_call
from support.makers.kernel_engine import CudaEngine, find_library
from support.makers.kernel_strategies import cases
from support.oracles.kernel_bounds import compare, exact, same_bits

LIBRARY, MISSING = find_library()
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason=MISSING),
    pytest.mark.usefixtures("the_gpu_is_kept"),
]

LENGTHS = (1, 2, 63, 64, 65, 349, 350, 2048)
SIZES = tuple(range(16, 257, 16))
DENSE, IN_PLACE = Layout(), Layout(in_place=True)
GAPS = Layout(token_gap=24, batch_gap=40)
TIME_FIRST = Layout(token_gap=8, batch_gap=16, time_major=True, in_place=True)


def stream_number(stream: Any) -> int:
    return int(stream.cuda_stream)


def check(engine: CudaEngine, case: Case, layout: Layout = DENSE) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one case on a stream of its own and compare everything."""
    call = make_call(case, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    arena = Arena(engine, call, layout)
    torch.cuda.synchronize()
    output, state = arena.run(stream_number(stream))
    errors = compare(call, output, state)
    family = " ".join(engine.plan(call).split()[:2])
    print(f"bounds: {family} {case.dtype} output {errors.output:.3f} state {errors.state:.3f}")
    if errors.worst > 1:
        raise AssertionError(f"{case}, {layout}, plan '{engine.plan(call)}': {errors.where}")
    return output, state


def varied(d: int, dtype: str, length: int, batch: int) -> Case:
    """Heads, rotary share, decay, magnitude and position that change from case to case, so that the whole of
    sizes, types, lengths and batches covers them all."""
    turn = d // 16 + 3 * LENGTHS.index(length) + 5 * list(DTYPES).index(dtype) + 7 * (batch > 1)
    heads, kv_heads = ((4, 4), (6, 2), (8, 8), (5, 5), (3, 1), (16, 16), (7, 7))[turn % 7]
    if length > 1000 or d > 128:
        heads, kv_heads = ((2, 2), (4, 2), (8, 8))[turn % 3]
    rotary = (d // 4 // 2 * 2, d, 0, 2, 6, d // 2 + 2)[turn % 6]
    decay = ("official", "trained", "mixed", "official", "trained", "none", "single-row", "slowest")[turn % 8]
    magnitude = ("usual", "peaked", "large-v", "usual", "small")[turn % 5]
    if decay == "trained" and turn % 3 == 0:
        magnitude = "huge-read"
    position = (0, 11, 290, 0, 999_990)[(turn // 2) % 5]
    lens = None if batch > 1 else (length,)
    return Case(
        heads=heads, kv_heads=kv_heads, d=d, dtype=dtype, length=length, batch=batch, rotary=rotary,
        decay=decay, magnitude=magnitude, position=position, lens=lens, past=turn % 4 != 0, seed=turn,
    )  # fmt: skip


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_size_type_and_length(engine: CudaEngine, dtype: str, d: int) -> None:
    wrong = []
    for length in LENGTHS:
        for batch in (1, 3):
            case = varied(d, dtype, length, batch)
            layout = (DENSE, IN_PLACE, GAPS, TIME_FIRST)[(case.seed + batch) % 4]
            try:
                check(engine, case, layout)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} of {2 * len(LENGTHS)} calls:\n" + "\n".join(wrong)


STRADDLING = [
    (12, 64),
    (32, 80),
    (13, 16),
    (40, 128),
    (5, 48),
    (6, 16),
    (1, 64),
    (1, 256),
    (3, 256),
    (71, 64),
]


@pytest.mark.parametrize(("heads", "d"), STRADDLING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_that_straddle_heads(engine: CudaEngine, dtype: str, heads: int, d: int) -> None:
    for length, batch in ((1, 3), (1, 33), (70, 3), (300, 1)):
        for magnitude in ("usual", "huge-read"):
            case = Case(
                heads=heads, d=d, dtype=dtype, length=length, batch=batch, rotary=d // 4 // 2 * 2,
                decay="trained" if magnitude == "huge-read" else "official", magnitude=magnitude,
                lens=None if batch > 1 else (length,), seed=heads + length,
            )  # fmt: skip
            check(engine, case, GAPS if batch == 3 else DENSE)


@given(case=cases())
@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False
)
def test_any_call(case: Case) -> None:
    assert LIBRARY is not None
    layout = (DENSE, IN_PLACE, GAPS, TIME_FIRST)[case.seed % 4]
    check(CudaEngine(LIBRARY), case, layout)


MODELS = {
    "pythia-410m": Case(heads=16, d=64, rotary=16),
    "pythia-160m": Case(heads=12, d=64, rotary=16),
    "pythia-2.8b": Case(heads=32, d=80, rotary=20),
    "pythia-1b": Case(heads=8, d=256, rotary=64),
    "pythia-6.9b": Case(heads=32, d=128, rotary=32),
    "tinyllama": Case(heads=32, kv_heads=4, d=64, rotary=64),
    "pythia-410m, trained": Case(heads=16, d=64, rotary=16, decay="trained", rows=2048),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_models(engine: CudaEngine, dtype: str, name: str) -> None:
    """Also at batches that fill the GPU, where work is cut otherwise, and lengths of several segments."""
    for length, batch in ((1, 1), (1, 8), (1, 64), (128, 5), (512, 1), (1500, 2)):
        lens = (length,) * batch if length == 1 else None
        check(engine, replace(MODELS[name], dtype=dtype, length=length, batch=batch, lens=lens, seed=batch))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "batch"),
    [
        (16, 16, 64, 5),
        (16, 16, 64, 200),
        (32, 4, 64, 100),
        (12, 12, 64, 270),
        (12, 6, 80, 60),
        (32, 32, 128, 26),
        (8, 2, 128, 9),
        (8, 8, 256, 9),
        (8, 8, 256, 51),
    ],
)
def test_many_states(engine: CudaEngine, dtype: str, heads: int, kv_heads: int, d: int, batch: int) -> None:
    """A block a head; and several steps in a graph give what they give one by one."""
    lens = tuple(int(i % 7 != 3) for i in range(batch))
    case = Case(
        heads=heads, kv_heads=kv_heads, d=d, dtype=dtype, batch=batch, lens=lens, rotary=d // 2,
        decay="trained" if heads < 32 else "official", position=290, seed=batch,
    )  # fmt: skip
    call = make_call(case, "cuda")
    if torch.cuda.get_device_capability()[0] == 9:
        assert engine.plan(call).startswith("decode heads"), engine.plan(call)
    for layout in (DENSE, IN_PLACE, GAPS):
        check(engine, case, layout)
    one_by_one, arena = Arena(engine, call, IN_PLACE), Arena(engine, call, IN_PLACE)
    for _ in range(6):
        one_by_one.launch()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(6):
            arena.launch(stream_number(torch.cuda.current_stream()))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(arena.results(), one_by_one.results(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [2**24 - 1200, 2**20, 1_000_000])
def test_far_positions(engine: CudaEngine, dtype: str, position: int) -> None:
    for length in (1, 200):
        case = Case(
            heads=8, d=64, rotary=64, dtype=dtype, length=length, batch=3, position=position, past=False
        )
        check(engine, case)


def test_lengths_outside_the_range_are_clamped(engine: CudaEngine) -> None:
    for length in (1, 70):
        call = make_call(Case(length=length, batch=4, lens=(length, 0, length, 0), dtype="float16"), "cuda")
        wild = torch.tensor([length + 5, -3, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
        output, state = Arena(engine, call.with_(seq_lens=wild)).run()
        assert compare(call, output, state).worst <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "d"),
    [(12, 64), (12, 80), (12, 128), (12, 256), (12, 48), (16, 64), (32, 80), (8, 128), (8, 256), (16, 256)],
)
def test_the_same_bits_every_time_and_everywhere(engine: CudaEngine, dtype: str, heads: int, d: int) -> None:
    """20 runs, in place or not, dense or strided, on any stream: the same call gives the same bits."""
    for length, batch in ((1, 3), (1, 40), (350, 5)):
        lens = None if length > 1 else (1, 0) + (1,) * (batch - 2)
        call = make_call(Case(heads=heads, d=d, dtype=dtype, length=length, batch=batch, lens=lens), "cuda")
        expected = Arena(engine, call).run()
        for layout in (DENSE, IN_PLACE, GAPS, TIME_FIRST):
            got = Arena(engine, call, layout).run(stream_number(torch.cuda.Stream()))
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), layout
        arena = Arena(engine, call)
        for turn in range(20):
            arena.launch()
            got = arena.results()
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), f"run {turn}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "d"), [(16, 64), (12, 64), (32, 80), (4, 128), (16, 128), (8, 256), (5, 48)]
)
def test_rows_do_not_know_their_neighbours(engine: CudaEngine, dtype: str, heads: int, d: int) -> None:
    """A row alone, and among others full of huge numbers, stays within its bounds; so does its state."""
    for length in (1, 130):
        lens = (length, length, max(length // 2, 1), length)
        case = Case(heads=heads, d=d, dtype=dtype, length=length, batch=4, lens=lens, decay="trained")
        call = make_call(case, "cuda")
        loud = call.with_(qkv=call.qkv.clone(), past_state=call.past_state.clone())
        loud.qkv[[0, 1, 3]] = torch.finfo(call.dtype).max
        loud.past_state[[0, 1, 3]] = 1e30
        alone = call.rows([2])
        truth = exact(alone)
        for among in (call, loud):
            output, state = Arena(engine, among).run()
            assert compare(alone, output[2:3], state[2:3], truth).worst <= 1
        assert compare(alone, *Arena(engine, alone).run(), truth).worst <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "d"), [(16, 64), (12, 64), (4, 80), (4, 128), (8, 128), (2, 256), (8, 256), (5, 48)]
)
def test_pieces_and_steps_give_the_whole(engine: CudaEngine, dtype: str, heads: int, d: int) -> None:
    """A text at once, in pieces with the state carried in place, and token by token."""
    for decay in ("official", "trained"):
        case = Case(
            heads=heads, d=d, dtype=dtype, length=150, batch=3, lens=(150, 0, 97), decay=decay, past=False
        )
        call = make_call(case, "cuda")
        truth = exact(call)
        for cuts in ([0, 150], [0, 1, 64, 65, 128, 150], list(range(151))):
            state, outputs = call.past_state.clone(), []
            for start, stop in itertools.pairwise(cuts):
                piece = call.tokens(start, stop).with_(past_state=state)
                arena = Arena(engine, piece, IN_PLACE)
                arena.launch()
                output, state = arena.results()
                outputs.append(output)
            errors = compare(call, torch.cat(outputs, dim=1), state, truth, steps=len(cuts) - 1)
            assert errors.worst <= 1, (decay, len(cuts) - 1, errors)
