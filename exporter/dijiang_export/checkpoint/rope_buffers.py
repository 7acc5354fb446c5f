"""RoPE frequencies that a checkpoint stores: a second witness of what config.json says.

Old versions of transformers saved inv_freq beside the weights. It is not read as a weight, but if it is not
what config.json gives, one of the two is wrong, and so would be every token.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch

from dijiang_engines.errors import CheckpointError
from dijiang_engines.spec import ModelSpec
from dijiang_export.checkpoint.stored import StoredTensor
from dijiang_export.reference.rope import inverse_frequencies

_STORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_RELATIVE = 1e-5
"""Between float32 values: other orders of the same arithmetic differ by some 1e-6."""


def check_frequencies(stored: Mapping[str, StoredTensor], spec: ModelSpec) -> None:
    """Compare all stored inv_freq with config.json's, as far as their type can tell.

    With linear scaling both forms are right: old code divides positions by the factor, new code frequencies.

    Raises:
        CheckpointError: they differ, by number or by value.
    """
    found = [tensor for name, tensor in stored.items() if _STORED.fullmatch(name)]
    if not found:
        return
    right = [_frequencies(spec)]
    if spec.rope_scaling is not None and spec.rope_scaling["rope_type"] == "linear":
        right.append(_frequencies(dataclasses.replace(spec, rope_scaling=None)))
    for tensor in found:
        _check(tensor, right, spec)


def _check(tensor: StoredTensor, right: list[torch.Tensor], spec: ModelSpec) -> None:
    expected = right[0]
    by_config = f"rope_theta {spec.rope_theta:g}, {spec.rotary_dim} dimensions, scaling {spec.rope_scaling}"
    if tensor.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{tensor.name} does not fit config.json: RoPE would turn another number of dimensions",
            got=f"{list(tensor.shape)} stored frequencies",
            expected=f"{list(expected.shape)} by config.json: {by_config}",
            hint=_HINT,
        )
    values = tensor.exact()
    info = torch.finfo(values.dtype)
    values = values.double()
    for candidate in right:
        candidate = candidate.double()
        tolerance = candidate * max(info.eps, _RELATIVE) + info.smallest_normal * info.eps
        if bool(((values - candidate).abs() <= tolerance).all()):
            return
    worst = int(((values - expected).abs() / expected).nan_to_num(torch.inf).argmax())
    raise CheckpointError(
        f"{tensor.name} does not fit config.json: the model was trained with other RoPE frequencies",
        got=f"{float(values[worst]):.6g} stored as frequency {worst}",
        expected=f"{float(expected[worst]):.6g} by config.json: {by_config}",
        hint=_HINT,
    )


_HINT = "correct config.json; if it is right, save the weights without this buffer"


def _frequencies(spec: ModelSpec) -> torch.Tensor:
    return inverse_frequencies(spec) if spec.rotary_dim else torch.empty(0)
