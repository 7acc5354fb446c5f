"""From the stored decay tables D1, D2 to the form that the recurrence uses: pure mathematics.

The official forward weighs token m for token n by D1[n]·D2[m] (modeling_gpt_neox_dijiang.py@3459531:283-288).
Two exact rewritings of it as a recurrence:

    geometric   D1[n] = γ^n, D2[n] = γ^-n:   S_n = γ·S_{n-1} + φ(k_n) ⊗ v_n,   o_n = φ(q_n)ᵀ S_n
    tables      S_n = exp(log_decay[n])·S_{n-1} + gain[n]·φ(k_n) ⊗ v_n,   o_n = read_scale[n]·φ(q_n)ᵀ S_n
                with c[n] = 1 / max_{m<=n} |D2[m]|,   log_decay[n] = ln(c[n] / c[n-1]) <= 0 (row 0: 0),
                gain[n] = c[n]·D2[n] (at most 1 in magnitude),   read_scale[n] = D1[n] / c[n]

The first has no last position. The second holds for any numbers, of either sign, and overflows nowhere that
the official float32 forward would not. Arrays here are float64, [H] or [N, H]; stored tables are [H, N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dijiang_engines.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float64]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]

# Unit roundoff (half a unit in the last place, relative), the spacing of subnormals, smallest normal.
_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-24}
_SUBNORMAL = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149, "float64": 2.0**-149}
_SMALLEST_NORMAL = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "float32": 2.0**-126, "float64": 2.0**-126}
_LEAST_OVERFLOW = 65504.0  # what float16 cannot hold any more; the other types overflow later


@dataclass(frozen=True)
class Geometric:
    """One γ per head: ln γ float64 [H], all <= 0, and how it was found (for people)."""

    log_decay: Array
    origin: str


@dataclass(frozen=True)
class Tables:
    """The recurrence's coefficients, float64 [N, H] each."""

    log_decay: Array
    gain: Array
    read_scale: Array


def classify(
    d1: Array,
    d2: Array,
    dtype: Dtype,
    *,
    where: str = "the decay tables",
    max_positions: int | None = None,
    keep_tables: bool = False,
) -> Geometric | Tables:
    """What a layer's stored tables stand for.

    Args:
        d1: float64 [H, N].
        d2: float64 [H, N]; may be infinite where `dtype` overflowed.
        dtype: the type in which they were stored.
        where: begins error messages.
        max_positions: use only that many rows of tables that are not geometric.
        keep_tables: do not look for γ: reproduces the stored numbers, with their rounding, exactly.

    Raises:
        CheckpointError: the tables are neither geometric nor finite.
    """
    if not keep_tables:
        geometric = find_gamma(d1, d2, dtype)
        if geometric is not None:
            return geometric
    if max_positions is not None:
        d1, d2 = d1[:, :max_positions], d2[:, :max_positions]
    return stable_tables(d1, d2, where=where)


def find_gamma(d1: Array, d2: Array, dtype: Dtype) -> Geometric | None:
    """γ per head, if every entry is what rounding leaves of γ^n (D1) and γ^-n (D2); otherwise None.

    Each entry allows an interval of ln γ; a head is geometric if all its intervals meet. Entries that
    overflowed to infinity or underflowed to zero bound γ from one side only. Within what is left, the
    value is chosen in this order:

    1. The official initialisation for H heads. Its γ is a float32 number (@3459531:155); tables stored in
       half precision cannot tell that from the same formula in float64, which is then taken.
    2. A float32 number in the interval, nearest its middle: γ was computed in float32.
    3. The middle.

    Args:
        d1: float64 [H, N].
        d2: float64 [H, N].
        dtype: the storage type. A coarser type is assumed if all entries are numbers of that type: tables
            that went through half precision on their way into a float32 file.
    """
    heads, _ = d1.shape
    precision = _coarsest_type(d1, d2, dtype)
    subnormal: Dtype = "float16" if "float16" in (dtype, precision) else precision
    bounds = [_log_gamma_bounds(t, s, precision, subnormal) for t, s in ((d1, 1.0), (d2, -1.0))]
    if bounds[0] is None or bounds[1] is None:
        return None
    low = np.maximum(bounds[0][0], bounds[1][0])
    high = np.minimum(np.minimum(bounds[0][1], bounds[1][1]), 0.0)
    if not np.all(low <= high):
        return None
    half = precision in ("float16", "bfloat16")
    # The float32 γ behind the stored entries differs from a float64 one by this much in ln γ.
    slack = 2.0**-24 if half else 0.0
    official = [np.log(official_gammas(heads, float64=f64)) for f64 in ((True,) if half else (False, True))]
    for candidate in official:
        if np.all((low - slack <= candidate) & (candidate <= high + slack)):
            return Geometric(candidate, "as the official code initialises it")
    return Geometric(_pick(low, high, half), f"fitted to {precision} tables")


def _coarsest_type(d1: Array, d2: Array, dtype: Dtype) -> Dtype:
    import torch

    order: list[Dtype] = ["bfloat16", "float16", "float32"]
    values = torch.from_numpy(np.concatenate((d1.ravel(), d2.ravel())))
    values = values[torch.isfinite(values)]
    for name in order[: order.index(dtype)] if dtype in order else order:
        if torch.equal(values.to(getattr(torch, name)).to(torch.float64), values):
            return name
    return "float32" if dtype == "float64" else dtype


def _log_gamma_bounds(
    table: Array, sign: float, precision: Dtype, subnormal: Dtype
) -> tuple[Array, Array] | None:
    """Float64 [H] lower and upper bounds of ln γ from one table; None if no positive γ is possible."""
    if np.isnan(table).any() or (table < 0).any():
        return None
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        magnitude = np.abs(np.log(np.where((table > 0) & np.isfinite(table), table, 1.0)))
        # Rounding to the storage type, after float32 arithmetic: a power (a few units in the last place,
        # more for implementations through exp(n·ln γ)) and for D2 a division.
        relative = _ROUNDOFF[precision] * (precision != "float32") + 2.0**-24 * (4 + 2 * magnitude)
        # Subnormal numbers have a fixed spacing; powers that end there may be off by all of it.
        below = table < _SMALLEST_NORMAL[subnormal]
        error = table * relative + np.where(below, 1.01 * _SUBNORMAL[subnormal], 0.0)
        least = np.where(table == 0, 0.0, np.where(np.isinf(table), _LEAST_OVERFLOW, table - error))
        most = np.where(table == 0, _SMALLEST_NORMAL[subnormal], table + error)
        low, high = np.log(np.maximum(least, 0.0)), np.log(most)
        if np.any((low[:, 0] > 0) | (high[:, 0] < 0)):
            return None  # row 0 is γ^0 = 1
        rows = np.arange(1, table.shape[1])
        if sign > 0:
            low, high = low[:, 1:] / rows, high[:, 1:] / rows
        else:
            low, high = -high[:, 1:] / rows, -low[:, 1:] / rows
    return low.max(axis=1, initial=-np.inf), high.min(axis=1, initial=np.inf)


def _pick(low: Array, high: Array, half: bool) -> Array:
    low = np.maximum(low, -700.0)  # γ far below any useful value: only if nothing bounds it
    middle = (low + high) / 2
    if half:
        return middle
    nearest = np.log(np.exp(middle).astype(np.float32).astype(np.float64))
    return np.where((low <= nearest) & (nearest <= high), nearest, middle)


def stable_tables(d1: Array, d2: Array, *, where: str = "the decay tables") -> Tables:
    """The overflow-free form of any finite tables [H, N] (see the module's formulas).

    While a head's D2 has been zero so far, its state is zero too and any c will do: the first one that is
    defined is taken.

    Raises:
        CheckpointError: an entry is infinite or NaN, or a read_scale exceeds float32.
    """
    d1, d2 = d1.T, d2.T
    bad = ~(np.isfinite(d1) & np.isfinite(d2))
    if bad.any():
        row = int(np.argwhere(bad.any(axis=1))[0, 0])
        hint = "save D1 and D2 in float32"
        if row > 0:
            hint += f", or use the rows before that with --max-positions {row}"
        raise CheckpointError(
            f"{where} are not geometric and hold values that are infinite or not a number",
            got=f"first in row {row} of {len(d1)}",
            hint=hint,
        )
    largest = np.maximum.accumulate(np.abs(d2), axis=0)
    started = largest > 0
    first = np.where(
        started.any(axis=0), np.take_along_axis(largest, started.argmax(axis=0)[None], 0)[0], 1.0
    )
    largest = np.where(started, largest, first)
    log_largest = np.log(largest)
    log_decay = np.zeros_like(largest)
    log_decay[1:] = log_largest[:-1] - log_largest[1:]
    with np.errstate(over="ignore"):
        read_scale = d1 * largest
        too_large = np.abs(read_scale) > np.finfo(np.float32).max
    if too_large.any():
        row, head = (int(i) for i in np.argwhere(too_large)[0])
        raise CheckpointError(
            f"{where} overflow float32: D1[n]·D2[m] is too large",
            got=f"row {row}, head {head}: D1 {d1[row, head]:.3g} times {largest[row, head]:.3g}",
            hint="training has diverged there" + (f"; --max-positions {row} uses less" if row else ""),
        )
    return Tables(log_decay, d2 / largest, read_scale)


def geometric_as_tables(geometric: Geometric, rows: int) -> Tables:
    """The same decay as `rows` rows of coefficients, for a model whose other layers need tables."""
    ones = np.ones((rows, len(geometric.log_decay)))
    log_decay = ones * geometric.log_decay
    log_decay[0] = 0.0
    return Tables(log_decay, ones, ones.copy())


def extend(tables: Tables) -> Tables:
    """One more row, to be read for every later position.

    Its gain and read_scale are the last ones, its log_decay the mean over the last quarter of the rows
    (at least one row).
    """
    quarter = max(1, len(tables.log_decay) // 4)
    mean = tables.log_decay[-quarter:].mean(axis=0, keepdims=True)
    return Tables(
        np.concatenate((tables.log_decay, mean)),
        np.concatenate((tables.gain, tables.gain[-1:])),
        np.concatenate((tables.read_scale, tables.read_scale[-1:])),
    )


def official_gammas(heads: int, *, float64: bool = False) -> Array:
    """γ [H] of the official initialisation, 1 - exp(linspace(ln 1/32, ln 1/512, H)) (@3459531:155).

    Computed by PyTorch in float32 as that code does it, or in float64; returned as float64.
    """
    import torch

    dtype = torch.float64 if float64 else torch.float32
    gammas = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=dtype))
    return np.asarray(gammas.double().numpy(), dtype=np.float64)


def official_tables(heads: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D1 and D2 as the official code initialises them (@3459531:154-162): float32 [1, H, N, 1]."""
    return geometric_tables(official_gammas(heads), positions)


def geometric_tables(gammas: Array, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """D1 = γ^n and D2 = γ^-n for `gammas` float64 [H], as float32 [1, H, N, 1].

    Beyond float32's range (for γ = 1 - 1/32 from row 2795 on) D2 is infinite, as it is in the official code;
    `find_gamma` reads through it.
    """
    import torch

    powers = torch.from_numpy(gammas).float().view(-1, 1, 1) ** torch.arange(positions).unsqueeze(1)
    return powers.float().unsqueeze(0), (1 / powers).float().unsqueeze(0)
