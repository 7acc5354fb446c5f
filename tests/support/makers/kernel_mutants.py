"""Wrong implementations of DijiangAttention that comparisons must not let pass: the mistakes one makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support.makers.kernel_cases import Call, fill_padding
from support.oracles.kernel_bounds import run_reference, widened
from torch import Tensor

from dijiang_engines.op_contract import Attributes
from dijiang_export.reference import attention as att

Result = tuple[Tensor, Tensor]
Mutant = Callable[[Call], Result]

MUTANTS: dict[str, Mutant] = {}


def finished(call: Call, result: Result) -> Result:
    """As a kernel would return it: output in T, state in float32, an empty row's state untouched."""
    output, state = result
    empty = (call.seq_lens == 0)[:, None, None, None]
    return output.to(call.dtype), torch.where(empty, call.past_state, state.float())


def correct(call: Call) -> Result:
    return finished(call, run_reference(widened(call)))


def mutant(name: str) -> Callable[[Mutant], Mutant]:
    def register(function: Mutant) -> Mutant:
        MUTANTS[name] = function
        return function

    return register


def _changed(name: str, change: Callable[[Call], Call]) -> None:
    """A mutant that computes another call rightly."""
    MUTANTS[name] = lambda call: finished(call, run_reference(change(widened(call))))


@contextmanager
def _patched(**replacements: Any) -> Iterator[None]:
    saved = {name: getattr(att, name) for name in replacements}
    try:
        for name, value in replacements.items():
            setattr(att, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(att, name, value)


def _replaced(name: str, **replacements: Any) -> None:
    """A mutant that uses another function of the reference."""

    def run(call: Call) -> Result:
        with _patched(**replacements):
            return finished(call, run_reference(widened(call)))

    MUTANTS[name] = run


def _columns(call: Call, order: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Call:
    g = call.geometry
    parts = torch.split(call.qkv, [n * g.head_dim for n in (g.num_heads, g.num_kv_heads, g.num_kv_heads)], -1)
    return call.with_(qkv=torch.cat(order(*parts), dim=-1))


def _kv_interleaved(call: Call) -> Call:
    """Head h reads kv head h % Hkv: the same as spelling the repeated kv heads out in another order."""
    g = call.geometry
    order = torch.arange(g.num_heads) % g.num_kv_heads

    def spread(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (x.unflatten(-1, (g.num_kv_heads, -1))[..., order, :].flatten(-2) for x in (k, v))
        return q, k, v

    geometry = Attributes(g.num_heads, g.num_heads, g.head_dim, g.rotary_dim, g.epsilon)
    return _columns(call, spread).with_(geometry=geometry)


_changed("P transposed", lambda c: c.with_(proj=c.proj.T.contiguous()))
_changed("q and k swapped", lambda c: _columns(c, lambda q, k, v: (k, q, v)))
_changed("k and v swapped", lambda c: _columns(c, lambda q, k, v: (q, v, k)))
_changed("positions off by one", lambda c: c.with_(positions=c.positions + 1))
_changed("positions ignored", lambda c: c.with_(positions=c.positions * 0))
_changed("past state ignored", lambda c: c.with_(past_state=c.past_state * 0))
_changed("past state transposed", lambda c: c.with_(past_state=c.past_state.mT))
_changed("log_decay 1% off", lambda c: c.with_(log_decay=c.log_decay * 1.01))
_changed("no fade", lambda c: c.with_(log_decay=c.log_decay * 0))
_changed("decay of the neighbouring head", lambda c: c.with_(log_decay=c.log_decay.roll(1, -1)))
_changed("no gain", lambda c: c.with_(gain=torch.ones_like(c.gain)))
_changed("gain without sign", lambda c: c.with_(gain=c.gain.abs()))
_changed("no read_scale", lambda c: c.with_(read_scale=torch.ones_like(c.read_scale)))
_changed("one row fewer in the tables", lambda c: c.with_(
    log_decay=c.log_decay[:-1], gain=c.gain[:-1], read_scale=c.read_scale[:-1]))  # fmt: skip
_changed("kv heads interleaved", _kv_interleaved)
_changed("norm weight missing", lambda c: c.with_(norm_weight=torch.ones_like(c.norm_weight)))
_changed("norm bias missing", lambda c: c.with_(norm_bias=c.norm_bias * 0))
_changed("one token fewer", lambda c: c.with_(seq_lens=(c.seq_lens - 1).clamp(min=0)))
_changed("one token more", lambda c: fill_padding(c, 2.0).with_(
    seq_lens=(c.seq_lens + 1).clamp(max=c.length)))  # fmt: skip
_changed("epsilon 10 times larger", lambda c: c.with_(
    geometry=Attributes(*[*vars(c.geometry).values()][:4], 10 * c.geometry.epsilon)))  # fmt: skip
_changed("no rotation", lambda c: c.with_(
    geometry=Attributes(*[*vars(c.geometry).values()][:3], 0, c.geometry.epsilon)))  # fmt: skip


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = 2 * cos.shape[-1]
    even, odd = x[..., :r:2], x[..., 1:r:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned, x[..., r:]), dim=-1)


def _rotation_f32(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, **_: object) -> Result:
    angles = positions.float().unsqueeze(-1) * inv_freq.float()
    return angles.cos().to(dtype), angles.sin().to(dtype)


_group_norm, _rotate = att.group_norm, att.rotate
_replaced("neighbours rotated", rotate=_rotate_pairs)
_replaced("rotated the other way", rotate=lambda x, cos, sin: _rotate(x, cos, -sin))
_replaced("angles in float32", rotation=_rotation_f32)
_replaced("scaled before the softmax",
          feature_map=lambda u, p: torch.softmax(u @ p / u.shape[-1] ** 0.5, dim=-1))  # fmt: skip
_replaced("features not normalised", feature_map=lambda u, p: (u @ p).exp())
_replaced("groups across heads", group_norm=lambda x, n, w, b, e: _group_norm(
    x.unflatten(-1, (-1, n)).mT.flatten(-2), n, *(y.unflatten(-1, (-1, n)).mT.flatten() for y in (w, b)), e
).unflatten(-1, (n, -1)).mT.flatten(-2))  # fmt: skip
_replaced(
    "as many groups as heads", group_norm=lambda x, n, w, b, e: _group_norm(x, x.shape[-1] // n, w, b, e)
)


def _unbiased(x: Tensor, groups: int, w: Tensor, b: Tensor, e: float) -> Tensor:
    y = x.unflatten(-1, (groups, -1))
    y = (y - y.mean(-1, keepdim=True)) * (y.var(-1, correction=1, keepdim=True) + e).rsqrt()
    return y.flatten(-2) * w + b


def _no_mean(x: Tensor, groups: int, w: Tensor, b: Tensor, e: float) -> Tensor:
    y = x.unflatten(-1, (groups, -1))
    return (y * (y.square().mean(-1, keepdim=True) + e).rsqrt()).flatten(-2) * w + b


_replaced("unbiased variance", group_norm=_unbiased)
_replaced("mean not subtracted", group_norm=_no_mean)


def _recurrence(fade_first: bool, chunk_fade: bool) -> Callable[..., Result]:
    def run(q: Tensor, k: Tensor, v: Tensor, terms: att.TokenTerms, state: Tensor) -> Result:
        outputs = []
        for t in range(q.shape[2]):
            read = state
            if chunk_fade or t % 64:
                state = terms.log_decay[:, :, t, None, None].exp() * state
            state = state + terms.gain[:, :, t, None, None] * k[:, :, t, :, None] * v[:, :, t, None, :]
            seen = state if fade_first else read
            outputs.append(terms.read_scale[:, :, t, None] * (q[:, :, t, None, :] @ seen).squeeze(2))
        return torch.stack(outputs, dim=2), state

    return run


_replaced("reads before it writes", FORMS=dict.fromkeys(att.FORMS, _recurrence(False, True)))
_replaced("no fade where a chunk begins", FORMS=dict.fromkeys(att.FORMS, _recurrence(True, False)))


@mutant("gate without SiLU")
def _(call: Call) -> Result:
    # silu(g') = sigmoid(g) has no simple inverse: divide the gate out of the right answer instead.
    output, state = run_reference(widened(call))
    gate = widened(call).gate
    return finished(call, (torch.where(gate == 0, 0.0, output / gate), state))


@mutant("output on padding")
def _(call: Call) -> Result:
    output, state = correct(call)
    return torch.where(call.valid().unsqueeze(-1), output, 1e-3), state


@mutant("padding written to the state")
def _(call: Call) -> Result:
    output, _ = correct(call)
    padded = fill_padding(widened(call), 2.0)
    _, state = run_reference(padded.with_(seq_lens=torch.full_like(call.seq_lens, call.length)))
    return output, finished(call, (output, state))[1]


@mutant("state kept in T")
def _(call: Call) -> Result:
    past = call.past_state.to(torch.bfloat16 if call.dtype == torch.float32 else call.dtype)
    return finished(call, run_reference(widened(call.with_(past_state=past.float()))))


@mutant("neighbouring batch rows' states swapped")
def _(call: Call) -> Result:
    output, state = correct(call)
    return output, state.roll(1, 0)


@mutant("a stale tile")
def _(call: Call) -> Result:
    """16 x 16 entries of the state keep their old values."""
    output, state = correct(call)
    state = state.clone()
    state[0, 0, :16, :16] = call.past_state[0, 0, :16, :16]
    return output, state


@mutant("not a number")
def _(call: Call) -> Result:
    output, state = correct(call)
    output[0, 0, 0] = torch.nan
    return output, state
