"""The tests of the kernels, tested without them: tolerances let rounding pass and mistakes fail, and the
arena sees what is written where it must not be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.makers.kernel_arena import Arena, Layout, StandIn
from support.makers.kernel_cases import DTYPES, Call, Case, make_call
from support.makers.kernel_mutants import MUTANTS, correct
from support.makers.kernel_strategies import cases
from support.oracles import kernel_bounds
from support.oracles.kernel_bounds import TOLERANCES, Exact, compare, exact, run_reference, same_bits, widened
from support.oracles.kernel_emulation import emulate, emulate_state

BASES = {
    "geometric": Case(heads=4, kv_heads=2, d=32, length=70, batch=3, rotary=10, position=5, seed=3),
    "tables": Case(heads=6, kv_heads=3, d=32, length=70, batch=3, rotary=10, position=5, decay="trained",
                   rows=60, seed=3),
    "step": Case(heads=4, d=48, length=1, batch=3, lens=(1, 0, 1), rotary=8, decay="trained", position=40),
    "far": Case(heads=4, d=32, length=8, rotary=32, position=10**6, past=False),
    "small": Case(heads=4, d=32, length=20, magnitude="small"),
}  # fmt: skip

ONLY = {
    "no gain": ["tables"], "gain without sign": ["tables"], "no read_scale": ["tables"],
    "one row fewer in the tables": ["tables"], "kv heads interleaved": ["geometric", "tables"],
    "log_decay 1% off": ["geometric"], "angles in float32": ["far"], "epsilon 10 times larger": ["small"],
    "no fade where a chunk begins": ["geometric"], "reads before it writes": ["geometric", "tables"],
    "one token more": ["geometric", "tables"], "padding written to the state": ["geometric", "tables"],
    "output on padding": ["geometric", "tables", "step"], "unbiased variance": ["geometric", "tables"],
    "past state ignored": ["geometric", "tables", "step"], "state kept in T": ["step"],
    "past state transposed": ["geometric", "tables", "step"], "no fade": ["geometric", "tables"],
    "decay of the neighbouring head": ["geometric", "tables"],
    "a stale tile": ["geometric", "tables", "step"],
    "neighbouring batch rows' states swapped": ["geometric", "tables", "step"],
    "positions off by one": ["geometric", "tables", "step", "far"], "positions ignored": ["tables", "far"],
}  # fmt: skip
"""Where a mistake shows at all; the others must fail everywhere."""

BLIND = {
    ("log_decay 1% off", "bfloat16"), ("log_decay 1% off", "float16"), ("angles in float32", "bfloat16"),
    ("angles in float32", "float16"), ("unbiased variance", "bfloat16"),
}  # fmt: skip
"""Mistakes that change a result by less than rounded operands do; float32 sees them all."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES)
def test_the_reference_and_rounded_arithmetic_pass(base: str, dtype: str) -> None:
    call = make_call(replace(BASES[base], dtype=dtype))
    truth = exact(call)
    assert compare(call, *correct(call), truth).worst < 0.5
    assert compare(call, *emulate(call), truth).worst < 0.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_do_not_pass(name: str, dtype: str) -> None:
    if (name, dtype) in BLIND:
        pytest.skip("smaller than what rounding to this type does")
    for base in ONLY.get(name, BASES):
        call = make_call(replace(BASES[base], dtype=dtype))
        errors = compare(call, *MUTANTS[name](call))
        assert errors.worst > 1.5, (base, errors)


@given(case=cases(longest=100, widest=48))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rounded_arithmetic_passes_for_any_call(case: Case) -> None:
    call = make_call(case)
    truth = exact(call)
    errors = compare(call, *emulate(call), truth)
    assert errors.worst < 0.8, errors
    # The other form of the reference is the same to far better than any bound.
    output, state = run_reference(widened(call), "recurrent")
    unit = TOLERANCES[call.dtype].roundoff
    assert ((output - truth.output).abs() <= 0.01 * unit * truth.output_scale + 1e-30).all()
    assert ((state - truth.state).abs() <= 0.01 * unit * truth.state_scale + 1e-37).all()


SMALL = Case(heads=1, d=16, dtype="float16", length=130, batch=4, rotary=4, magnitude="small", past=False)
LARGE = Case(heads=5, d=80, dtype="float16", rotary=20, decay="mixed", magnitude="large-v")


@pytest.mark.parametrize(
    ("case", "last"),
    [
        (replace(SMALL, decay="single-row", position=200, seed=402), 1.0),
        (replace(SMALL, decay="trained", rows=84, position=1, seed=1501), 1.0),
        (replace(LARGE, length=64, lens=(64,)), 1e-5),
        (replace(LARGE, length=130, lens=(130,)), 1e-2),
    ],
    ids=["small gains", "trained tables", "large past", "large values"],
)
def test_what_float16_cannot_resolve_passes(case: Case, last: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes below its subnormals, which fade before the chunk ends; and beside a large state, in its scale.

    Args:
        case: the call.
        last: what its last token's values are multiplied by.
    """
    call = make_call(case)
    qkv = call.qkv.clone()
    qkv[:, -1, (case.heads + call.geometry.num_kv_heads) * case.d :] *= last
    call = call.with_(qkv=qkv)
    truth = exact(call)
    errors = compare(call, truth.output.to(call.dtype), emulate_state(call), truth)
    assert 0.2 < errors.state < 0.8, errors
    monkeypatch.setattr(kernel_bounds, "_coarse_state", lambda *_: 0.0)
    assert compare(call, truth.output.to(call.dtype), emulate_state(call)).state > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_as_tight_as_the_type_allows(dtype: str) -> None:
    """In an ordinary call a typical bound is a small part of a typical result."""
    call = make_call(replace(BASES["geometric"], dtype=dtype))
    truth, tolerance = exact(call), TOLERANCES[call.dtype]
    unit = tolerance.unit(call.length)
    most = {"float32": (1e-4, 2e-5), "float16": (3e-2, 1e-2), "bfloat16": (0.25, 0.08)}[dtype]
    valid = call.valid()
    for scale, value, limit in (
        (truth.output_scale[valid], truth.output[valid], most[0]),
        (truth.state_scale, truth.state, most[1]),
    ):
        assert unit * float(scale.median() / value.abs().median()) < limit


LAYOUTS = {
    "dense": Layout(),
    "in place": Layout(in_place=True),
    "gaps": Layout(token_gap=16, batch_gap=48),
    "time first": Layout(token_gap=8, batch_gap=16, time_major=True, in_place=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_arena_with_a_stand_in(dtype: str, layout: str) -> None:
    call = make_call(replace(BASES["tables"], dtype=dtype))
    results = [Arena(StandIn(), call, where).run() for where in (LAYOUTS[layout], Layout())]
    assert compare(call, *results[0]).worst < 1
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


class Misbehaving(StandIn):
    """A stand-in that does one thing wrong to the memory."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def launch(self, call: Call, buffers: dict[str, torch.Tensor], stream: int) -> None:
        super().launch(call, buffers, stream)
        output = buffers["output"]
        everything = output.storage_offset() - 4
        if self.kind == "before the output":
            output.as_strided((1,), (1,), everything).fill_(1)
        elif self.kind == "between tokens":
            output.as_strided((1,), (1,), output.storage_offset() + output.shape[-1]).fill_(1)
        elif self.kind == "after the state":
            state = buffers["present_state"]
            end = 1 + sum((n - 1) * s for n, s in zip(state.shape, state.stride(), strict=True))
            state.as_strided((1,), (1,), state.storage_offset() + end).fill_(1)
        elif self.kind == "an input":
            buffers["proj"][3, 3] += 1
        elif self.kind == "the past state":
            buffers["past_state"][0, 0, 0, 0] += 1
        elif self.kind == "sync":
            buffers["sync"][3] = 1


@pytest.mark.parametrize(
    "kind", ["before the output", "between tokens", "after the state", "an input", "the past state", "sync"]
)
def test_the_arena_sees_stray_writes(kind: str) -> None:
    call = make_call(BASES["tables"])
    arena = Arena(Misbehaving(kind), call, Layout(token_gap=16, batch_gap=48))
    with pytest.raises(AssertionError, match=r"bytes changed that must not|left zeroed"):
        arena.run()


def test_results_that_were_not_written_are_not_numbers() -> None:
    class Idle(StandIn):
        def launch(self, call: Call, buffers: dict[str, torch.Tensor], stream: int) -> None:
            pass

    call = make_call(replace(BASES["geometric"], lens=(70, 70, 70)))
    assert compare(call, *Arena(Idle(), call).run()).output == float("inf")


def test_cuts_and_rows_of_a_call_are_calls() -> None:
    """Pieces with a carried state, and rows alone, give what the whole gives."""
    call = make_call(BASES["geometric"])
    whole: Exact = exact(call)
    state, outputs = call.past_state.double(), []
    for start, stop in ((0, 1), (1, 33), (33, 70)):
        output, state = run_reference(widened(call.tokens(start, stop)).with_(past_state=state))
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole.output, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state, whole.state, rtol=1e-9, atol=1e-12)
    alone = exact(call.rows([2]))
    torch.testing.assert_close(alone.output[0], whole.output[2], rtol=1e-9, atol=1e-12)
