"""The reference model's mathematics: three forms of one recurrence, RoPE, GroupNorm, padding, state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.makers import random_models as rm

from dijiang_engines.errors import CheckpointError
from dijiang_export.reference import attention as att
from dijiang_export.reference.rope import inverse_frequencies, rotate, rotation

FAMILIES = {
    "neox": rm.NEOX,
    "llama": rm.LLAMA,
    "opt-350m": rm.OPT_350M,
    "tables": rm.with_tables(rm.NEOX, 64),
    "straddling": rm.with_heads(rm.NEOX, 6, 6, 16, 4),
}


def run(model, ids, positions, lens, states, **options):
    arrays = (torch.from_numpy(np.asarray(x)) for x in (ids, positions, lens))
    return model(*arrays, [torch.from_numpy(s).double() for s in states], **options)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_forms_agree(name: str, length: int) -> None:
    spec = FAMILIES[name]
    model = rm.random_model(spec)
    call = rm.random_call(spec, 3, length, seed=length)
    logits, states = run(model, *call, form="recurrent")
    for form in ("parallel", "chunked"):
        other_logits, other_states = run(model, *call, form=form)
        valid = torch.arange(length) < torch.from_numpy(call[2]).unsqueeze(-1)
        torch.testing.assert_close(other_logits[valid], logits[valid], rtol=0, atol=1e-10)
        for got, expected in zip(other_states, states, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@given(
    d=st.sampled_from([2, 4]),
    length=st.integers(1, 20),
    chunk=st.integers(1, 9),
    steep=st.floats(0, 40),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_forms_agree_for_any_decay(d: int, length: int, chunk: int, steep: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k, v = (normal(2, 3, length, d) for _ in range(3))
    state = normal(2, 3, d, d)
    terms = att.TokenTerms(
        -steep * normal(2, 3, length).abs() * (torch.rand(2, 3, length, generator=rng) < 0.5),
        normal(2, 3, length),
        normal(2, 3, length),
    )
    expected, last = att.recurrent(q, k, v, terms, state)
    for got, end in (
        att.parallel(q, k, v, terms, state),
        att.chunked(q, k, v, terms, state, chunk),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(end, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_and_padding_change_nothing(name: str) -> None:
    spec = FAMILIES[name]
    model = rm.random_model(spec)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, spec.vocab_size, (2, 50)))
    whole, end = model(ids)
    states, done = model.new_states(2), 0
    for size in (1, 17, 2, 30):
        padded = torch.nn.functional.pad(ids[:, done : done + size], (0, 5))
        start, lens = torch.full((2,), done), torch.full((2,), size)
        logits, states = model(padded, start, lens, states)
        torch.testing.assert_close(logits[:, :size], whole[:, done : done + size], rtol=0, atol=1e-10)
        done += size
    for got, expected in zip(states, end, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    last, _ = model(ids, seq_lens=torch.tensor([50, 20]), all_logits=False)
    torch.testing.assert_close(last[0, 0], whole[0, 49], rtol=0, atol=1e-10)
    torch.testing.assert_close(last[1, 0], whole[1, 19], rtol=0, atol=1e-10)


def test_an_empty_row_keeps_its_state_and_gives_no_output() -> None:
    spec = rm.with_tables(rm.NEOX, 32)
    layer = rm.random_model(spec).layers[0].attention
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2, *spec.state_shape, generator=generator, dtype=torch.float64)
    qkv = torch.randn(2, 4, spec.qkv_size, generator=generator, dtype=torch.float64)
    gate = torch.randn(2, 4, spec.attention_size, generator=generator, dtype=torch.float64)
    for form in att.FORMS:
        output, present = att.dijiang_attention(
            qkv, gate, state, torch.tensor([0, 5]), torch.tensor([3, 0]),
            layer.proj, layer.norm_weight, layer.norm_bias, inverse_frequencies(spec),
            decay=att.Decay(layer.log_decay, layer.gain, layer.read_scale),
            attributes=layer.attributes, form=form,
        )  # fmt: skip
        assert torch.equal(present[1], state[1])
        assert not torch.equal(present[0], state[0])
        assert output[1].abs().max() == 0
        assert output[0, 3].abs().max() == 0
        assert output[0, :3].abs().min() > 0


def test_rows_past_the_table_read_its_last_row() -> None:
    decay = att.Decay(*(torch.randn(5, 2) for _ in range(3)))
    terms = att.token_terms(decay, torch.tensor([3]), torch.tensor([4]), 4, torch.float64)
    assert decay.gain is not None
    rows = decay.gain.double()[[3, 4, 4, 4]].T
    torch.testing.assert_close(terms.gain[0], rows, rtol=0, atol=0)


@pytest.mark.parametrize(("groups", "channels"), [(16, 3), (64, 12), (4, 1)])
def test_group_norm_is_torchs(groups: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, groups * channels, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, groups * channels, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.group_norm(x.reshape(10, -1), groups, weight, bias, 1e-5)
    got = att.group_norm(x, groups, weight, bias, 1e-5).reshape(10, -1)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # Far beyond what float32 can square: the same numbers.
    big = att.group_norm((x * 1e30).float(), groups, weight.float(), bias.float(), 1e-5)
    exact = att.group_norm(x * 1e30, groups, weight, bias, 1e-5)
    torch.testing.assert_close(big.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("position", [0, 1, 2047, 100_003, 1_000_000])
def test_rope_is_accurate_at_any_position(position: int) -> None:
    inv_freq = inverse_frequencies(rm.with_heads(rm.NEOX, 1, 1, 64, 64))
    cos, sin = rotation(torch.tensor([position]), inv_freq, torch.float64)
    for index, frequency in enumerate(inv_freq.tolist()):  # math.fsum-exact: one product in float64
        assert abs(cos[0, index].item() - math.cos(position * frequency)) < 1e-9
        assert abs(sin[0, index].item() - math.sin(position * frequency)) < 1e-9


def test_rope_pairs_halves_and_leaves_the_rest() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    cos, sin = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    assert rotate(x, cos, sin).tolist() == [-3.0, 2.0, 1.0, 4.0, 9.0]


def test_rope_scaling_matches_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    for kind in ("linear", "llama3"):
        chosen = {**scaling, "rope_type": kind}
        spec = rm.with_heads(rm.LLAMA, 4, 2, 64, 64)
        spec = rm.dataclasses.replace(spec, rope_scaling=chosen)
        config = LlamaConfig(
            hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=512,
            rope_parameters={**chosen, "rope_theta": 10000.0},
        )  # fmt: skip
        expected, scale = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
        assert scale == 1.0
        torch.testing.assert_close(inverse_frequencies(spec), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_rope_scaling_that_needs_more_than_frequencies_is_refused(kind: str) -> None:
    spec = rm.dataclasses.replace(rm.LLAMA, rope_scaling={"rope_type": kind, "factor": 2.0})
    with pytest.raises(CheckpointError, match=kind):
        inverse_frequencies(spec)


def test_half_precision_keeps_state_and_arithmetic_in_float32() -> None:
    spec = rm.NEOX
    model = rm.random_model(spec, dtype=torch.bfloat16)
    half = rm.ReferenceModel(spec, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    assert half.layers[0].attention.proj.dtype == torch.float32
    assert half.layers[0].attention.qkv.weight.dtype == torch.bfloat16
    ids = torch.arange(20).reshape(1, 20)
    logits, states = half(ids)
    assert logits.dtype == torch.float32
    assert states[0].dtype == torch.float32
    exact, _ = model(ids)
    assert (logits - exact).abs().max() < 0.1 * exact.std()
