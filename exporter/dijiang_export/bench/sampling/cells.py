"""What `bench sampling` measures. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from dijiang_engines.sampling import SamplingOptions

Choice = Literal["greedy", "temperature", "top-k", "top-p", "top-k-top-p", "all"]
CHOICES: Mapping[Choice, SamplingOptions] = MappingProxyType({
    "greedy": SamplingOptions(),
    "temperature": SamplingOptions(1.0),
    "top-k": SamplingOptions(1.0, top_k=50),
    "top-p": SamplingOptions(1.0, top_p=0.9),
    "top-k-top-p": SamplingOptions(1.0, top_k=50, top_p=0.95),
    "all": SamplingOptions(0.8, top_k=400, top_p=0.95, min_p=0.002),
})  # fmt: skip
"""How a token is chosen, by the name of the option that asks for it."""


@dataclass(frozen=True)
class Cell:
    """One token of each of some rows."""

    vocabulary: int
    rows: int
    choice: Choice

    def __str__(self) -> str:
        return f"V = {self.vocabulary:,}, {self.rows} row{'s' * (self.rows != 1)}, {self.choice}"

    @property
    def options(self) -> SamplingOptions:
        """Of all rows."""
        return CHOICES[self.choice]

    @property
    def nbytes(self) -> int:
        """Of the logits, float32."""
        return 4 * self.rows * self.vocabulary

    @property
    def operations(self) -> int:
        """There are no products."""
        return 0
