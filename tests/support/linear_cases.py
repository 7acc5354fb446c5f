"""Random products for dijiang_linear, and what float64 makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm
from dijiang_engines.kernels.packing import pack

HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "swiglu")
GUARD = 64
"""Elements on both sides of an output that must stay what they are."""


@dataclass
class Case:
    """One output and what float64 makes of it."""

    output: LinearOutput
    guarded: Any
    allowed: list[tuple[Any, Any]]
    """Results with their bounds, of which one must be met everywhere."""

    def check(self) -> float:
        """Largest error in units of its bound."""
        guard = self.guarded.double()
        assert (guard[:GUARD] == 7).all() and (guard[-GUARD:] == 7).all(), "written beside the output"
        found = self.output.output.double()
        errors = [float(((found - expected).abs() / bound).max()) for expected, bound in self.allowed]
        worst = errors[0] if errors[0] != errors[0] else min(errors)  # NaN is never the least
        assert worst <= 1, f"{errors} times the bound"
        return worst


def normed(x: Any, kind: str, weight: Any, bias: Any, epsilon: float) -> Any:
    x = x.double()
    if kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


def activated(name: str, x: Any, second: Any) -> Any:
    functional = torch.nn.functional
    if name == "swiglu":
        return functional.silu(x) * second
    if name == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return {"identity": lambda v: v, "relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu}[
        name
    ](x)


def quantised(weight_format: str, width: int, inner: int, generator: Any) -> tuple[Any, Any]:
    """Random integers and scales of either sign: the weight in float64, and packed."""
    device = generator.device

    def integers(low: int, high: int, *shape: int) -> Any:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int32)

    blocks = inner // 32
    most = 127 if weight_format == "int8" else 8
    q = integers(-most, 128 if weight_format == "int8" else 8, width, blocks, 32)
    size = 0.5 + torch.rand(width, blocks, generator=generator, device=device)
    scales = (size * (1 - 2 * integers(0, 2, width, blocks)) * inner**-0.5 / most).half()
    weight = (q.double() * scales.double()[..., None]).reshape(width, inner)
    u = (q + (128 if weight_format == "int8" else 8)).to(torch.uint8)
    if weight_format == "int4":
        u = u[..., 0::2] | u[..., 1::2] << 4
    packed = pack(weight_format, u.cpu().numpy(), scales.cpu().numpy())
    return weight, torch.from_numpy(np.ascontiguousarray(packed)).to(device)


def make(
    dtype: Any,
    rows: int,
    inner: list[int],
    width: int,
    *,
    activation: Any = "identity",
    norm: Any = "norm_none",
    bias: bool | str = True,
    residual: bool = False,
    seed: int = 0,
    weight_format: str | list[str] = "same",
    device: str = "cuda",
    rounded: bool = False,
) -> Case:
    """A random output, with quantised weights as they are.

    `rounded`: or else rounded to the type, all of them, as a library multiplies that is faster at some sizes.
    `bias` may be "rounded": of the type's numbers, which the call then says.
    The bound: half a unit in the last place of the result, float32 sums, and with a norm that an element
    of it may be rounded to its other neighbour."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, kind: Any = dtype, scale: float = 1.0) -> Any:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(kind)

    one_input = activation == "swiglu" or norm != "norm_none"
    inputs: list[Any] = []
    for size in inner:
        shift = 3 * torch.rand(
            rows, 1, generator=generator, device=device
        )  # a mean that LayerNorm takes away
        inputs.append(inputs[0] if inputs and one_input else (draw(rows, size) + shift).to(dtype))
    formats = [weight_format] * len(inner) if isinstance(weight_format, str) else weight_format
    weights: list[Any] = []  # as the reference has them
    stored: list[Any] = []  # and as the kernel does
    for size, kind in zip(inner, formats, strict=True):
        weight, packed = (
            quantised(kind, width, size, generator) if kind != "same"
            else (draw(width, size, scale=size**-0.5),) * 2
        )  # fmt: skip
        weights.append(weight)
        stored.append(packed)
    biases = [
        draw(width, kind=dtype if bias == "rounded" else torch.float32).float() if bias else None
        for _ in inner
    ]
    norm_weight = norm_bias = None
    epsilon = 1e-5
    if norm != "norm_none":
        norm_weight = 1 + draw(inner[0], kind=torch.float32, scale=0.3)
        norm_bias = draw(inner[0], kind=torch.float32, scale=0.3) if norm == "layer_norm" else None
    rest = draw(rows, width) if residual else None

    def truth(weights: list[Any]) -> tuple[Any, Any]:
        sums, sizes = [], []
        unit = HALF_ULP[dtype]
        for x, weight, b in zip(inputs, weights, biases, strict=True):
            x = x if norm_weight is None else normed(x, norm, norm_weight, norm_bias, epsilon).to(dtype)
            sums.append(x.double() @ weight.double().T + (0 if b is None else b.double()))
            magnitude = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.double().abs())
            flips = 0.02 * unit if norm_weight is not None else 0.0  # few elements, of either sign
            sizes.append(magnitude * (flips + 4 * weight.shape[1] ** 0.5 * 2.0**-24))
        if activation == "swiglu":
            expected = activated(activation, *sums)
            slack = sizes[0] * 1.1 * sums[1].abs() + sizes[1] * sums[0].abs() + sizes[0] * sizes[1]
        else:
            expected = activated(activation, sum(sums), None)
            slack = sum(sizes) * 1.2
        if rest is not None:
            expected = expected + rest.double()
        return expected, 1.01 * unit * expected.abs() + slack + 2e-6 * (1 + expected.abs())

    allowed = [truth(weights)]
    if rounded and set(formats) != {"same"}:
        allowed.append(truth([weight.to(dtype) for weight in weights]))

    guarded = torch.full((2 * GUARD + rows * width,), 7, dtype=dtype, device=device)
    guarded[GUARD:-GUARD] = float("nan")
    output = LinearOutput(
        guarded[GUARD:-GUARD].view(rows, width),
        [
            LinearTerm(*term, bias == "rounded") for term in zip(inputs, stored, biases, formats, strict=True)
        ],
        activation, rest, norm, norm_weight, norm_bias, epsilon if norm != "norm_none" else 0.0,
    )  # fmt: skip
    return Case(output, guarded, allowed)


def workspace_for(kernels: LinearKernels, outputs: list[LinearOutput]) -> Any:
    """For calls of many rows, full of what must not be read."""
    size = kernels.workspace_size(outputs)
    return torch.full((max(size, 256),), 255, dtype=torch.uint8, device="cuda")


def run(kernels: LinearKernels, cases: list[Case], constant: bool = False, workspace: bool = False) -> float:
    stream = torch.cuda.current_stream().cuda_stream
    outputs = [case.output for case in cases]
    memory = workspace_for(kernels, outputs) if workspace else None
    kernels.linear(outputs, constant_weights=constant, workspace=memory, stream=stream)
    torch.cuda.synchronize()
    return max(case.check() for case in cases)


def check_every_integer(
    kernels: LinearKernels, dtype: Any, form: str, rows: int, workspace: bool = False
) -> None:
    """One weight of each value that a format has, times one: nothing is lost."""
    count = 256 if form == "int8" else 16
    zero = count // 2
    width = 32 * count
    u = np.full((width, 1, 32), zero, np.uint8)
    for n in range(width):
        u[n, 0, n % 32] = n // 32
    stored = u if form == "int8" else u[..., 0::2] | u[..., 1::2] << 4
    packed = torch.from_numpy(pack(form, stored, np.full((width, 1), 2.0**-20, np.float16))).cuda()
    x = torch.ones(rows, 32, dtype=dtype, device="cuda")
    y = torch.full((rows, width), float("nan"), dtype=dtype, device="cuda")
    output = LinearOutput(y, [LinearTerm(x, packed, None, form)])  # type: ignore[arg-type]
    kernels.linear([output], workspace=workspace_for(kernels, [output]) if workspace else None)
    torch.cuda.synchronize()
    expected = (torch.arange(width, device="cuda") // 32 - zero) * 2.0**-20
    assert (y.double() == expected.double()).all()


def check_repeats(kernels: LinearKernels, case: Case, workspace: bool = False) -> None:
    """The same bits, however often and on whichever stream."""
    first = None
    memory = workspace_for(kernels, [case.output]) if workspace else None
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        for _ in range(20):
            case.output.output.fill_(float("nan"))
            torch.cuda.synchronize()
            kernels.linear([case.output], constant_weights=True, workspace=memory, stream=stream.cuda_stream)
            torch.cuda.synchronize()
            first = case.output.output.clone() if first is None else first
            assert torch.equal(first, case.output.output)


def check_chain(
    kernels: LinearKernels,
    x: Any,
    up: list[Any],
    down: list[Any],
    inner: int,
    *,
    formats: tuple[str, str] = ("same", "same"),
    norm: tuple[Any, ...] = (),
    workspace: Any = None,
) -> None:
    """Each call reads what the one before wrote and overwrites what the one before that read, as engines do,
    where buffers are used again; kernels begin before the previous ones have ended.

    Args:
        kernels: under test.
        x: float16 [rows, hidden], the chain's input.
        up: weights from hidden to `inner`, one for each of the chain's layers.
        down: from `inner` to hidden.
        inner: the wide size.
        formats: of up and down.
        norm: of each layer's input: the last fields of LinearOutput.
        workspace: for many rows, shared by all calls.
    """
    buffers = [x.clone(), torch.empty_like(x)]
    wide = torch.empty(len(x), inner, dtype=x.dtype, device=x.device)
    kinds: Any = formats

    def chain(stream: int, wait: bool) -> None:
        for i in range(len(up)):
            old, new = buffers[i % 2], buffers[(i + 1) % 2]
            for output in (
                LinearOutput(wide, [LinearTerm(old, up[i], None, kinds[0])], "gelu", None, *norm),
                LinearOutput(new, [LinearTerm(wide, down[i], None, kinds[1])], "identity", old),
            ):
                kernels.linear([output], constant_weights=True, workspace=workspace, stream=stream)
                if wait:
                    torch.cuda.synchronize()

    chain(torch.cuda.current_stream().cuda_stream, wait=True)
    expected = buffers[len(up) % 2].clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(torch.cuda.current_stream().cuda_stream, wait=False)
    for _ in range(100):
        buffers[0].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffers[len(up) % 2], expected)
