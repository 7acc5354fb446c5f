"""Is the GPU's recurrence the right one? Run it once on a GPU: `python -m samples.distill.check_kernel`.

Compares `fla` and `chunked` with the project's reference in float64: outputs, and gradients of q, k, v and
decay. Exits with 1 if a relative error ‖x - reference‖ / ‖reference‖ exceeds what bfloat16 products, or
float32, allow.
"""

from __future__ import annotations

import itertools
import json
import sys

import torch
from torch import Tensor

from dijiang_export.reference.attention import TokenTerms, recurrent

from .recurrence import RECURRENCES, Recurrence

MOST = {"fla": 1e-2, "chunked": 1e-5}
"""bfloat16 has 8 bits; sums of a few hundred terms stay near one rounding. TF32 is off here."""
SIZES = ((2, 349, 9, 64), (1, 1024, 8, 32), (2, 130, 4, 80), (1, 63, 16, 128))
"""Windows, tokens, heads, head size."""


def reference(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Token by token (docs/mathematics.md), [B, L, H, d]."""
    batch, length, heads, size = q.shape
    each = log_decay.view(1, -1, 1).expand(batch, heads, length)
    terms = TokenTerms(each, torch.ones_like(each), torch.ones_like(each))
    state = q.new_zeros(batch, heads, size, size)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return recurrent(q, k, v, terms, state)[0].transpose(1, 2)


def errors(
    name: str, size: tuple[int, int, int, int], device: torch.device, learned: bool = True
) -> dict[str, float]:
    """Relative errors of the output and of its gradients, of decay's too if it is `learned`."""
    batch, length, heads, width = size
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (draw(batch, length, heads, width).softmax(-1) for _ in range(2))
    v, towards = draw(batch, length, heads, width), draw(batch, length, heads, width)
    inputs = [q, k, v, -torch.linspace(0.002, 0.05, heads, dtype=torch.float64)]
    wanted = _run(reference, inputs, towards, learned)
    kind = torch.float32
    given = _run(RECURRENCES[name], [x.to(device, kind) for x in inputs], towards.to(device, kind), learned)
    names = ("o", "dq", "dk", "dv", "d log_decay")
    return {n: _off(a, b) for n, a, b in zip(names, given, wanted, strict=False)}


def _run(recurrence: Recurrence, inputs: list[Tensor], towards: Tensor, learned: bool) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(True) for x in inputs]
    if not learned:
        leaves[3] = leaves[3].detach()
    o = recurrence(*leaves)
    return [o, *torch.autograd.grad((o.to(towards.dtype) * towards).sum(), leaves[: 4 if learned else 3])]


def _off(given: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((given.detach().double().cpu() - wanted).norm() / wanted.norm())


def main() -> int:
    """Print one JSON line a size and recurrence; 1 if one is off."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ["chunked", "fla"] if device.type == "cuda" else ["chunked"]
    worst = 0
    for name, size, learned in itertools.product(names, SIZES, (False, True)):
        found = errors(name, size, device, learned)
        right = all(error <= MOST[name] for error in found.values())
        worst |= not right
        facts = {"recurrence": name, "size": size, "learned decay": learned, "right": right, "errors": found}
        print(json.dumps(facts))
    return worst


if __name__ == "__main__":
    sys.exit(main())
