"""Which matrices of a model are stored in how many bits, and why; measured in docs/quantisation.md."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dijiang_engines.errors import CheckpointError, UsageError
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import BLOCK, QK, QKV, Matrix, MatrixFormat, V, matrices, matrix_shapes

KEPT: tuple[tuple[str, str], ...] = (
    (
        "lm_head.weight",
        "every logit is one product with it: of all kinds of matrices, with v, it costs most in 4 bits",
    ),
    (
        "embed_tokens.weight",
        "int8 costs nothing measurable, and a step reads one row of it; tied, it is the head too",
    ),
    (f"layers.*.{V}", "what the state adds up are values: with the head, 4 bits cost most here"),
    (
        "layers.*.attention.dense.weight",
        "it is small: per byte, 8 bits gain more here than anywhere else in a layer",
    ),
    ("project_in.weight", "all tokens go through it, and it is small"),
    ("project_out.weight", "all logits go through it, and it is small"),
)
"""What --weight-format int4 keeps in int8: pattern of names, and the reason."""


@dataclass(frozen=True)
class Recipe:
    """How one model's matrices are stored."""

    weight_format: MatrixFormat
    """What was asked for."""
    parts: Mapping[str, Sequence[Matrix]]
    """Canonical name -> its stored matrices."""
    kept: Sequence[tuple[str, str]] = field(default=())
    """Patterns that keep matrices in int8, and why: those that matched."""

    @property
    def stored(self) -> list[Matrix]:
        """All of them, in the order of weights.data."""
        return [part for parts in self.parts.values() for part in parts]

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "weight_format": self.weight_format,
            "block_size": BLOCK,
            "matrices": {part.name: part.format for part in self.stored},
            "kept_in_int8": [{"matrices": pattern, "reason": reason} for pattern, reason in self.kept],
        }


def choose_recipe(
    spec: ModelSpec, weight_format: Literal["int8", "int4"], keep_int8: Sequence[str] = ()
) -> Recipe:
    """The recipe for a model.

    Args:
        spec: the model.
        weight_format: int8: all matrices; int4: all but KEPT and `keep_int8`.
        keep_int8: patterns of names as in the manifest, such as `layers.*.mlp.down`; `*` and `?` stand for
            anything, and `.weight` at the end may be left out.

    Raises:
        CheckpointError: a matrix cannot be cut into blocks.
        UsageError: a pattern fits no matrix, or there is nothing that it could keep.
    """
    _check_blocks(spec)
    if weight_format == "int8":
        if keep_int8:
            raise UsageError("--keep-int8 is for --weight-format int4", got="--weight-format int8")
        formats: dict[str, str] = dict.fromkeys(matrix_shapes(spec), "int8")
        return Recipe("int8", matrices(spec, formats))
    rules = [*KEPT, *((pattern, "asked for with --keep-int8") for pattern in keep_int8)]
    formats, used = {}, set()
    for source in matrix_shapes(spec):
        names = [source]
        if source.endswith(QKV) and not _matching(source, rules):
            at = source.removesuffix(QKV)
            names = [at + QK, at + V]
        for name in names:
            found = _matching(name, rules)
            formats[name] = "int8" if found else "int4"
            used |= set(found)
    for pattern in keep_int8:
        if (pattern, "asked for with --keep-int8") not in used:
            raise UsageError(
                "--keep-int8 fits no matrix of this model",
                got=pattern,
                expected="names such as " + ", ".join(n.removesuffix(".weight") for n in list(formats)[-7:]),
            )
    return Recipe("int4", matrices(spec, _joined(spec, formats)), [rule for rule in rules if rule in used])


def _joined(spec: ModelSpec, formats: dict[str, str]) -> dict[str, str]:
    """q, k and v as one matrix where all of them have the same format."""
    joined = dict(formats)
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        parts = {joined.get(at + QK), joined.get(at + V)}
        if len(parts) == 1 and None not in parts:
            joined[at + QKV] = joined.pop(at + QK)
            del joined[at + V]
    return joined


def _matching(name: str, rules: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    short = name.removesuffix(".weight")
    return [rule for rule in rules if fnmatch.fnmatchcase(short, rule[0].removesuffix(".weight"))]


def _check_blocks(spec: ModelSpec) -> None:
    for name, (rows, columns) in matrix_shapes(spec).items():
        if columns % BLOCK:
            raise CheckpointError(
                f"{name} [{rows}, {columns}] cannot be quantised: its rows are not whole blocks of {BLOCK}",
                got=f"{columns} columns",
                expected=f"a multiple of {BLOCK}",
                hint="export with --weight-format float (and --dtype float16 for half the bytes)",
            )
