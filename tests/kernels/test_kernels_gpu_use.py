"""How the CUDA kernels are used, on a GPU: graphs, streams, long texts, whole models, wrong arguments."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from support.makers.kernel_arena import Arena, Layout
from support.makers.kernel_cases import DTYPES, Call, Case, make_call
from support.makers.kernel_engine import Buffers, CudaEngine, Geometry, StatusError, find_library
from support.oracles.kernel_bounds import TOLERANCES, compare, exact, same_bits
from support.paths import GOLDENS, SAMPLE

from dijiang_engines.kernels.attention import Geometry as KernelGeometry
from dijiang_engines.kernels.attention import load_kernels
from dijiang_engines.op_contract import Attributes
from dijiang_engines.validation.tolerances import tolerance
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.reference.attention import Decay
from dijiang_export.reference.model import ReferenceModel

LIBRARY, MISSING = find_library()
pytestmark = [
    pytest.mark.skipif(LIBRARY is None, reason=MISSING),
    pytest.mark.usefixtures("the_gpu_is_kept"),
]


def current_stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


SHAPES = [
    (16, 64, "float16"), (12, 64, "bfloat16"), (32, 80, "float16"), (4, 128, "float32"), (8, 256, "float16"),
    (5, 48, "float16"), (16, 128, "bfloat16"), (8, 64, "float16"),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "d", "dtype"), SHAPES)
@pytest.mark.parametrize("length", [1, 300])
def test_a_captured_graph_replays(engine: CudaEngine, heads: int, d: int, dtype: str, length: int) -> None:
    """Launched from a graph, with other inputs each time, in place: the bits of plain launches."""
    case = Case(heads=heads, d=d, dtype=dtype, length=length, batch=3)
    calls = [make_call(Case(**{**vars(case), "seed": seed}), "cuda") for seed in range(3)]
    plain, captured = (Arena(engine, calls[0], Layout(in_place=True)) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.launch(current_stream())
    captured.buffers["past_state"].copy_(calls[0].past_state)
    for turn, call in enumerate(calls * 3):
        for arena in (plain, captured):
            for name in ("qkv", "gate", "seq_lens", "positions"):
                arena.buffers[name].copy_(getattr(call, name))
        plain.launch(current_stream())
        graph.replay()
        torch.cuda.synchronize()
        pairs = zip(plain.results(), captured.results(), strict=True)
        assert all(same_bits(a, b) for a, b in pairs), f"replay {turn}"


@pytest.mark.parametrize(("heads", "d", "dtype"), SHAPES)
def test_two_streams_at_once(engine: CudaEngine, heads: int, d: int, dtype: str) -> None:
    """Each with its own workspace and sync memory: results do not depend on the other."""
    for lengths in ((1, 1), (1, 200), (500, 500)):
        calls = [
            make_call(Case(heads=heads, d=d, dtype=dtype, length=n, batch=6, seed=i), "cuda")
            for i, n in enumerate(lengths)
        ]
        expected = [Arena(engine, call).run() for call in calls]
        arenas, streams = [Arena(engine, call) for call in calls], [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        for _ in range(100):
            for arena, stream in zip(arenas, streams, strict=True):
                arena.launch(int(stream.cuda_stream))
        torch.cuda.synchronize()
        for arena, pair in zip(arenas, expected, strict=True):
            assert all(same_bits(a, b) for a, b in zip(arena.results(), pair, strict=True)), lengths
            assert "sync" not in arena.buffers or not arena.buffers["sync"].any()


def test_one_sync_serves_calls_of_every_size(engine: CudaEngine) -> None:
    """A runtime sizes workspace and sync once, for its largest call, and uses them for all in turn."""
    largest = make_call(Case(heads=12, length=400, batch=5, dtype="float16"), "cuda")
    sizes = [f(largest) for f in (engine.workspace_size, engine.sync_size)]
    workspace, sync = (torch.zeros(max(n, 1), dtype=torch.uint8, device="cuda") for n in sizes)
    for seed, (length, batch) in enumerate(((400, 5), (1, 2), (64, 5), (1, 5), (399, 1), (1, 1), (400, 5))):
        call = make_call(Case(heads=12, length=length, batch=batch, dtype="float16", seed=seed), "cuda")
        for other in (engine.workspace_size, engine.sync_size):
            assert other(call) <= other(largest)
        arena = Arena(engine, call)
        arena.buffers |= {"workspace": workspace[: sizes[0]], "sync": sync[: sizes[1]]}
        arena.launch()
        torch.cuda.synchronize()
        assert compare(call, *arena.results()).worst <= 1
        assert not sync.any()


STEPS = 100_000
DRIFT = 1e-4
"""Of a state, relative to its head's largest entry, and of outputs, relative to their scale: 100,000 float32
additions err by 2^-24·√100000 = 2e-5 at most, a fade that is half a unit in the last place off by 3e-5 =
512·2^-24 with γ = 511/512, and float32 has no number between 1 - 6e-8 and 1: 1 - 1e-9 errs by 5e-5."""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("d", [64, 80])
def test_drift_over_100_000_steps(engine: CudaEngine, dtype: str, d: int) -> None:
    """Heads with γ = 511/512, 1 - 1e-9, 1 and a fast one, step by step and as one text, against float64."""
    case = Case(heads=4, d=d, dtype=dtype, length=STEPS, rotary=16, past=False, seed=d)
    call = make_call(case, "cuda")
    fades = torch.tensor([math.log(511 / 512), -1e-9, 0.0, -0.05], device="cuda")
    # Values with a mean: the sums of the heads that forget nothing grow as fast as they can.
    call.qkv[..., 2 * 4 * d :] += 0.5
    call = call.with_(log_decay=fades)
    truth, at = exact(call), [0, 1, 99, 999, 9_999, 49_999, STEPS - 1]
    unit = max(TOLERANCES[call.dtype].unit(1), DRIFT)

    first = call.tokens(0, 1)
    arena = Arena(engine, first, Layout(in_place=True))
    outputs = torch.full_like(call.gate, torch.nan)
    positions = torch.arange(STEPS, dtype=torch.int32, device="cuda")
    geometry, buffers = engine.geometry(first), engine.arguments(first, arena.buffers)
    moving = {"qkv": call.qkv[0], "gate": call.gate[0], "output": outputs[0], "positions": positions}
    starts = {k: (v.data_ptr(), v.stride(0) * v.element_size()) for k, v in moving.items()}
    torch.cuda.synchronize()
    for step in range(STEPS):
        for name, (start, stride) in starts.items():
            setattr(buffers, name, start + step * stride)
        engine.launch_raw(geometry, 1, 1, buffers)
    torch.cuda.synchronize()
    results = {"steps": (outputs, arena.results()[1])}
    whole = Arena(engine, call)
    whole.launch()
    torch.cuda.synchronize()
    results["prefill"] = whole.results()
    for name, (output, state) in results.items():
        largest = truth.state.abs().amax((-1, -2), keepdim=True)
        # Steps compute in float32 throughout; a text at once rounds the operands of its products.
        rounded = TOLERANCES[call.dtype].unit(1) * truth.state_scale if name == "prefill" else 0.0
        excess = (state.double() - truth.state).abs() - rounded
        state_error = (excess / largest).flatten(2).amax((0, 2))
        output_error = ((output.double() - truth.output).abs() / truth.output_scale)[0, at].amax(-1)
        print(f"{name} {dtype} d={d}: states {state_error.tolist()}, outputs {output_error.tolist()}")
        assert state_error.max() <= DRIFT, (name, state_error)
        assert output_error.max() <= unit, (name, output_error)


def kernel_op(engine: CudaEngine) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The kernels as the op of a ReferenceModel."""

    def op(*tensors: torch.Tensor, decay: Decay, attributes: Attributes) -> tuple[torch.Tensor, torch.Tensor]:
        dense = [t.detach().contiguous() for t in tensors]
        tables = [None if t is None else t.detach().contiguous() for t in vars(decay).values()]
        arena = Arena(engine, Call(attributes, *dense, *tables))
        arena.launch(current_stream())
        return arena.results()

    return op


@pytest.mark.parametrize("name", ["neox-geometric", "neox-trained-tables", "neox-fp16-d80", "tiny-stdlib"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_models(engine: CudaEngine, dtype: str, name: str) -> None:
    """The golden checkpoints through the kernels: at once, in pieces, in steps; logits against float64."""
    golden = GOLDENS / name if name != "tiny-stdlib" else SAMPLE
    with open_checkpoint(golden) as checkpoint:
        spec = checkpoint.spec
        model = ReferenceModel(spec, dtype=DTYPES[dtype])
        model.load_state_dict(checkpoint.load_state_dict(DTYPES[dtype]))
    oracle = ReferenceModel(spec, dtype=torch.float64)
    oracle.load_state_dict(model.state_dict())
    model, oracle = model.cuda(), oracle.cuda()
    if (golden / "reference.npz").exists():
        ids = torch.from_numpy(np.load(golden / "reference.npz")["input_ids"]).cuda()
    else:
        ids = torch.randint(0, spec.vocab_size, (2, 150), device="cuda")
    expected, ends = oracle(ids)
    bound = tolerance(dtype, "logits").max_error * float(expected.std())
    op, total = kernel_op(engine), ids.shape[1]
    for cuts in ([0, total], [0, total // 2, *range(total // 2 + 1, min(total, total // 2 + 12)), total]):
        states, done, logits = model.new_states(len(ids)), 0, []
        for stop in cuts[1:]:
            start = torch.full((len(ids),), done, device="cuda")
            found, states = model(ids[:, done:stop], start, None, states, op=op)
            logits.append(found)
            done = stop
        error = float((torch.cat(logits, dim=1).double() - expected).abs().max())
        print(f"{name} {dtype}, {len(cuts) - 1} calls: {error / float(expected.std()):.2e} of the spread")
        assert error <= bound
        for got, end in zip(states, ends, strict=True):
            largest = end.abs().amax((-1, -2), keepdim=True)
            assert ((got.double() - end).abs() / largest).max() <= tolerance(dtype, "state").max_error


def changed_geometry(**fields: Any) -> Callable[[Geometry, Buffers], None]:
    def change(geometry: Geometry, _: Buffers) -> None:
        for name, value in fields.items():
            setattr(geometry, name, value)

    return change


def moved(name: str, by: int) -> Callable[[Geometry, Buffers], None]:
    def change(_: Geometry, buffers: Buffers) -> None:
        setattr(buffers, name, getattr(buffers, name) + by)

    return change


def changed_buffer(name: str, value: Any) -> Callable[[Geometry, Buffers], None]:
    return lambda _, buffers: setattr(buffers, name, value)


def onto(name: str, other: str, by: int) -> Callable[[Geometry, Buffers], None]:
    return lambda _, buffers: setattr(buffers, name, getattr(buffers, other) + by)


WRONG: dict[str, Callable[[Geometry, Buffers], None]] = {
    "head size": changed_geometry(head_dim=24),
    "head size too large": changed_geometry(head_dim=272),
    "no heads": changed_geometry(num_heads=0),
    "kv heads": changed_geometry(num_kv_heads=5),
    "odd rotary": changed_geometry(rotary_dim=7),
    "rotary beyond the head": changed_geometry(rotary_dim=66),
    "type": changed_geometry(dtype=3),
    "epsilon": changed_geometry(epsilon=0.0),
    "epsilon not a number": changed_geometry(epsilon=math.nan),
    "negative rows": changed_geometry(table_rows=-1),
    "reserved": changed_geometry(reserved=1),
    "tables without gain": changed_geometry(table_rows=4),
    **{f"no {name}": changed_buffer(name, None) for name in
       ("qkv", "gate", "past_state", "positions", "seq_lens", "proj", "norm_weight", "norm_bias", "inv_freq",
        "log_decay", "output", "present_state")},
    **{f"{name} misaligned": moved(name, 8) for name in
       ("qkv", "gate", "past_state", "proj", "output", "norm_bias")},
    "positions misaligned": moved("positions", 2),
    "state partly in place": onto("present_state", "past_state", 4096),
    "output onto gate": onto("output", "gate", 0),
    "output onto the end of qkv": onto("output", "qkv", 1024),
    "negative stride": changed_buffer("qkv_token_stride", -768),
    "stride of 8 bytes": changed_buffer("gate_token_stride", 260),
    "overlapping tokens": changed_buffer("output_token_stride", 16),
    "huge stride": changed_buffer("past_batch_stride", 2**62),
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_touch_nothing(engine: CudaEngine, name: str, length: int) -> None:
    if name == "overlapping tokens" and length == 1:
        name = "no output"  # one token overlaps nobody
    call = make_call(Case(length=length, batch=2, lens=(length, length), dtype="float16"), "cuda")
    arena = Arena(engine, call)
    before = arena.memory.clone()
    geometry, buffers = engine.geometry(call), engine.arguments(call, arena.buffers)
    WRONG[name](geometry, buffers)
    with pytest.raises(StatusError) as caught:
        engine.launch_raw(geometry, 2, length, buffers)
    assert caught.value.status in (1, 2)
    torch.cuda.synchronize()
    arena.check_unchanged(before, results_too=True)
    arena.run()  # and the library still works


@pytest.mark.parametrize("length", [1, 20, 300])
def test_memory_that_is_too_small_is_refused(engine: CudaEngine, length: int) -> None:
    for heads, d in ((16, 64), (12, 64), (32, 80), (5, 48)):
        call = make_call(Case(heads=heads, d=d, length=length, dtype="float16"), "cuda")
        arena = Arena(engine, call)
        before = arena.memory.clone()
        for name in ("workspace", "sync"):
            if name not in arena.buffers:
                continue
            for change in ({f"{name}_size": arena.buffers[name].numel() - 1}, {name: None}):
                buffers = engine.arguments(call, arena.buffers)
                for field, value in change.items():
                    setattr(buffers, field, value)
                try:
                    engine.launch_raw(engine.geometry(call), 1, length, buffers)
                except StatusError:
                    arena.check_unchanged(before, results_too=True)
                    continue
                # The size is for every call up to this one, which itself may need less: it must be right.
                torch.cuda.synchronize()
                assert compare(call, *arena.results()).worst <= 1
                arena.check_unchanged(before)
                arena = Arena(engine, call)
                before = arena.memory.clone()
    arena = Arena(engine, make_call(Case(length=300, dtype="float32"), "cuda"))
    arena.buffers.pop("workspace")
    with pytest.raises(StatusError):
        arena.launch()


def test_sizes_of_the_call_are_checked(engine: CudaEngine) -> None:
    call = make_call(Case(dtype="float16"), "cuda")
    arena = Arena(engine, call)
    geometry, buffers = engine.geometry(call), engine.arguments(call, arena.buffers)
    for batch, length in ((-1, 1), (1, -1), (70_000, 1), (1, 2**21), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(StatusError):
            engine.launch_raw(geometry, batch, length, buffers)
    with pytest.raises((StatusError, ctypes.ArgumentError)):
        engine.launch_raw(geometry, 1, 1, None)
    before = arena.memory.clone()
    engine.launch_raw(geometry, 0, 1, buffers)
    torch.cuda.synchronize()
    arena.check_unchanged(before, results_too=True)


@pytest.mark.parametrize("layout", [Layout(), Layout(token_gap=16, batch_gap=48), Layout(in_place=True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "length"), [("official", 1), ("trained", 1), ("trained", 90)])
def test_the_binding_makes_the_same_call(
    engine: CudaEngine, decay: Any, length: int, dtype: Any, layout: Layout
) -> None:
    call = make_call(Case(heads=6, kv_heads=3, dtype=dtype, length=length, batch=3, decay=decay), "cuda")
    expected = Arena(engine, call, layout).run()
    kernels, g = load_kernels(engine.path), call.geometry
    geometry = KernelGeometry(**asdict(g), dtype=dtype, table_rows=call.table_rows)
    assert kernels.workspace_size(geometry, 3, length) == engine.workspace_size(call)
    assert kernels.sync_size(geometry, 3, length) == engine.sync_size(call)
    arena, stream = Arena(engine, call, layout), torch.cuda.Stream()
    before = arena.memory.clone()
    torch.cuda.synchronize()
    kernels.attention_tensors(geometry, **arena.buffers, stream=int(stream.cuda_stream))
    torch.cuda.synchronize()
    arena.check_unchanged(before)
    assert all(same_bits(a, b) for a, b in zip(arena.results(), expected, strict=True))
