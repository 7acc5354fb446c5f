"""dijiang_step on a GPU against the reference model in float64: logits and every layer's state.

Skipped, with the reason, without a GPU of compute capability 8.0 or newer or without the compiled kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import pytest
from support.makers.random_models import random_call, random_model
from support.quantised_models import KINDS, quantise_model
from support.step_models import (
    PackedStep,
    reference_step,
    torch_dtype,
)
from support.step_specs import MODELS

from dijiang_engines.errors import KernelError, PluginError
from dijiang_engines.kernels.step import StepKernels, StepModel
from dijiang_engines.plugin.cache import find_kernels_library
from dijiang_export.bench.step.gpu import ALLOWED, relative_error
from dijiang_export.bench.step.weights import QuantisedWeights, widened
from dijiang_export.reference.model import ReferenceModel

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability()[0] < 8:
    pytest.skip("no GPU of compute capability 8.0 or newer", allow_module_level=True)

WIDE = {
    # The shapes of real layers, few of them: every block has rows of every matrix.
    "neox, wide": dataclasses.replace(
        MODELS["neox"], hidden_size=1024, embedding_size=1024, intermediate_size=4096, num_heads=16,
        num_kv_heads=16, head_dim=64, rotary_dim=16, vocab_size=5003, num_layers=3,
    ),
    "neox, 32 heads of 80": dataclasses.replace(
        MODELS["neox"], hidden_size=2560, embedding_size=2560, intermediate_size=10240, num_heads=32,
        num_kv_heads=32, head_dim=80, rotary_dim=20, vocab_size=1001, num_layers=2,
    ),
    "neox, 8 heads of 256": dataclasses.replace(
        MODELS["neox"], hidden_size=2048, embedding_size=2048, intermediate_size=8192, num_heads=8,
        num_kv_heads=8, head_dim=256, rotary_dim=64, vocab_size=1001, num_layers=2,
    ),
    "llama, 9 heads": dataclasses.replace(
        MODELS["llama"], hidden_size=576, embedding_size=576, intermediate_size=1536, num_heads=9,
        num_kv_heads=3, head_dim=64, rotary_dim=64, vocab_size=4001, num_layers=4,
    ),
}  # fmt: skip
EVERY = MODELS | WIDE


@pytest.fixture(scope="module")
def kernels() -> StepKernels:
    try:
        return StepKernels(Path(os.environ.get("DIJIANG_KERNELS") or find_kernels_library()))
    except PluginError as problem:
        pytest.skip(str(problem))


@functools.cache
def models(name: str, dtype: str) -> tuple[ReferenceModel, ReferenceModel]:
    """A random model, and the same in float64 on the GPU."""
    model = random_model(EVERY[name], 1, torch_dtype(dtype))
    return model, widened(model, "cuda")


@functools.cache
def quantised_models(name: str, dtype: str, kind: str) -> tuple[QuantisedWeights, ReferenceModel]:
    """The same model's matrices quantised, and with what is stored in float64 on the GPU."""
    wide = widened(models(name, dtype)[0], "cuda")
    return quantise_model(EVERY[name], wide, kind), wide


def largest_error(
    kernels: StepKernels, name: str, dtype: str, rows: int, count: int, far: int = 0, kind: str | None = None
) -> float:
    """Of logits and states of some steps on a stream of its own, each from where the last one ended."""
    spec, (model, wide), quantised = EVERY[name], models(name, dtype), None
    if kind is not None:
        quantised, wide = quantised_models(name, dtype, kind)
    step = PackedStep(kernels, spec, model, dtype, rows, "cuda", quantised)
    _, positions, lens, states = random_call(spec, rows, 1, 3, far=far)
    generator, worst = torch.Generator().manual_seed(5), 0.0
    for _ in range(count):
        ids = torch.randint(spec.vocab_size, (rows,), generator=generator)
        step.start(ids, positions, lens, states)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            step.run()
        torch.cuda.synchronize()
        logits, new = reference_step(wide, ids, positions, lens, states)
        read = [row for row in range(rows) if lens[row]]
        worst = max(worst, relative_error(step.logits[read], logits[read]))
        worst = max(
            worst, *(relative_error(mine, theirs) for mine, theirs in zip(step.states, new, strict=True))
        )
        assert torch.isfinite(step.logits).all()
        assert step.guards_are_intact()
        states, positions = [state.cpu().numpy().copy() for state in step.states], positions + lens
    return worst


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_step_is_the_references(kernels: StepKernels, name: str, dtype: str, rows: int) -> None:
    spec = EVERY[name]
    if rows == 8 and spec.hidden_size >= 2048:
        with pytest.raises(KernelError, match="does not fit a block's shared memory"):
            kernels.step_size(StepModel.of(spec, dtype), rows)
        return
    assert largest_error(kernels, name, dtype, rows, 2) <= ALLOWED[dtype]


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("far", [100, 100_000])
def test_every_number_of_rows_near_and_far(kernels: StepKernels, rows: int, far: int) -> None:
    assert largest_error(kernels, "neox, wide", "float16", rows, 2, far) <= ALLOWED["float16"]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("dtype", "kinds"), [("float16", KINDS), ("bfloat16", ("int4",))])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_step_with_quantised_weights(
    kernels: StepKernels, name: str, dtype: str, kinds: tuple[str, ...], rows: int
) -> None:
    if rows == 8 and EVERY[name].hidden_size >= 2048:
        pytest.skip("eight rows of it do not fit a block's shared memory")
    for kind in kinds:
        assert largest_error(kernels, name, dtype, rows, 2, kind=kind) <= ALLOWED[dtype]


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_the_same_bits_with_quantised_weights(kernels: StepKernels, rows: int) -> None:
    spec = EVERY["neox, wide"]
    quantised, _ = quantised_models("neox, wide", "float16", "any")
    model, _ = models("neox, wide", "float16")
    step = PackedStep(kernels, spec, model, "float16", rows, "cuda", quantised)
    ids, positions, _, states = random_call(spec, rows, 1, 3)
    assert_same_bits(step, ids, positions, states)


def graph_of(step: PackedStep) -> Any:
    """One step and what counts it on, captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
        step.positions.add_(step.lens)
        step.ids.copy_(step.logits.argmax(-1))
    return graph


@pytest.mark.parametrize("name", ["neox, wide", "llama, 9 heads", "neox, tables"])
def test_a_graph_replays_many_steps(kernels: StepKernels, name: str) -> None:
    spec, rows = EVERY[name], 2
    model, reference = models(name, "float16")
    step = PackedStep(kernels, spec, model, "float16", rows, "cuda")
    _, _, _, states = random_call(spec, rows, 1, 4)
    ids, ones = torch.tensor([1, 5]), torch.ones(rows, dtype=torch.int64)
    step.start(ids, torch.zeros(rows, dtype=torch.int64), ones, states)
    graph = graph_of(step)
    positions, wide = torch.zeros(rows, dtype=torch.int64), states
    for _ in range(40):
        graph.replay()
        torch.cuda.synchronize()
        logits, wide = reference_step(reference, ids, positions, ones, wide)
        assert relative_error(step.logits, logits) <= ALLOWED["float16"]
        ids, positions = step.ids.cpu(), positions + 1
    assert max(relative_error(a, b) for a, b in zip(step.states, wide, strict=True)) <= ALLOWED["float16"]


def assert_same_bits(step: PackedStep, ids: Any, positions: Any, states: list[Any]) -> None:
    """Twenty runs of one step."""
    seen = []
    for _ in range(20):
        step.start(ids, positions, torch.ones(step.rows, dtype=torch.int64), states)
        step.run()
        torch.cuda.synchronize()
        seen.append([step.logits.clone(), *(state.clone() for state in step.states)])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_the_same_bits_in_every_run(kernels: StepKernels) -> None:
    spec = EVERY["neox, wide"]
    model, _ = models("neox, wide", "float16")
    step = PackedStep(kernels, spec, model, "float16", 4, "cuda")
    ids, positions, _, states = random_call(spec, 4, 1, 3)
    assert_same_bits(step, ids, positions, states)


def test_rows_do_not_meet(kernels: StepKernels) -> None:
    """A row's result is the same beside any other row of as many."""
    spec = EVERY["llama, 9 heads"]
    model, _ = models("llama, 9 heads", "float16")
    step = PackedStep(kernels, spec, model, "float16", 3, "cuda")
    ids, positions, _, states = random_call(spec, 3, 1, 3)
    ones, seen = torch.ones(3, dtype=torch.int64), []
    for other in (7, 8):
        ids[1] = other
        step.start(ids, positions, ones, states)
        step.run()
        torch.cuda.synchronize()
        seen.append((step.logits[[0, 2]].clone(), [state[[0, 2]].clone() for state in step.states]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


def test_what_is_refused_enqueues_nothing(kernels: StepKernels) -> None:
    spec = EVERY["neox"]
    step = PackedStep(kernels, spec, models("neox", "float16")[0], "float16", 1, "cuda")
    step.start([1], [0], [1], [torch.zeros(1, *spec.state_shape) for _ in range(spec.num_layers)])
    good = step.states
    for states, expected in (
        (good[:1], "states has the wrong length"),
        ([good[0], good[0]], "overlap"),
        ([good[0], step.logits], "overlap"),
    ):
        step.states = states
        with pytest.raises(KernelError) as caught:
            step.run()
        assert expected in str(caught.value)
    torch.cuda.synchronize()
    assert torch.isnan(step.logits).all()
