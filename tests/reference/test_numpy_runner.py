"""The PyTorch reference against the NumPy oracle: two implementations that share nothing but the spec."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.makers.toy_bundle import SPEC
from support.oracles.numpy_runner import NumpyRunner, random_parameters

from dijiang_engines.runners.base import Runner
from dijiang_engines.spec import ModelSpec
from dijiang_export.reference.model import ReferenceModel

NEOX = replace(
    SPEC, hidden_size=24, intermediate_size=40, num_heads=3, num_kv_heads=3, head_dim=8, rotary_dim=4,
    embedding_size=24,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA = replace(
    NEOX, family="llama", num_kv_heads=1, rotary_dim=8, norm="rms_norm", gated_mlp=True, activation="silu",
    parallel_residual=False, attention_bias=False, dense_bias=False, mlp_bias=False, rope_scaling=LLAMA3,
)  # fmt: skip
OPT350 = replace(
    NEOX, family="opt", rotary_dim=0, activation="relu", parallel_residual=False, post_norm=True,
    final_norm=False, position_embeddings=50, position_offset=2, embedding_size=12, tied_embeddings=True,
)  # fmt: skip
SPECS = {
    "neox": NEOX,
    "sequential": replace(NEOX, parallel_residual=False),
    "llama": LLAMA,
    "opt-350m": OPT350,
    "tables": replace(
        NEOX, decay="tables", decay_rows=30, decay_extended=True, activation="gelu_tanh",
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunked"])
@pytest.mark.parametrize("name", SPECS)
def test_reference_equals_oracle(name: str, form: str) -> None:
    spec: ModelSpec = SPECS[name]
    parameters = random_parameters(spec)
    oracle = NumpyRunner(spec, parameters, all_logits=True)
    assert isinstance(oracle, Runner)
    model = ReferenceModel(spec, dtype=torch.float64)
    weights = {k: torch.from_numpy(v).double() for k, v in parameters.items()}
    if spec.tied_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model.load_state_dict(weights)
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 36))
    positions, lens = np.array([0, 7]), np.array([36, 19])
    states = oracle.new_state(2)
    expected = oracle.prefill(ids, positions, lens, states)
    with torch.no_grad():
        logits, got_states = model(
            torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(lens), model.new_states(2),
            form=form,
        )  # fmt: skip
    for row in range(2):
        got = logits[row, : lens[row]].numpy()
        # The oracle returns float32, as every runner does: its rounding is what remains.
        np.testing.assert_allclose(got, expected[row, : lens[row]], rtol=1e-6, atol=1e-6 * got.std())
    for got_state, state in zip(got_states, states, strict=True):
        np.testing.assert_allclose(got_state.numpy(), state, rtol=1e-9, atol=1e-10)


def test_far_positions() -> None:
    parameters = random_parameters(NEOX)
    oracle = NumpyRunner(NEOX, parameters)
    logits = oracle.step(np.array([[3]]), np.array([10**6]), np.array([1]), oracle.new_state(1))
    assert np.isfinite(logits).all()
    near = oracle.step(np.array([[3]]), np.array([10**6 + 1]), np.array([1]), oracle.new_state(1))
    assert np.abs(near - logits).max() > 0
