"""bench kernels: what each contestant is asked to compute, and that a wrong one is noticed. On a CPU.

flash-linear-attention needs a GPU; a stand-in with its signatures computes the recurrence here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dijiang_export.bench.kernels import peers
from dijiang_export.bench.kernels.cells import Cell, Shape
from dijiang_export.bench.kernels.inputs import Exact, make_calls, make_layer, within
from dijiang_export.bench.kernels.peers import PeerError, make_roster

CPU = torch.device("cpu")
STEP = Cell("decode", Shape(3, 16), 2, 1)
PROMPT = Cell("prefill", Shape(2, 32), 2, 70)


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, g_gamma: torch.Tensor, scale: float,
    initial_state: torch.Tensor, output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What both functions of flash-linear-attention document: [B, T, H, d], natural logarithms of decay."""
    assert output_final_state
    assert scale == 1.0
    assert all(x.is_contiguous() for x in (q, k, v, initial_state))
    state, outputs = initial_state.float(), []
    for t in range(q.shape[1]):
        write = k[:, t, :, :, None].float() * v[:, t, :, None, :].float()
        state = g_gamma.exp()[None, :, None, None] * state + write
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t].float(), state))
    return torch.stack(outputs, 1).to(q.dtype), state


class Tuner:
    """As Triton's autotuner looks from outside."""

    def __init__(self) -> None:
        self.configs = [1, 2]
        self.cache = {"key": 1}
        self.do_bench: Callable[..., Any] | None = None


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the package; its functions may be replaced before a contestant is made."""
    ops = types.ModuleType("fla.ops.simple_gla")
    calls: list[str] = []

    def named(name: str) -> Callable[..., Any]:
        def function(**arguments: Any) -> Any:
            calls.append(name)
            return recurrence(**arguments)

        return function

    ops.fused_recurrent_simple_gla = named("step")  # type: ignore[attr-defined]
    ops.chunk_simple_gla = named("chunk")  # type: ignore[attr-defined]
    chunk_h = types.ModuleType("fla.ops.common.chunk_h")
    tuner = Tuner()
    chunk_h.chunk_fwd_kernel_h = types.SimpleNamespace(fn=tuner)  # type: ignore[attr-defined]
    modules = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops"),
               "fla.ops.common": types.ModuleType("fla.ops.common"), "fla.ops.simple_gla": ops,
               "fla.ops.common.chunk_h": chunk_h}  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FLA_CACHE_RESULTS", "1")
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    return {"calls": calls, "tuner": tuner, "ops": ops}


@pytest.mark.parametrize("cell", [STEP, PROMPT], ids=str)
@pytest.mark.parametrize("name", ["fla", "fla-phi", "torch-compile", "copy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_peer_computes_what_it_is_judged_by(
    fla: dict[str, Any], name: str, cell: Cell, dtype: torch.dtype
) -> None:
    contestant = peers.PEERS[name]()
    layer, calls = make_layer(cell.shape, CPU), make_calls(cell, dtype, CPU, 2)
    before = [call.state.clone() for call in calls]
    prepared = contestant.prepare(cell, layer, calls)
    with torch.no_grad():
        errors = prepared.check()
        prepared.run(1)
    assert within(errors, str(dtype).removeprefix("torch."))
    assert set(errors) == {"output", "state"}
    assert all(torch.equal(call.state, state) for call, state in zip(calls, before, strict=True))
    kernels = {"fla", "fla-phi"}
    assert set(fla["calls"]) == ({"step" if cell is STEP else "chunk"} if name in kernels else set())


@pytest.mark.parametrize("name", ["fla", "fla-phi"])
@pytest.mark.parametrize("fault", ["decay", "state", "nan"])
def test_a_wrong_peer_is_noticed(fla: dict[str, Any], name: str, fault: str) -> None:
    def wrong(**arguments: Any) -> Any:
        if fault == "decay":
            arguments["g_gamma"] = 2 * arguments["g_gamma"]
        output, state = recurrence(**arguments)
        if fault == "state":
            state[1] = arguments["initial_state"][1]
        if fault == "nan":
            output[0, 0, 0, 0] = float("nan")
        return output, state

    fla["ops"].chunk_simple_gla = wrong
    prepared = peers.PEERS[name]().prepare(
        PROMPT, make_layer(PROMPT.shape, CPU), make_calls(PROMPT, torch.float16, CPU)
    )
    assert not within(prepared.check(), "float16")


def test_nothing_unwritten_passes() -> None:
    exact = Exact(torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    poisoned = torch.tensor([1.0, float("nan"), 1.0])
    assert within(exact.errors(torch.ones(3), torch.ones(3)), "float32")
    assert not within(exact.errors(poisoned, torch.ones(3)), "float16")
    assert not within(exact.errors(torch.ones(3), poisoned), "float16")


def test_flas_choice_is_forgotten_before_each_cell(fla: dict[str, Any]) -> None:
    contestant = peers.PEERS["fla"]()
    assert fla["tuner"].do_bench is peers._quick_bench
    for cell in (STEP, PROMPT):
        fla["tuner"].cache["key"] = 1
        contestant.prepare(cell, make_layer(cell.shape, CPU), make_calls(cell, torch.float16, CPU))
        assert fla["tuner"].cache == {}


def test_the_quadratic_form_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    cell = Cell("prefill", Shape(32, 16), 8, 8192)
    with pytest.raises(PeerError, match="quadratic"):
        peers.PEERS["torch-compile"]().prepare(cell, make_layer(cell.shape, CPU), [])


def test_who_is_missing_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, None)
    roster = make_roster(["fla", "copy", "fla-phi"])
    assert [c.name for c in roster.contestants] == ["copy"]
    assert set(roster.absent) == {"fla", "fla-phi"}
    assert "pip install flash-linear-attention" in roster.absent["fla"]


def test_recompilation_is_not_limited_to_a_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options))
    before = config.recompile_limit
    try:
        peers.compiled(lambda x: x)
        assert config.recompile_limit == peers.RECOMPILATIONS
        assert asked == [{"dynamic": False}]
    finally:
        config.recompile_limit = before


def test_inputs_are_the_same_for_everybody_and_differ_between_sets() -> None:
    one, other = make_calls(STEP, torch.float16, CPU, 2), make_calls(STEP, torch.float16, CPU, 2)
    assert torch.equal(one[1].qkv, other[1].qkv)
    assert not torch.equal(one[0].qkv, one[1].qkv)
    q, _, v = one[0].heads(make_layer(STEP.shape, CPU).attributes)
    assert torch.equal(q[1, 0, 2], one[0].qkv[1, 0, 2 * 16 : 3 * 16])
    assert torch.equal(v[0, 0, 0], one[0].qkv[0, 0, 2 * 3 * 16 : 2 * 3 * 16 + 16])


def test_the_feature_maps_matrix_is_a_scaled_orthonormal_one() -> None:
    layer = make_layer(Shape(2, 64), CPU)
    gram = layer.proj.double().T @ layer.proj.double()
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-5)
    assert layer.attributes.rotary_dim == 16
    assert layer.inv_freq.shape == (8,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cell", [STEP, PROMPT], ids=str)
def test_a_gpu_measures(cell: Cell) -> None:
    """The one thing that no stand-in can do: graphs, events and both figures."""
    from dijiang_export.bench.kernels.gpu import Gpu, Measured

    gpu = Gpu("float16")
    assert gpu.describe()["l2_bytes"] > 0
    found = gpu.measure(cell, make_roster(["copy"]).contestants, 0.01)["copy"]
    assert isinstance(found, Measured)
    assert found.right
    assert found.sets >= 2
    for timing in (found.single, found.rotated):
        assert timing is not None
        assert 1e-7 < timing.best <= timing.median < 1e-2
