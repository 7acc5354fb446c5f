"""How far a kernel's output and state may be from the float64 reference: rounding, followed to the result.

A fixed tolerance cannot serve random calls: GroupNorm divides by the spread of a group, softmax turns an
absolute error of its exponents into a relative one, and either can be large or small. So each result element
gets a scale, the root mean square of what relative errors of size one, independent in every operand, would do
to it at first order; a bound is `Tolerance.unit` such errors, a few of the type's unit roundoff. With
ζ(x)² = max_j Σ_i x_i² P_ij² (exponents of the softmax) and fade, b, r as in docs/mathematics.md,

    state    var S  = fade²·var S + b² φ_k² v² (1 + ζ_k²)          errors of the operands of each write
    read     var o  = (1 + ζ_q²)·( o² + mean over the head of o² + r² φ_q²·Σ fade² b² φ_k² v² )
                      + r² φ_q²·var S
    output   var y  = (w·silu(g)/σ)²·( var o + (1 + n²)·mean over the group of var o ) + y²

The mean of o² stands for the scores φ_q·φ_k, which are rounded too where they pass through matrix units. What
the state already holds is float32 and enters `state` with float32's roundoff only: a state stored in T does
not pass.

float16 resolves nothing below its subnormals, however small a number is. That is an absolute error of each
operand: of φ, and of what is written to the state, fade·b·v, as it is when a chunk of tokens ends. A token's
fade inside its chunk does not make it smaller, so `_coarse_state` follows it from the chunk's end on. A state
may be beyond float16: a kernel may keep it and what is written to it in one scale, small enough for any state
that the values could make.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from support.makers.kernel_cases import LEAST_LOG_DECAY, Call, fill_padding
from torch import Tensor

from dijiang_export.reference import attention as att
from dijiang_export.reference.rope import rotate, rotation


@dataclass(frozen=True)
class Tolerance:
    """A bound is roundings · roundoff · scale + least."""

    roundoff: float
    """Unit roundoff of the type that the operands of matrix products have."""
    roundings: float
    """How many independent roundings a result may be away."""
    subnormal: float
    """What the type cannot resolve near zero, relative to `roundoff`."""
    least: float
    """Absolute, of outputs: half the spacing of the type's smallest numbers."""
    reason: str

    def unit(self, length: int, steps: int = 1) -> float:
        """Of a call of `length` tokens, whose state went through `steps` calls.

        A float32 sum of n terms, one after another, errs by the root of n of its roundings, and each call
        fades the state by a float32 number: half a unit in the last place, every time the same.
        """
        return self.roundings * self.roundoff + (4 * math.sqrt(length) + steps) * 2.0**-24


TOLERANCES = {
    torch.float32: Tolerance(
        2.0**-24, 64, 0.0, 1e-30,
        "sums of up to 2048 float32 terms in any order, the usual approximations of exp, sin and cos (2 to 4 "
        "units in the last place) and angles at 10^6. PyTorch's float32 reaches 30 (states of heads of 256); "
        "TF32 operands, whose unit is 8192 times larger, do not pass",
    ),
    torch.float16: Tolerance(
        2.0**-11, 4, 2.0**-14, 2.0**-24,
        "operands of matrix products rounded once to T, everything else float32: two or three roundings in "
        "each path, each uniform within its unit. The emulation of such a kernel reaches 2",
    ),
    torch.bfloat16: Tolerance(
        2.0**-8, 4, 0.0, 1e-38,
        "as for float16, with 8 bits",
    ),
}  # fmt: skip
STATE_ROUNDOFF = 2.0**-24
"""Of what the state already holds: float32 in every type."""
CHUNK = 64
"""Tokens that a kernel writes to the state at once, at most."""
LARGEST_UNSCALED = 8.0
"""Of a state without such a scale: float16's 2^16, less 2^8 for a scale of the features, so that small ones
are no subnormals, and 2^5 for the state to grow."""


@dataclass(frozen=True)
class Exact:
    """float64 results and their scales (see the module): output [B, L, H·d], state [B, H, d, d]."""

    output: Tensor
    state: Tensor
    output_scale: Tensor
    state_scale: Tensor


def widened(call: Call) -> Call:
    """The call in float64 as an implementation must see it: P rounded to T, log_decay clamped, no padding."""
    call = fill_padding(call, 0.0)
    wide = {k: v.double() for k, v in call.tensors().items() if v.is_floating_point()}
    wide["proj"] = call.proj.to(call.dtype).double()
    wide["log_decay"] = wide["log_decay"].clamp(min=LEAST_LOG_DECAY)
    wide["inv_freq"] = call.inv_freq.nan_to_num()
    lens = call.seq_lens.clamp(0, call.length)
    return call.with_(**wide, seq_lens=lens)


def run_reference(call: Call, form: att.Form | None = None) -> tuple[Tensor, Tensor]:
    """The definition itself (chunked, which equals it to 1e-12, for long calls)."""
    names = (
        "qkv",
        "gate",
        "past_state",
        "positions",
        "seq_lens",
        "proj",
        "norm_weight",
        "norm_bias",
        "inv_freq",
    )
    form = form or ("recurrent" if call.length <= 4 else "chunked")
    arguments = (getattr(call, k) for k in names)
    return att.dijiang_attention(*arguments, decay=call.decay, attributes=call.geometry, form=form)


def exact(call: Call) -> Exact:
    wide = widened(call)
    output, state = run_reference(wide)
    tolerance, g = TOLERANCES[call.dtype], call.geometry
    shared = g.num_heads // g.num_kv_heads
    split = [n * g.head_dim for n in (g.num_heads, g.num_kv_heads, g.num_kv_heads)]
    q, k, v = (
        x.reshape(*x.shape[:2], -1, g.head_dim).transpose(1, 2) for x in torch.split(wide.qkv, split, dim=-1)
    )
    if g.rotary_dim:
        at = wide.positions.unsqueeze(-1) + torch.arange(wide.length, device=q.device)
        cos, sin = (t.unsqueeze(1) for t in rotation(at, wide.inv_freq, torch.float64))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    error_q, error_k = (1 + (x.square() @ wide.proj.square()).amax(-1, keepdim=True) for x in (q, k))
    q, k = (att.feature_map(x, wide.proj).square() for x in (q, k))
    k, v2, error_k = (x.repeat_interleave(shared, dim=1) for x in (k, v.square(), error_k))
    terms = att.token_terms(wide.decay, wide.positions, wide.seq_lens, wide.length, torch.float64)
    # φ_q, and b·φ_k or b·v, are operands: near zero T resolves them to its subnormals only.
    gain2, coarse = terms.gain.square().unsqueeze(-1), tolerance.subnormal**2
    phi_k2, value2 = k, v2
    v2 = v2 + coarse / gain2.clamp(min=coarse or 1e-300)
    k = k * gain2 + coarse
    q = q + coarse
    valid = wide.valid().double().unsqueeze(1).expand_as(terms.gain)
    squared = att.TokenTerms(2 * terms.log_decay, valid, terms.read_scale.square())
    past2 = wide.past_state.square()
    known = (STATE_ROUNDOFF / tolerance.roundoff) ** 2
    # One pass of the recurrence over squares, two sets of columns: plain, and with the errors of the writes.
    columns = torch.cat((v2, v2 * error_k), dim=-1)
    read, ends = att.FORMS["chunked"](q, k, columns, squared, torch.cat((past2, past2 * known), dim=-1))
    (plain, erring), state_variance = read.split(g.head_dim, -1), ends.split(g.head_dim, -1)[1]
    if coarse:
        written = (gain2 * value2).amax((-1, -2), keepdim=True).sqrt()  # at most: features are below one
        most = past2.amax((-1, -2), keepdim=True).sqrt() + wide.length * written
        scale2 = (most / LARGEST_UNSCALED).clamp(min=1).square()
        state_variance = state_variance + _coarse_state(phi_k2, value2, squared, coarse, coarse * scale2)

    o = _raw_output(wide).unflatten(-1, (g.num_heads, g.head_dim)).transpose(1, 2)
    variance = error_q * (o.square() + o.square().mean(-1, keepdim=True) + plain) + erring
    grouped = variance.transpose(1, 2).flatten(-2).unflatten(-1, (g.head_dim, g.num_heads))
    o = o.transpose(1, 2).flatten(-2).unflatten(-1, (g.head_dim, g.num_heads))
    centred = o - o.mean(-1, keepdim=True)
    largest = o.abs().amax(-1, keepdim=True).clamp(min=1)
    spread2 = centred.square().mean(-1, keepdim=True) + largest.square() * (
        (g.epsilon / largest.square()).clamp(min=att.LEAST_EPSILON)
    )
    if g.num_heads == 1:  # one channel less itself is zero however it was rounded
        grouped = torch.zeros_like(grouped)
    normed2 = centred.square() / spread2
    relative = (grouped + (1 + normed2) * grouped.mean(-1, keepdim=True)) / spread2
    gate = (wide.norm_weight * torch.nn.functional.silu(wide.gate)).square()
    # Arithmetic on each channel after the sums is float32's.
    shift = (wide.norm_bias * torch.nn.functional.silu(wide.gate)).square() * known
    output_scale = (gate * relative.flatten(-2) + output.square() + shift).sqrt()
    return Exact(output, state, output_scale, state_variance.sqrt())


def _coarse_state(k2: Tensor, v2: Tensor, squared: att.TokenTerms, feature: float, value: Tensor) -> Tensor:
    """What absolute errors of a chunk's operands do to the state at the end, squared: [B, H, d, d].

    Args:
        k2, v2: φ_k² and v², [B, H, L, d].
        squared: twice log_decay, one or (padding) zero for gain.
        feature, value: squares of the absolute errors of φ_k and of what is written, in roundoffs.
    """
    chunks = torch.nn.functional.pad(squared.log_decay, (0, -squared.log_decay.shape[-1] % CHUNK))
    fades = torch.zeros_like(chunks).unflatten(-1, (-1, CHUNK))
    fades[..., 0] = chunks.unflatten(-1, (-1, CHUNK)).sum(-1)  # a whole chunk's, before its first write
    ends = att.TokenTerms(
        fades.flatten(-2)[..., : squared.log_decay.shape[-1]], squared.gain, squared.read_scale
    )
    found = torch.zeros(*k2.shape[:2], k2.shape[-1], k2.shape[-1], dtype=k2.dtype, device=k2.device)
    for features, values in ((k2, value.expand_as(v2)), (torch.full_like(k2, feature), v2 + value)):
        found = found + att.chunked(features, features, values, ends, torch.zeros_like(found), CHUNK)[1]
    return found


def _raw_output(wide: Call) -> Tensor:
    """o before GroupNorm, [B, L, H·d], through the reference itself."""
    seen: list[Tensor] = []

    def keep(x: Tensor, *_: object) -> Tensor:
        seen.append(x)
        return x

    original, att.group_norm = att.group_norm, keep  # type: ignore[assignment]
    try:
        run_reference(wide)
    finally:
        att.group_norm = original
    return seen[0]


@dataclass(frozen=True)
class Errors:
    """Largest error of each result in units of its bound; infinite if something is not finite or not exact
    that must be. 1 is the most that passes."""

    output: float
    state: float
    where: str

    @property
    def worst(self) -> float:
        return max(self.output, self.state)


def compare(
    call: Call, output: Tensor, state: Tensor, truth: Exact | None = None, *, steps: int = 1
) -> Errors:
    """Errors of one result.

    Args:
        call: what was computed.
        output: T [B, L, H·d], on the call's device.
        state: float32 [B, H, d, d].
        truth: exact(call), if it is known already.
        steps: how many calls made this result.
    """
    assert output.shape == (*call.gate.shape,) and state.shape == call.past_state.shape
    assert output.dtype == call.dtype and state.dtype == torch.float32
    truth = truth or exact(call)
    tolerance, lens = TOLERANCES[call.dtype], call.seq_lens.clamp(0, call.length)
    unit = tolerance.unit(call.length, steps)
    valid = call.with_(seq_lens=lens).valid()
    if (output[~valid] != 0).any():  # NaN too
        return Errors(math.inf, 0.0, "output on padding is not zero")
    empty = lens == 0
    if not torch.equal(_bits(state[empty]), _bits(call.past_state[empty])):
        return Errors(0.0, math.inf, "the state of an empty row changed")
    ratios, places = [], []
    for name, got, expected, scale, floor in (
        ("output", output, truth.output, truth.output_scale, tolerance.least),
        ("state", state, truth.state, truth.state_scale, 1e-37),
    ):
        ratio = (got.double() - expected).abs() / (unit * scale + floor)
        # An output beyond T's range is infinite in T: right if, and only if, the reference is beyond it.
        beyond = expected.abs() > torch.finfo(got.dtype).max
        ratio = torch.where(beyond, (got.double() != expected.sign() * math.inf) * math.inf, ratio)
        ratio = torch.where(ratio.isnan(), math.inf, ratio)
        worst = int(ratio.argmax()) if ratio.numel() else 0
        ratios.append(float(ratio.flatten()[worst]) if ratio.numel() else 0.0)
        if ratio.numel():
            at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape))
            bad = int((ratio > 1).sum())
            bound = float(unit * scale[at] + floor)
            places.append(
                f"{name}{list(at)} = {float(got[at]):.8g}, exact {float(expected[at]):.8g}, "
                f"{ratios[-1]:.3g} bounds of {bound:.2g}; {bad} of {ratio.numel()} wrong"
            )
    return Errors(ratios[0], ratios[1], "; ".join(places))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
