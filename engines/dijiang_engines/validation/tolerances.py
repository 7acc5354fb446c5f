"""The one table of tolerances: how far an output may be from its reference, and why.

A row is a (bundle dtype, quantity) pair, or (int8, quantity) where products of quantised matrices round
activations to int8. Quantities:

logits   one vector [V], against the recorded reference; errors are in units of the standard deviation
         of the case's recorded logits, so that a bound means the same for every model
state    one layer's [H, d, d] of one row, against the recorded reference; errors are in units of the
         largest absolute value in the same head of that layer's recorded state
padding  logits or a state against the same runner's own result for the same tokens with another
         amount of padding, in the same units as above

The numbers of a row hold for models whose rounding costs little: they are the floor. A deep model, or one
with large activations, gets more: what rounding to its type was measured to cost it (`rounding_cost`) times
a factor, up to a ceiling below what a mistake costs (`Scale`). Records without that measurement are judged
by the rows.

A finished row's state is not in this table: it must stay the same bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.rounding_cost import Cost, RoundingCost
from dijiang_engines.op_contract import T_TYPES
from dijiang_engines.weight_formats import Activations

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
    ("int8", "logits"): Tolerance(
        max_error=1e-1,
        min_cosine=1 - 2e-3,
        max_kl=5e-2,
        reason=(
            "activations are rounded to int8 in blocks of 32 before each product: half a step is 1/254 of "
            "the block's largest, some 1e-2 of its spread, and a product keeps that share. Five layers "
            "measured 7e-2 in logits, 3e-4 in 1 - cosine and 1.4e-3 in KL (docs/validation.md). KL is as "
            "uneven as the distributions at the marks, 1e-8 to 1.3e-2 in one model whose logits spread "
            "widely, so that few marks do not bound it: bfloat16's"
        ),
    ),
    ("int8", "state"): Tolerance(
        max_error=1e-1,
        min_cosine=1 - 2e-3,
        max_kl=None,
        reason="as for the logits: keys and values are such products. Five layers measured 7.6e-2",
    ),
    ("int8", "padding"): Tolerance(
        max_error=1e-1,
        min_cosine=1 - 2e-3,
        max_kl=5e-2,
        reason="what differs by a rounding before int8 may come out as another integer: as to the reference",
    ),
}


@dataclass(frozen=True)
class Scale:
    """How a measured rounding cost becomes a bound, for one type."""

    factor: float
    """Of errors; cosines and KL follow quadratically and get its square."""
    max_error: float
    """Ceiling of the bound on errors,"""
    cosine_distance: float
    """on 1 - cosine,"""
    max_kl: float
    """and on KL."""
    reason: str
    """Why these numbers."""


_SCALES: dict[str, Scale] = {
    "float32": Scale(
        factor=10,
        max_error=5e-3,
        cosine_distance=1e-5,
        max_kl=1e-4,
        reason=(
            "measured is one float32 forward in PyTorch; another order of sums gives another sample of "
            "the same size: ONNX Runtime had 0.7 to 2.7 times as much in models of 2 to 40 layers, an "
            "engine on an H200 2.9 (logits) and 7.7 times (states, of a model far below the floor). A "
            "wrong weight, layer or position gives 1e-2 and more"
        ),
    ),
    "float16": Scale(
        factor=3,
        max_error=1e-1,
        cosine_distance=1e-2,
        max_kl=2e-2,
        reason=(
            "measured is rounding at every operator of the graph; engines on an H200 had 1.6 to 2.1 times as "
            "much with 5 and 24 layers (docs/evidence/), ONNX Runtime less than 0.5. The ceiling is twice "
            "to three times the floor"
        ),
    ),
    "bfloat16": Scale(
        factor=3,
        max_error=5e-1,
        cosine_distance=5e-2,
        max_kl=2e-1,
        reason=(
            "as for float16, with 8 times its rounding. A wrong position or layer gives errors of the size "
            "of the values themselves, and cosines far from 1"
        ),
    ),
    "int8": Scale(
        factor=3,
        max_error=5e-1,
        cosine_distance=5e-2,
        max_kl=2e-1,
        reason=(
            "measured is the same rounding of the same blocks with exact sums; a runtime rounds other last "
            "bits to other integers, which is another sample of the same size: ONNX Runtime had 0.7 to 1.3 "
            "times as much. The ceiling is bfloat16's"
        ),
    ),
}


@dataclass(frozen=True)
class Bounds:
    """The tolerances that one model is judged by."""

    dtype: str
    """The bundle's."""
    cost: RoundingCost | None = None
    """What rounding costs the model; None for records that do not say, for which the table's rows hold."""
    activations: Activations = "float"
    """Of products of quantised matrices; `cost` was measured with the same."""

    @property
    def row(self) -> str:
        """Of the table. bfloat16's allows more than int8's."""
        return "int8" if self.activations == "int8" and self.dtype != "bfloat16" else self.dtype

    @property
    def logits(self) -> Tolerance:
        """For logits against the record."""
        return self._scaled("logits", None if self.cost is None else self.cost.logits)

    def state(self, layer: int) -> Tolerance:
        """For one layer's state against the record."""
        return self._scaled("state", None if self.cost is None else self.cost.state(layer))

    def padding(self, layer: int | None) -> Tolerance:
        """For one layer's state, or the logits, against those with other padding."""
        if self.cost is None:
            return tolerance(self.row, "padding")
        return self._scaled("padding", self.cost.logits if layer is None else self.cost.state(layer))

    def widest(self, quantity: Quantity) -> Tolerance:
        """The most that any layer is allowed."""
        if quantity == "logits":
            return self.logits
        if self.cost is None:
            return tolerance(self.row, quantity)
        last = len(self.cost.layers) - 1
        if quantity == "state":
            return self.state(last)
        return self._scaled("padding", self.cost.logits.at_least(self.cost.state(last)))

    @property
    def at_ceiling(self) -> bool:
        """Whether rounding costs the model more than the table lets it have."""
        if self.cost is None:
            return False
        scale = _SCALES[self.row]
        worst = max(self.cost.logits.error, *(cost.error for cost in self.cost.layers))
        return scale.factor * worst > scale.max_error

    @property
    def sentence(self) -> str:
        """Where the bounds come from, in words."""
        if self.cost is None:
            return "The record does not say what rounding costs this model: the tolerances are the table's."
        scale = _SCALES[self.row]
        what = self.dtype + (", and before products to int8," if self.activations == "int8" else "")
        text = (
            f"Rounding to {what} costs this model {self.cost.logits.error:.1e} in logits and "
            f"{max(cost.error for cost in self.cost.layers):.1e} in states; allowed is {scale.factor:g} "
            f"times that, at least {tolerance(self.row, 'logits').max_error:g} and "
            f"{tolerance(self.row, 'state').max_error:g}, at most {scale.max_error:g}."
        )
        return text + (" It costs more than the most that is allowed." if self.at_ceiling else "")

    def _scaled(self, quantity: Quantity, cost: Cost | None) -> Tolerance:
        floor = tolerance(self.row, quantity)
        if cost is None:
            return floor
        scale = _SCALES[self.row]
        square = scale.factor**2
        error = min(scale.factor * cost.error, scale.max_error)
        distance = min(square * cost.cosine_distance, scale.cosine_distance)
        kl = min(square * cost.kl, scale.max_kl) if cost.kl is not None else 0.0
        return replace(
            floor,
            max_error=max(floor.max_error, error),
            min_cosine=None if floor.min_cosine is None else min(floor.min_cosine, 1 - distance),
            max_kl=None if floor.max_kl is None else max(floor.max_kl, kl),
        )


def scale_of(dtype: str) -> Scale:
    """How measured costs are scaled for a bundle of `dtype`, or int8.

    Raises:
        UsageError: the table has no such row.
    """
    tolerance(dtype, "logits")
    return _SCALES[dtype]


def tolerance(dtype: str, quantity: Quantity) -> Tolerance:
    """The bounds for a bundle of `dtype`, or int8.

    Raises:
        UsageError: the table has no such row.
    """
    try:
        return _TABLE[dtype, quantity]
    except KeyError:
        raise UsageError(
            "no tolerance is known for this kind of output",
            got=f"{dtype} {quantity}",
            expected=f"one of {', '.join(T_TYPES)} or int8, and logits, state or padding",
        ) from None
