"""Random calls of DijiangAttention for the tests of its kernels: any geometry, type, batch and length, with
the decay terms, positions and magnitudes that real models and hostile reviewers come up with.

A `Case` is a few plain words that pytest prints and hypothesis draws; `make_call` turns it into tensors.
Valid tokens hold random numbers; padding holds the largest finite ones, since the contract allows them and an
implementation that only multiplies them by zero then gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from support.makers.decay_tables import official_gammas, trained_tables
from torch import Tensor

from dijiang_engines.op_contract import Attributes
from dijiang_export.checkpoint.decay import stable_tables
from dijiang_export.reference.attention import Decay

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEAST_LOG_DECAY = -30.0
"""What the C ABI makes of smaller ones (plugins/include/dijiang/kernels.h)."""

DecayKind = Literal["official", "trained", "none", "slowest", "mixed", "single-row"]
Magnitude = Literal["usual", "large-v", "peaked", "small", "huge-read"]


@dataclass(frozen=True)
class Case:
    """What a random call looks like.

    decay: "official" geometric γ; "trained" tables (noise, both signs, zeros, explosive ratios); "none" and
        "slowest" geometric with ln γ = 0 and -1e-9; "mixed" geometric heads of 0, -1e-9, ln(511/512), -30 and
        -100 (which counts as -30); "single-row" tables of one row.
    rows: of trained tables. Positions run past them, into the last row.
    lens: valid tokens per row, as given; None: the first row full, the second empty, the others in between.
    position: of the first row; the other rows start a little later.
    past: whether rows start from a random state (else zero).
    """

    heads: int = 4
    d: int = 64
    dtype: str = "float32"
    length: int = 1
    batch: int = 1
    kv_heads: int | None = None
    rotary: int = 16
    decay: DecayKind = "official"
    rows: int = 300
    magnitude: Magnitude = "usual"
    position: int = 0
    lens: tuple[int, ...] | None = None
    past: bool = True
    epsilon: float = 1e-5
    seed: int = 0

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return "Case(" + ", ".join(f"{k}={v!r}" for k, v in changed.items()) + ")"


@dataclass(frozen=True)
class Call:
    """One call's tensors, with the op contract's names, shapes and types (docs/op-contract.md)."""

    geometry: Attributes
    qkv: Tensor
    gate: Tensor
    past_state: Tensor
    positions: Tensor
    seq_lens: Tensor
    proj: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    inv_freq: Tensor
    log_decay: Tensor
    gain: Tensor | None = None
    read_scale: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.qkv.shape[0]

    @property
    def length(self) -> int:
        return self.qkv.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.qkv.dtype

    @property
    def decay(self) -> Decay:
        return Decay(self.log_decay, self.gain, self.read_scale)

    @property
    def table_rows(self) -> int:
        return 0 if self.gain is None else self.log_decay.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The inputs that are there, by name."""
        found = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        assert all(v.is_contiguous() for v in found.values())
        return found

    def to(self, device: str) -> Call:
        return replace(self, **{k: v.to(device) for k, v in self.tensors().items()})

    def with_(self, **changes: Any) -> Call:
        return replace(self, **changes)

    def tokens(self, start: int, stop: int) -> Call:
        """The same call for tokens start..stop-1; the state stays what it was."""
        lens = (self.seq_lens.clamp(0, self.length) - start).clamp(0, stop - start).to(torch.int32)
        return replace(
            self,
            qkv=self.qkv[:, start:stop].contiguous(),
            gate=self.gate[:, start:stop].contiguous(),
            positions=self.positions + start,
            seq_lens=lens,
        )

    def rows(self, index: Iterable[int]) -> Call:
        """The same call for these batch rows alone."""
        at = torch.tensor(list(index), device=self.qkv.device)
        names = ("qkv", "gate", "past_state", "positions", "seq_lens")
        return replace(self, **{k: getattr(self, k)[at].contiguous() for k in names})

    def valid(self) -> Tensor:
        """Bool [B, L]: tokens that are not padding."""
        return torch.arange(self.length, device=self.qkv.device) < self.seq_lens.unsqueeze(-1)


def sequence_lengths(case: Case) -> list[int]:
    if case.lens is not None:
        return list(case.lens)
    rng = np.random.default_rng(case.seed)
    lens = [case.length, 0, *rng.integers(1, case.length + 1, max(case.batch - 2, 0)).tolist()]
    return lens[: case.batch]


def make_call(case: Case, device: str = "cpu") -> Call:
    """The case's tensors on `device`. The same case gives the same numbers on one kind of device."""
    rng = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    heads, d, length, batch = case.heads, case.d, case.length, case.batch
    kv_heads = case.kv_heads or heads
    dtype = DTYPES[case.dtype]
    width = (heads + 2 * kv_heads) * d
    small, large_v = case.magnitude == "small", case.magnitude == "large-v"
    qkv, gate = normal(batch, length, width), 2 * normal(batch, length, heads * d)
    # Values decide how large the state is: thousands must not overflow anything, nor may 1e-3 get lost in ε.
    qkv[..., (heads + kv_heads) * d :] *= 2000.0 if large_v else 1e-3 if small else 1.0
    # Official P is an orthonormal DCT times learned weights near one; "peaked" is far beyond that.
    proj = normal(d, d) * (3.0 if case.magnitude == "peaked" else 1.0) / math.sqrt(d)
    if case.magnitude == "usual":
        proj *= 2
    log_decay, gain, read_scale = (None if t is None else t.to(device) for t in _decay(case))
    if case.magnitude == "huge-read" and read_scale is not None:
        read_scale = read_scale * 1e20
    scale = 1000.0 if large_v else 1e-4 if small else 0.5
    past = normal(batch, heads, d, d) * (scale if case.past else 0.0)
    lens = torch.tensor(sequence_lengths(case), dtype=torch.int32, device=device)
    half = case.rotary // 2
    exponents = torch.arange(max(half, 1), device=device) * 2 / max(case.rotary, 1)
    call = Call(
        geometry=Attributes(heads, kv_heads, d, case.rotary, case.epsilon),
        qkv=qkv.to(dtype),
        gate=gate.to(dtype),
        past_state=past,
        positions=torch.arange(batch, dtype=torch.int32, device=device) * 7 + case.position,
        seq_lens=lens,
        proj=proj,
        norm_weight=1 + 0.2 * normal(heads * d),
        norm_bias=0.3 * normal(heads * d),
        inv_freq=(1.0 / 10000.0**exponents).float() if half else torch.full((1,), math.nan, device=device),
        log_decay=log_decay,
        gain=gain,
        read_scale=read_scale,
    )
    return fill_padding(call, torch.finfo(dtype).max)


def fill_padding(call: Call, value: float) -> Call:
    """`value`, with alternating sign, in qkv and gate wherever tokens are padding."""

    def filled(x: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(x.shape[-1], device=x.device) % 2)
        return torch.where(call.valid().unsqueeze(-1), x, (signs * value).to(x.dtype))

    return replace(call, qkv=filled(call.qkv), gate=filled(call.gate))


def _decay(case: Case) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log_decay, gain and read_scale in float32 on the CPU."""
    heads = case.heads
    rng = torch.Generator().manual_seed(case.seed + 1)
    if case.decay == "trained":
        # Tables of float32's whole range want rows that stay below γ⁻ⁿ = 1e38 (row 2795 of the fastest head).
        d1, d2 = (t.double().reshape(heads, -1).numpy() for t in trained_tables(heads, case.rows, rng))
        tables = stable_tables(d1, d2)
        found = (tables.log_decay, tables.gain, tables.read_scale)
        return tuple(torch.from_numpy(np.ascontiguousarray(t)).float() for t in found)  # type: ignore[return-value]
    if case.decay == "single-row":
        noise = torch.randn(3, 1, heads, generator=rng)
        return -noise[0].abs() * 0.1, torch.tanh(noise[1]), 3 * noise[2]
    if case.decay == "mixed":
        kinds = torch.tensor([math.log(511 / 512), -1e-9, -30.0, 0.0, -100.0])
        return kinds.repeat(heads // 5 + 1)[:heads].clone(), None, None
    if case.decay in ("none", "slowest"):
        return torch.full((heads,), 0.0 if case.decay == "none" else -1e-9), None, None
    return official_gammas(heads).double().log().float(), None, None
