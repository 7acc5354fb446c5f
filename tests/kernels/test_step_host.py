"""dijiang_step on the host: what fits, what is refused, and the kernel itself, followed by emulated threads.

The emulation (tests/kernels/step_emulation) compiles the project's own kernel, packing and checks with a C++
compiler. It knows nothing of clocks, caches and memory models; what it finds is wrong indices, wrong
arithmetic, missing barriers and deadlocks. tests/kernels/test_step_gpu.py runs the same on a GPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.makers.random_models import LLAMA, NEOX, OPT_350M, random_call, random_model
from support.oracles.packed_step import unpacked
from support.quantised_models import KINDS, quantise_model
from support.step_emulator import compile_emulated, missing
from support.step_models import (
    EmulatedKernels,
    PackedStep,
    reference_step,
    torch_dtype,
)
from support.step_specs import MODELS, RAGGED, WIDE

from dijiang_engines.errors import KernelError
from dijiang_engines.kernels.library import Device
from dijiang_engines.kernels.step import StepKernels, StepModel, step_parts
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.step.gpu import ALLOWED, relative_error

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
    kernels: EmulatedKernels, spec: ModelSpec, dtype: str, rows: int, count: int, far: int = 0,
    kind: str | None = None,
) -> list[float]:  # fmt: skip
    """Errors of logits and states of some steps, each from where the last one ended."""
    model = random_model(spec, 1, torch_dtype(dtype))
    quantised = None if kind is None else quantise_model(spec, model, kind)
    step = PackedStep(kernels, spec, model, dtype, rows, "cpu", quantised)
    _, positions, lens, states = random_call(spec, rows, 1, 3, far=far)
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(spec.vocab_size, (rows,), generator=generator)
        step.start(ids, positions, lens, states)
        step.run()
        logits, new = reference_step(model, ids, positions, lens, states)
        read = [row for row in range(rows) if lens[row]]
        found.append(relative_error(step.logits[read], logits[read]))
        found += [relative_error(mine, theirs) for mine, theirs in zip(step.states, new, strict=True)]
        assert torch.isfinite(step.logits).all()
        assert step.guards_are_intact()
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


@pytest.mark.parametrize("kind", [None, "int4"])
def test_rows_of_many_columns(emulated: EmulatedKernels, kind: str | None) -> None:
    for rows in (1, 2, 8):
        assert max(steps(emulated, WIDE, "float16", rows, 1, kind=kind)) <= ALLOWED["float16"]
    assert max(steps(emulated, WIDE, "bfloat16", 4, 1, kind=kind)) <= ALLOWED["bfloat16"]


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


# -- quantised weights, emulated ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights_lie_where_the_header_says(emulated: EmulatedKernels, name: str, kind: str) -> None:
    spec = MODELS[name]
    model = random_model(spec, 1, torch.float32)
    step = PackedStep(emulated, spec, model, "float16", 1, "cpu", quantise_model(spec, model, kind))
    state = model.state_dict()
    found = unpacked(step.model, step.packed.numpy(), step.size.blocks)
    q, kv = spec.attention_size, spec.num_kv_heads * spec.head_dim
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        whole = np.concatenate([found[layer, part] for part in ("q", "k", "v")])
        assert [len(found[layer, part]) for part in ("q", "k", "v")] == [q, kv, kv]
        assert np.array_equal(whole, state[f"{at}attention.qkv.weight"].double().numpy())
        for part, source in (
            ("gate", "attention.gate"), ("dense", "attention.dense"), ("up", "mlp.up"), ("down", "mlp.down"),
            *([("mlp_gate", "mlp.gate")] if spec.gated_mlp else []),
        ):  # fmt: skip
            assert np.array_equal(found[layer, part], state[f"{at}{source}.weight"].double().numpy()), part
    assert np.array_equal(found[0, "head"], state["lm_head.weight"].double().numpy())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [("int8", "float16", 1), ("int4", "bfloat16", 3), ("all int4", "float16", 2), ("any", "float16", 8)],
)
def test_a_step_with_quantised_weights(
    emulated: EmulatedKernels, name: str, kind: str, dtype: str, rows: int
) -> None:
    assert max(steps(emulated, MODELS[name], dtype, rows, 2, kind=kind)) <= ALLOWED[dtype]


@pytest.mark.parametrize("kind", ["int8", "all int4"])
def test_activations_that_are_all_positive(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Integers with a constant are multiplied, and the constant's share subtracted: of these it is the most.

    The kernel of wide models does, and that of eight rows multiplies the integers themselves.
    """
    monkeypatch.setenv("EMULATED_WIDE", "1")
    spec = RAGGED["neox"]
    model = random_model(spec, 1, torch.float16)
    for name, parameter in model.named_parameters():
        if name.endswith(("attention_norm.bias", "mlp_norm.bias", "final_norm.bias")):
            parameter.data.fill_(8.0)
    quantised = quantise_model(spec, model, kind)
    ids, positions, lens, states = random_call(spec, 8, 1, 3)
    found = {}
    for rows in (1, 8):
        step = PackedStep(emulated, spec, model, "float16", rows, "cpu", quantised)
        step.start(
            ids[:rows], positions[:rows], np.ones(rows, lens.dtype), [state[:rows] for state in states]
        )
        step.run()
        expected, _ = reference_step(
            model, ids[:rows], positions[:rows], np.ones(rows, lens.dtype), [state[:rows] for state in states]
        )
        found[rows] = relative_error(step.logits[:1], expected[:1])
    assert found[8] <= ALLOWED["float16"]
    assert found[1] <= 1.25 * found[8]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_rounds_that_are_not_full(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, blocks: int, kind: str
) -> None:
    """Several rounds to a group, units that rows end in, more groups than a batch has."""
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(blocks))
    for name, rows in (("neox", 1), ("llama", 2)):
        found = steps(emulated, RAGGED[name], "float16", rows, 1, kind=kind)
        assert max(found) <= ALLOWED["float16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [2, 16])
def test_one_row_of_a_wide_model(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, blocks: int, kind: str
) -> None:
    """It has a kernel of its own, which here serves small models too."""
    monkeypatch.setenv("EMULATED_WIDE", "1")
    monkeypatch.setenv("EMULATED_ORDER", "3")
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(blocks))
    for spec in (MODELS["neox, sequential"], MODELS["llama"], RAGGED["neox"]):
        assert max(steps(emulated, spec, "float16", 1, 2, kind=kind)) <= ALLOWED["float16"]


@pytest.mark.parametrize(("kind", "least"), [(None, 2 * 16384), ("int4", 4 * 18432), ("int8", 4 * 18432)])
def test_a_ring_smaller_than_what_may_be_under_way(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, kind: str | None, least: int
) -> None:
    """Who copies would wait for a slot's last filling but one, whose parity is that of its next."""
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", "1")
    spec, rows = RAGGED["neox"], 2
    model = random_model(spec, 1, torch.float16)
    parts = None if kind is None else quantise_model(spec, model, kind).parts
    size = emulated.step_size(StepModel.of(spec, "float16", parts), rows)
    monkeypatch.setenv("EMULATED_SHARED_MEMORY", str(size.shared_memory - size.ring + least))
    small = emulated.step_size(StepModel.of(spec, "float16", parts), rows)
    assert small.ring == least < size.ring
    assert max(steps(emulated, spec, "float16", rows, 1, kind=kind)) <= ALLOWED["float16"]


@pytest.mark.parametrize("order", ["1", "2"])
def test_quantised_and_warps_and_blocks_that_rest(
    emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setenv("EMULATED_ORDER", order)
    for name in ("neox", "llama"):
        assert max(steps(emulated, MODELS[name], "float16", 2, 2, kind="any")) <= ALLOWED["float16"]


def test_quantised_where_a_warp_copies(emulated: EmulatedKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_CAPABILITY", "80")
    for name in ("neox", "llama"):
        assert max(steps(emulated, MODELS[name], "float16", 2, 2, kind="int4")) <= ALLOWED["float16"]


def test_an_embedding_may_stay_float(emulated: EmulatedKernels) -> None:
    """The C ABI takes it, whatever a bundle has."""
    spec = MODELS["neox"]
    model = random_model(spec, 1, torch.float16)
    quantised = quantise_model(spec, model, "int8")
    step = PackedStep(emulated, spec, model, "float16", 1, "cpu", quantised)
    ids, positions, lens, states = random_call(spec, 1, 1, 3)
    step.start(ids, positions, lens, states)
    step.run()
    expected = step.logits.clone()
    step.model = dataclasses.replace(step.model, embedding_format="same")
    step.embedding, step.embedding_scales = model.state_dict()["embed_tokens.weight"].half(), None
    step.start(ids, positions, lens, states)
    step.run()
    difference = relative_error(step.logits, expected.double())
    assert 0 < difference <= ALLOWED["float16"]  # q times scale is rounded here


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


QUANTISED = dataclasses.replace(
    PYTHIA_410M, quantised=True, head_format="int8", embedding_format="int8", int8_matrices=(0b10100,) * 24
)
"""The recipe of --weight-format int4: v and dense in int8."""


def test_sizes_of_quantised_weights(kernels: StepKernels) -> None:
    size = kernels.step_size(QUANTISED, 1, H100)
    eight, all_ = 24 * 2 * 1024 * 1024 + 50304 * 1024, 24 * 13 * 1024 * 1024 + 50304 * 1024
    weights = (eight * 34 + (all_ - eight) * 18) // 32
    assert weights < size.packed < weights + 8_000_000, "and norms, biases and P of 24 layers"
    assert size.blocks == 128
    assert size.ring > 2.9 * (weights - 50304 * 1024 * 34 // 32) / 24 / 128, "nearly three layers ahead"
    most = kernels.step_size(PYTHIA_2_8B, 4, H100)
    wide = dataclasses.replace(PYTHIA_2_8B, quantised=True, head_format="int4")
    assert kernels.step_size(wide, 4, H100).shared_memory <= most.shared_memory + 32768


def test_formats_that_a_model_cannot_have_are_refused(kernels: StepKernels) -> None:
    for model, change, what in (
        (PYTHIA_410M, {"head_format": "int8"}, "head_format is out of range"),
        (PYTHIA_410M, {"embedding_format": "int4"}, "embedding_format is out of range"),
        (PYTHIA_410M, {"int8_matrices": (1,)}, "int8_matrices is out of range"),
        (QUANTISED, {"head_format": "same"}, "head_format is out of range"),
        (QUANTISED, {"int8_matrices": (0,) * 24 + (1,)}, "int8_matrices is out of range"),
    ):
        with pytest.raises(KernelError) as caught:
            kernels.step_size(dataclasses.replace(model, **change), 1, H100)
        assert what in caught.value.what


def test_matrices_of_the_other_kind_are_not_packed(emulated: EmulatedKernels) -> None:
    spec = MODELS["neox"]
    model = random_model(spec, 1, torch.float16)
    whole = PackedStep(emulated, spec, model, "float16", 1, "cpu")
    quantised = PackedStep(emulated, spec, model, "float16", 1, "cpu", quantise_model(spec, model, "int8"))
    part = step_parts(spec, quantise_model(spec, model, "int8").parts)[0]
    to = (whole.packed.data_ptr(), whole.size.packed)
    with pytest.raises(KernelError, match="the model has no quantised matrices"):
        emulated.pack_step_matrix(whole.model, part, 256, 256, *to)
    with pytest.raises(KernelError, match="the head is quantised"):
        emulated.pack_step_ends(quantised.model, {"head": 256, "norm_weight": 256}, *to)
    with pytest.raises(KernelError, match="matrices are quantised"):
        emulated.pack_step_layer(quantised.model, 0, {"qkv": 256}, *to)
    with pytest.raises(KernelError, match="values"):
        emulated.pack_step_matrix(quantised.model, part, 0, 256, *to)
    gate = dataclasses.replace(part, matrix="mlp_gate")
    with pytest.raises(KernelError, match="the model has no such matrix"):
        emulated.pack_step_matrix(quantised.model, gate, 256, 256, *to)


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
