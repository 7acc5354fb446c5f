"""Where this project does not do what the official code does: docs/differences-from-official.md, in numbers.

`full` and `cached_step` are the official attention's two paths (modeling_gpt_neox_dijiang.py of
YuchuanTian/DiJiang@3459531:270-300) on features that are already mapped. Tests of other differences are
named in that document.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.makers.decay_tables import official_tables
from support.makers.weight_files import load_tensors
from support.oracles.official import official_forward
from support.paths import GOLDENS
from torch import Tensor

from dijiang_engines.errors import PositionError
from dijiang_engines.runners.checks import position_error
from dijiang_export.checkpoint.checkpoint import open_checkpoint
from dijiang_export.checkpoint.decay import official_gammas
from dijiang_export.reference.attention import Decay, chunked, recurrent, token_terms
from dijiang_export.reference.model import ReferenceModel
from dijiang_export.reference.rope import rotation

GOLDEN = GOLDENS / "neox-geometric"
HEADS, D = 4, 8


def full(q: Tensor, k: Tensor, v: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """The official forward of a sequence: features q, k, values v [B, H, L, d]; d1, d2 [1, H, N, 1]."""
    length = q.shape[2]
    scores = (q * d1[:, :, :length]) @ (k * d2[:, :, :length]).mT
    return (scores * torch.ones(length, length, dtype=q.dtype).tril()) @ v


def cached_step(q: Tensor, k: Tensor, v: Tensor, d1: Tensor, d2: Tensor) -> Tensor:
    """The official forward of one new token with a cache: q [B, H, 1, d]; k, v [B, H, L, d] old and new."""
    queries, keys = q.shape[2], k.shape[2]
    scores = (q * d1[:, :, :queries]) @ (k * d2[:, :, :keys]).mT
    mask = torch.ones(keys, keys, dtype=q.dtype).tril()[:queries]  # rows from the top: row 0 sees token 0
    return (scores * mask) @ v


def random_features(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, length, D, dtype=torch.float64, generator=rng) for _ in range(3))
    return q.softmax(-1), k.softmax(-1), v


def geometric() -> Decay:
    return Decay(torch.from_numpy(np.log(official_gammas(HEADS))))


def run(form, q: Tensor, k: Tensor, v: Tensor, state: Tensor, position: int = 0) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    terms = token_terms(geometric(), torch.tensor([position]), torch.tensor([length]), length, q.dtype)
    return form(q, k, v, terms, state)


def test_official_cached_decoding_sees_the_first_token_only() -> None:
    length = 20
    q, k, v = random_features(length)
    d1, d2 = (table.double() for table in official_tables(HEADS, length))
    right = full(q, k, v, d1, d2)[:, :, -1]
    cached = cached_step(q[:, :, -1:], k, v, d1, d2)[:, :, 0]
    first = (q[:, :, -1] * k[:, :, 0]).sum(-1, keepdim=True) * v[:, :, 0]  # D1[0] = D2[0] = 1
    torch.testing.assert_close(cached, first)
    assert (cached - right).norm() > 0.3 * right.norm()
    # Our step after 19 tokens is the full forward's last token.
    _, state = run(chunked, q[:, :, :-1], k[:, :, :-1], v[:, :, :-1], torch.zeros(1, HEADS, D, D).double())
    o, _ = run(recurrent, q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], state, position=length - 1)
    # The stored tables are float32 powers of γ: 1e-6 of them is rounding.
    torch.testing.assert_close(o[:, :, 0], right, rtol=1e-5, atol=1e-6)


def test_official_tables_overflow_and_the_recurrence_does_not() -> None:
    length = 2800
    q, k, v = random_features(length)
    d1, d2 = official_tables(HEADS, length)
    assert torch.isinf(d2[0, 0, 2795:]).all()
    assert torch.isfinite(d2[0, 0, :2795]).all()
    official = full(q.float(), k.float(), v.float(), d1, d2)
    assert not torch.isfinite(official[0, 0, -1]).any()
    o, _ = run(chunked, q, k, v, torch.zeros(1, HEADS, D, D).double())
    ln_gamma = torch.from_numpy(np.log(official_gammas(HEADS)))
    decay = (ln_gamma[0] * torch.arange(length - 1, -1, -1)).exp()
    last = ((q[0, 0, -1] @ k[0, 0].T) * decay) @ v[0, 0]
    torch.testing.assert_close(o[0, 0, -1], last)


def test_official_forward_ends_with_its_tables_and_geometric_decay_does_not() -> None:
    q, k, v = random_features(33)
    d1, d2 = (table.double() for table in official_tables(HEADS, 32))
    with pytest.raises(RuntimeError, match="must match"):
        full(q, k, v, d1, d2)
    o, _ = run(chunked, q, k, v, torch.zeros(1, HEADS, D, D).double())
    longer = (table.double() for table in official_tables(HEADS, 33))
    torch.testing.assert_close(o, full(q, k, v, *longer), rtol=1e-5, atol=1e-6)


def test_past_trained_tables_there_is_a_clear_error() -> None:
    with open_checkpoint(GOLDEN.parent / "neox-trained-tables") as checkpoint:
        error = position_error(checkpoint.spec, 0, checkpoint.spec.decay_rows + 1)
    assert isinstance(error, PositionError)
    assert "trained decay tables" in str(error)
    assert "--extend-decay" in str(error)


def golden_model() -> ReferenceModel:
    with open_checkpoint(GOLDEN) as checkpoint:
        model = ReferenceModel(checkpoint.spec, dtype=torch.float64)
        model.load_state_dict(checkpoint.load_state_dict(torch.float64))
    return model


def test_official_padding_is_attended_to_and_ours_is_not() -> None:
    config = json.loads((GOLDEN / "config.json").read_text())
    ids = torch.from_numpy(np.load(GOLDEN / "reference.npz")["input_ids"][:1, :12])
    tensors = load_tensors(GOLDEN)
    alone = official_forward(tensors, config, ids)
    padded = official_forward(tensors, config, torch.cat((torch.zeros_like(ids[:, :5]), ids), dim=1))[:, 5:]
    assert (padded - alone).abs().max() > 0.1 * alone.std()  # attention_mask has no effect

    model = golden_model()
    ours, states = model(ids)
    wider = torch.cat((ids, torch.full_like(ids[:, :5], 7)), dim=1)
    ours_padded, padded_states = model(wider, seq_lens=torch.tensor([12]))
    assert (ours_padded[:, :12] - ours).abs().max() < 1e-12 * ours.std()
    for state, padded_state in zip(states, padded_states, strict=True):
        torch.testing.assert_close(padded_state, state, rtol=0, atol=1e-12)


def test_official_angles_are_wrong_at_far_positions_and_ours_are_not() -> None:
    inv_freq = 1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64))
    position = torch.tensor([999_999])
    exact = position.double().unsqueeze(-1) * inv_freq.double()
    ours = torch.stack(rotation(position, inv_freq, torch.float32))
    official = torch.stack(rotation(position, inv_freq, torch.float32, official_angles=True))
    right = torch.stack((exact.cos(), exact.sin()))
    assert (ours - right).abs().max() < 1e-7
    assert (official - right).abs().max() > 5e-3
