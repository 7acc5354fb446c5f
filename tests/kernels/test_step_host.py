"""dijiang_step on the host: what fits, what is refused, and the kernel itself, followed by emulated threads.

The emulation (tests/kernels/step_emulation) compiles the project's own kernel, packing and checks with a C++
compiler. It knows nothing of clocks, caches and memory models; what it finds is wrong indices, wrong
arithmetic, missing barriers and deadlocks. tests/kernels/test_step_gpu.py runs the same on a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.makers.random_models import LLAMA, NEOX, OPT_350M, random_call, random_model
from support.step_emulator import compile_emulated, missing
from support.step_models import (
    ALLOWED,
    EmulatedKernels,
    PackedStep,
    error,
    reference_step,
    torch_dtype,
)
from support.step_specs import MODELS

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels.library import Device
from dijiang_engines.kernels.step import StepKernels, StepModel
from dijiang_engines.spec import ModelSpec

H100, ORIN = Device(90, 132, 232448), Device(87, 16, 166912)
PYTHIA_410M = StepModel(
    layers=24, hidden=1024, inner=4096, vocabulary=50304, num_heads=16, num_kv_heads=16, head_dim=64,
    rotary_dim=16, dtype="float16", norm="layer_norm", activation="gelu", parallel_residual=True,
    table_rows=0, position_rows=0, position_offset=0, norm_epsilon=1e-5, group_norm_epsilon=1e-5,
)  # fmt: skip
PYTHIA_2_8B = dataclasses.replace(
    PYTHIA_410M,
    layers=32,
    hidden=2560,
    inner=10240,
    num_heads=32,
    num_kv_heads=32,
    head_dim=80,
    rotary_dim=20,
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    return compile_emulated(tmp_path_factory.mktemp("step"))


@pytest.fixture(scope="session")
def kernels(kernels_library: Path) -> StepKernels:
    return StepKernels(kernels_library)


def steps(
    kernels: EmulatedKernels, spec: ModelSpec, dtype: str, rows: int, count: int, far: int = 0
) -> list[float]:
    """Errors of logits and states of some steps, each from where the last one ended."""
    model = random_model(spec, 1, torch_dtype(dtype))
    step = PackedStep(kernels, spec, model, dtype, rows, "cpu")
    _, positions, lens, states = random_call(spec, rows, 1, 3, far=far)
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(spec.vocab_size, (rows,), generator=generator)
        step.start(ids, positions, lens, states)
        step.run()
        logits, new = reference_step(model, ids, positions, lens, states)
        read = [row for row in range(rows) if lens[row]]
        found.append(error(step.logits[read], logits[read]))
        found += [error(mine, theirs) for mine, theirs in zip(step.states, new, strict=True)]
        assert torch.isfinite(step.logits).all()
        assert step.sync.guards_are_intact()
        states, positions = [state.numpy().copy() for state in step.states], positions + lens
    return found


# -- the kernel, emulated --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "rows"), [("float16", 1), ("bfloat16", 3)])
def test_a_step_is_the_references(emulated: EmulatedKernels, name: str, dtype: str, rows: int) -> None:
    assert max(steps(emulated, MODELS[name], dtype, rows, 2)) <= ALLOWED[dtype]


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(blocks))
    assert max(steps(emulated, MODELS["llama"], "float16", 2, 1)) <= ALLOWED["float16"]
    assert max(steps(emulated, MODELS["neox"], "float16", 1, 1)) <= ALLOWED["float16"]


def test_eight_rows_and_far_positions(emulated: EmulatedKernels) -> None:
    assert max(steps(emulated, MODELS["neox"], "float16", 8, 2, far=100_000)) <= ALLOWED["float16"]


@pytest.mark.parametrize("order", ["1", "2"])
def test_warps_and_blocks_that_rest(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """A missing barrier shows when some are far ahead of others."""
    monkeypatch.setenv("EMULATED_ORDER", order)
    for name in ("neox", "llama"):
        assert max(steps(emulated, MODELS[name], "float16", 2, 2)) <= ALLOWED["float16"]


def test_a_warp_copies_where_there_are_no_bulk_copies(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATED_CAPABILITY", "80")
    for name in ("neox", "llama"):
        assert max(steps(emulated, MODELS[name], "float16", 2, 2)) <= ALLOWED["float16"]


def test_the_same_bits_in_every_step(emulated: EmulatedKernels) -> None:
    spec = MODELS["llama"]
    model = random_model(spec, 1, torch.float16)
    step = PackedStep(emulated, spec, model, "float16", 2, "cpu")
    ids, positions, lens, states = random_call(spec, 2, 1, 3)
    seen = []
    for _ in range(2):
        step.start(ids, positions, lens, states)
        step.run()
        seen.append([step.logits.clone(), *(state.clone() for state in step.states)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# -- what fits --------------------------------------------------------------------------------------------


def test_sizes(kernels: StepKernels) -> None:
    size = kernels.step_size(PYTHIA_410M, 1, H100)
    weights = 2 * (24 * (4 * 1024 * 1024 + 2 * 1024 * 4096 + 1024 * 1024) + 50304 * 1024)
    assert weights < size.packed < 1.01 * weights
    assert size.blocks == 128, "as many as share the rows of every matrix evenly"
    assert size.ring + 4096 < size.shared_memory <= H100.shared_memory
    # Memory for values that blocks exchange serves every number of rows.
    assert kernels.step_size(PYTHIA_410M, 8, H100).sync == size.sync
    assert kernels.step_size(PYTHIA_410M, 8, H100).packed == size.packed


def test_what_does_not_fit_is_refused(kernels: StepKernels) -> None:
    def refused(model: StepModel, rows: int, device: Device) -> KernelError:
        with pytest.raises(KernelError) as caught:
            kernels.step_size(model, rows, device)
        return caught.value

    assert "does not fit a block's shared memory" in refused(PYTHIA_2_8B, 8, H100).what
    assert kernels.step_size(PYTHIA_2_8B, 2, H100).shared_memory <= H100.shared_memory
    assert kernels.step_size(PYTHIA_410M, 1, ORIN).blocks == ORIN.multiprocessors
    assert "8.0 or newer" in str(
        refused(PYTHIA_410M, 1, dataclasses.replace(ORIN, compute_capability=75)).expected
    )
    changes: list[dict[str, Any]] = [
        {"hidden": 1000}, {"inner": 0}, {"layers": 129}, {"num_kv_heads": 3}, {"head_dim": 72},
        {"rotary_dim": 3}, {"dtype": "float32"}, {"norm": "norm_none"}, {"norm_epsilon": 0.0},
        {"group_norm_epsilon": float("nan")}, {"table_rows": -1}, {"position_offset": -1},
    ]  # fmt: skip
    for change in changes:
        (name,) = change
        assert f"{name} is out of range" in refused(dataclasses.replace(PYTHIA_410M, **change), 1, H100).what
    assert "rows is out of range" in refused(PYTHIA_410M, 9, H100).what


def test_models_that_have_no_such_step() -> None:
    for spec, what in (
        (OPT_350M, "a norm behind the residual addition"),
        (dataclasses.replace(LLAMA, activation="gelu"), "a gated MLP with gelu"),
    ):
        with pytest.raises(KernelError, match="no step in one launch") as caught:
            StepModel.of(spec, "float16")
        assert caught.value.got == what
    with pytest.raises(KernelError, match="no step in one launch"):
        StepModel.of(NEOX, "float32")
