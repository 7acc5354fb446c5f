"""Compare an output with its reference: non-finite values fail first, then shapes, then errors.

Every check is written so that a NaN fails it (`error <= bound` is False for NaN), and every number is
computed in float64. Results are frozen dataclasses of plain Python values; `to_json` never emits NaN.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dijiang_engines.validation.tolerances import Tolerance

Array = npt.NDArray[Any]

HEAD_FLOOR = 1e-3
"""The least unit of a head's relative error, as a part of the largest |reference| of all heads."""


@dataclass(frozen=True)
class Comparison:
    """How one array compares with its reference.

    Metrics are None where they are undefined or were not reached: an array that fails for non-finite
    values or for its shape has none.
    """

    passed: bool
    reason: str
    """Why it failed, in words; empty if it passed."""
    max_abs_error: float | None = None
    relative_error: float | None = None
    """The largest error in units of `scale`; None too if the reference leaves no unit (it is constant)."""
    scale: float | None = None
    """The reference's standard deviation (logits) or largest absolute value in the worst head (states)."""
    cosine: float | None = None
    """Of the two arrays as vectors; None if either is all zero. For many logits: the least over vectors."""
    top1: float | None = None
    """Share of logits vectors with the same largest entry. Shown, not judged: the bound on the error decides
    how near a tie may be broken the other way."""
    kl: float | None = None
    """KL(softmax(reference) || softmax(got)) in nats, the largest over vectors; logits only."""
    worst: tuple[int, ...] | None = None
    """Index of the largest relative error, or of the first non-finite or changed value."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"worst": None if self.worst is None else list(self.worst)}


def compare_logits(
    got: Array, reference: Array, tolerance: Tolerance, *, scale: float | None = None
) -> Comparison:
    """Compare logits [..., V].

    Args:
        got: what a runner returned, any float type.
        reference: what was recorded, same shape.
        tolerance: the bounds.
        scale: unit of the relative error; default: the standard deviation of `reference`. Give that of
            the whole case when `reference` is one of its vectors, so that all are judged alike.
    """
    early = _early_failure(got, reference)
    if early is not None:
        return early
    g, r = got.astype(np.float64), reference.astype(np.float64)
    if scale is None:
        scale = float(r.std())
    g2, r2 = g.reshape(-1, g.shape[-1]), r.reshape(-1, r.shape[-1])
    cosines = [c for c in (_cosine(a, b) for a, b in zip(g2, r2, strict=True)) if c is not None]
    kl = float(kl_divergence(r2, g2).max())
    top1 = float((g2.argmax(-1) == r2.argmax(-1)).mean())
    return _judge(g, r, tolerance, scale, cosine=min(cosines, default=None), top1=top1, kl=kl)


def compare_state(got: Array, reference: Array, tolerance: Tolerance) -> Comparison:
    """Compare states [..., H, d, d], each head in units of its own largest |reference|.

    Per head, because a slow head's entries outgrow a fast head's by the number of tokens that it adds up,
    and would hide its errors. A head's unit is never below `HEAD_FLOOR` of the whole array's, so that a head
    which holds nearly nothing is not judged by its rounding.

    Args:
        got: what a runner holds, any float type.
        reference: what was recorded, same shape.
        tolerance: the bounds.
    """
    early = _early_failure(got, reference)
    if early is not None:
        return early
    g, r = got.astype(np.float64), reference.astype(np.float64)
    heads = np.abs(r).max(axis=(-2, -1), keepdims=True)
    heads = np.maximum(heads, HEAD_FLOOR * heads.max())
    return _judge(g, r, tolerance, heads, cosine=_cosine(g, r))


def compare_bits(got: Array, reference: Array) -> Comparison:
    """Demand the same bytes: for a state that must not have been touched (NaN payloads and -0.0 count)."""
    early = _early_failure(got, reference)
    if early is not None:
        return early
    if got.dtype != reference.dtype:
        return Comparison(False, f"element type is {got.dtype}, expected {reference.dtype}")
    a = np.ascontiguousarray(got).view(np.uint8)
    b = np.ascontiguousarray(reference).view(np.uint8)
    if np.array_equal(a, b):
        return Comparison(True, "", max_abs_error=0.0)
    diff = np.abs(got.astype(np.float64) - reference.astype(np.float64))
    changed = (a != b).reshape(*got.shape, got.dtype.itemsize).any(-1)
    worst = _index(diff.argmax() if diff.max() > 0 else changed.argmax(), diff.shape)
    return Comparison(
        False,
        f"{int(changed.sum())} of {changed.size} values changed, by up to {diff.max():.3g}; none may",
        max_abs_error=float(diff.max()),
        worst=worst,
    )


def kl_divergence(reference: Array, got: Array) -> npt.NDArray[np.float64]:
    """KL(softmax(reference) || softmax(got)) in nats along the last axis, in float64."""
    log_p, log_q = log_softmax(reference), log_softmax(got)
    # Exactly zero or more in exact arithmetic; rounding may leave -1e-17.
    kl: npt.NDArray[np.float64] = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
    return kl


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Logarithm of softmax along the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def _early_failure(got: Array, reference: Array) -> Comparison | None:
    """Non-finite values, then shape: what makes any error metric meaningless."""
    for array, name in ((got, "the output"), (reference, "the reference itself")):
        if not np.issubdtype(array.dtype, np.floating):
            return Comparison(False, f"{name} holds {array.dtype}, not floating-point numbers")
        finite = np.isfinite(array)
        if not finite.all():
            bad = int((~finite).sum())
            value = array.reshape(-1)[(~finite).reshape(-1).argmax()]
            return Comparison(
                False,
                f"{name} has {bad} non-finite of {array.size} values, the first is {value}",
                worst=_index((~finite).argmax(), array.shape),
            )
    if got.shape != reference.shape:
        return Comparison(False, f"shape is {list(got.shape)}, expected {list(reference.shape)}")
    if got.size == 0:
        return Comparison(False, f"nothing to compare: shape is {list(got.shape)}")
    return None


def _judge(
    got: Array,
    reference: Array,
    tolerance: Tolerance,
    scale: float | Array,
    *,
    cosine: float | None,
    top1: float | None = None,
    kl: float | None = None,
) -> Comparison:
    diff = np.abs(got - reference)
    scales = np.broadcast_to(np.asarray(scale, dtype=np.float64), diff.shape)
    # A reference without any spread leaves no unit to measure in: then only equality passes.
    with np.errstate(divide="ignore"):
        ratio = np.divide(diff, scales, out=np.zeros(diff.shape), where=diff > 0)
    worst = _index(ratio.argmax(), ratio.shape)
    relative = float(ratio[worst])
    failures = []
    if not relative <= tolerance.max_error:
        failures.append(f"relative error {relative:.3g}, at most {tolerance.max_error:.3g} allowed")
    if tolerance.min_cosine is not None and cosine is not None and not cosine >= tolerance.min_cosine:
        failures.append(f"cosine {cosine:.9g}, at least {tolerance.min_cosine:.9g} expected")
    if tolerance.max_kl is not None and kl is not None and not kl <= tolerance.max_kl:
        failures.append(f"KL divergence {kl:.3g}, at most {tolerance.max_kl:.3g} allowed")
    return Comparison(
        passed=not failures,
        reason="; ".join(failures),
        max_abs_error=float(diff.max()),
        relative_error=relative if np.isfinite(relative) else None,
        scale=float(scales[worst]),
        cosine=cosine,
        top1=top1,
        kl=kl,
        worst=worst,
    )


def _cosine(a: Array, b: Array) -> float | None:
    a, b = a.reshape(-1), b.reshape(-1)
    # Scaled first: squares of 1e-200 vanish and of 1e200 overflow.
    largest_a, largest_b = np.abs(a).max(), np.abs(b).max()
    if largest_a == 0 or largest_b == 0:
        return None
    a, b = a / largest_a, b / largest_b
    # Sums of products, not dot products: BLAS would start threads that fight with the runtime's.
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def _index(flat: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(flat), shape))
