"""`dijiang_linear` by PyTorch, in float64: it proves orchestration only, kernels have tests of their own."""

from __future__ import annotations

import torch

from dijiang_engines.kernels.linear import LinearOutput


class Products:
    """Float weights alone; `fault` leaves out a residual."""

    def __init__(self, fault: bool = False) -> None:
        self.fault, self.calls = fault, 0

    def workspace_size(self, outputs: list[LinearOutput]) -> int:
        return 0

    def linear(
        self, outputs: list[LinearOutput], *, constant_weights: bool, stream: int, workspace: object = None
    ) -> None:
        assert constant_weights
        self.calls += 1
        for one in outputs:
            terms = []
            for term in one.terms:
                x = term.input.double()
                if one.norm == "layer_norm":
                    weight, bias = one.norm_weight.double(), one.norm_bias.double()
                    x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, one.epsilon)
                bias = None if term.bias is None else term.bias.double()
                terms.append(torch.nn.functional.linear(x, term.weight.double(), bias))
            y = sum(terms)
            assert isinstance(y, torch.Tensor)
            if one.activation == "gelu":
                y = torch.nn.functional.gelu(y)
            if one.residual is not None and not self.fault:
                y = y + one.residual.double()
            one.output.copy_(y)
