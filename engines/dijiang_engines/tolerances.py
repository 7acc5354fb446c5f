"""The one table of tolerances: how far an output may be from its reference, and why.

A row is a (bundle dtype, quantity) pair. Quantities:

logits   one vector [V], against the recorded reference; errors are in units of the standard deviation
         of the case's recorded logits, so that a bound means the same for every model
state    one layer's [H, d, d] of one row, against the recorded reference; errors are in units of the
         largest absolute value in the same head of that layer's recorded state
padding  logits or a state against the same runner's own result for the same tokens with another
         amount of padding, in the same units as above

A finished row's state is not in this table: it must stay the same bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dijiang_engines.errors import UsageError

Quantity = Literal["logits", "state", "padding"]


@dataclass(frozen=True)
class Tolerance:
    """Bounds that one compared array must meet; None = not judged.

    All bounds are inclusive: `value <= bound` (or `>=` for the `min_` ones).
    """

    max_error: float
    """Largest |got - reference| in units of the reference's scale."""
    min_cosine: float | None
    """Least cosine of the angle between got and reference."""
    max_kl: float | None
    """Most KL(softmax(reference) || softmax(got)) in nats; logits only."""
    reason: str
    """Why these numbers."""


_TABLE: dict[tuple[str, str], Tolerance] = {
    ("float32", "logits"): Tolerance(
        max_error=1e-4,
        min_cosine=1 - 1e-6,
        max_kl=1e-6,
        reason=(
            "float32 forwards of one mathematics differ by a few 1e-6 of the logits' spread (the official "
            "code against its own float64: 2e-6 to 5e-6); 1e-4 leaves room for depth and other summation "
            "orders, and a wrong weight, layer or position gives 1e-2 and more. Cosine and KL follow "
            "quadratically (about 1e-8): their bounds catch what a maximum cannot, at 100 times that."
        ),
    ),
    ("float32", "state"): Tolerance(
        max_error=1e-4,
        min_cosine=1 - 1e-6,
        max_kl=None,
        reason=(
            "the state is a decayed sum of products of float32 activations, accumulated in float32: slow "
            "heads add some hundred terms, whose rounding stays near 1e-6 of the largest entry"
        ),
    ),
    ("float32", "padding"): Tolerance(
        max_error=1e-4,
        min_cosine=1 - 1e-6,
        max_kl=1e-6,
        reason=(
            "other lengths select other matrix kernels and chunk borders, so sums are reordered and not "
            "bit-equal; anything that leaks from padding is of the size of an activation, not of rounding"
        ),
    ),
    ("float16", "logits"): Tolerance(
        max_error=5e-2,
        min_cosine=1 - 1e-3,
        max_kl=5e-3,
        reason=(
            "the reference is computed in float64 from the same rounded weights, so what is left is the "
            "rounding of activations: 2^-11 = 4.9e-4 for each of a few operations a layer, growing with the "
            "root of their number and with residual outliers; the largest of thousands of entries is some "
            "4 to 5 times the typical one. Five layers measured 7.4e-3 (docs/evidence/)"
        ),
    ),
    ("float16", "state"): Tolerance(
        max_error=3e-2,
        min_cosine=1 - 1e-3,
        max_kl=None,
        reason=(
            "products are summed in float32, but their factors are float16 activations (2^-11 each), and "
            "softmax over d features multiplies an absolute error of its exponents into a relative one"
        ),
    ),
    ("float16", "padding"): Tolerance(
        max_error=5e-2,
        min_cosine=1 - 1e-3,
        max_kl=5e-3,
        reason="other kernels round float16 activations elsewhere: the same distance as to the reference",
    ),
    ("bfloat16", "logits"): Tolerance(
        max_error=3e-1,
        min_cosine=1 - 2e-2,
        max_kl=5e-2,
        reason=(
            "8 bits of significand: 2^-8 = 3.9e-3 a rounding, 8 times float16's; errors scale likewise, "
            "cosine and KL with their square. Three layers measured 2.4e-2 (docs/evidence/)"
        ),
    ),
    ("bfloat16", "state"): Tolerance(
        max_error=2e-1,
        min_cosine=1 - 2e-2,
        max_kl=None,
        reason="as for float16, with factors that carry 2^-8; the sum itself stays float32",
    ),
    ("bfloat16", "padding"): Tolerance(
        max_error=3e-1,
        min_cosine=1 - 2e-2,
        max_kl=5e-2,
        reason="other kernels round bfloat16 activations elsewhere: the same distance as to the reference",
    ),
}

DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")


def tolerance(dtype: str, quantity: Quantity) -> Tolerance:
    """The bounds for a bundle of `dtype`.

    Raises:
        UsageError: the table has no such row.
    """
    try:
        return _TABLE[dtype, quantity]
    except KeyError:
        raise UsageError(
            "no tolerance is known for this kind of output",
            got=f"{dtype} {quantity}",
            expected=f"one of {', '.join(DTYPES)}, and logits, state or padding",
        ) from None


def all_tolerances() -> dict[tuple[str, str], Tolerance]:
    """A copy of the whole table, keyed by (dtype, quantity)."""
    return dict(_TABLE)
