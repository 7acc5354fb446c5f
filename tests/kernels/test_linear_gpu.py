"""dijiang_linear on a GPU against float64: sizes, norms, activations, residuals, two terms, chains of calls.

Skipped, with the reason, without a GPU or without the compiled kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.linear_kernels import LinearKernels, LinearOutput, LinearTerm

from dijiang_engines.errors import PluginError
from dijiang_engines.plugin.cache import find_kernels_library

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "swiglu")
GUARD = 64
"""Elements on both sides of an output that must stay what they are."""


@pytest.fixture(scope="module")
def kernels() -> LinearKernels:
    try:
        return LinearKernels(Path(os.environ.get("DIJIANG_KERNELS") or find_kernels_library()))
    except PluginError as error:
        pytest.skip(str(error))


@dataclass
class Case:
    """One output and what float64 makes of it."""

    output: LinearOutput
    guarded: Any
    expected: Any
    bound: Any

    def check(self) -> float:
        """Largest error in units of its bound."""
        guard = self.guarded.double()
        assert (guard[:GUARD] == 7).all() and (guard[-GUARD:] == 7).all(), "written beside the output"
        error = (self.output.output.double() - self.expected).abs()
        worst = float((error / self.bound).max())
        assert worst <= 1, f"{worst} times the bound"
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


def make(
    dtype: Any,
    rows: int,
    inner: list[int],
    width: int,
    *,
    activation: Any = "identity",
    norm: Any = "norm_none",
    bias: bool = True,
    residual: bool = False,
    seed: int = 0,
) -> Case:
    """A random output. The bound: half a unit in the last place of the result, float32 sums, and with a norm
    that an element of it may be rounded to its other neighbour."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int, kind: Any = dtype, scale: float = 1.0) -> Any:
        return (scale * torch.randn(shape, generator=generator, device="cuda")).to(kind)

    one_input = activation == "swiglu" or norm != "norm_none"
    inputs: list[Any] = []
    for size in inner:
        shift = 3 * torch.rand(
            rows, 1, generator=generator, device="cuda"
        )  # a mean that LayerNorm takes away
        inputs.append(inputs[0] if inputs and one_input else (draw(rows, size) + shift).to(dtype))
    weights = [draw(width, size, scale=size**-0.5) for size in inner]
    biases = [draw(width, kind=torch.float32) if bias else None for _ in inner]
    norm_weight = norm_bias = None
    epsilon = 1e-5
    if norm != "norm_none":
        norm_weight = 1 + draw(inner[0], kind=torch.float32, scale=0.3)
        norm_bias = draw(inner[0], kind=torch.float32, scale=0.3) if norm == "layer_norm" else None
    rest = draw(rows, width) if residual else None

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
    bound = 1.01 * unit * expected.abs() + slack + 2e-6 * (1 + expected.abs())

    guarded = torch.full((2 * GUARD + rows * width,), 7, dtype=dtype, device="cuda")
    guarded[GUARD:-GUARD] = float("nan")
    output = LinearOutput(
        guarded[GUARD:-GUARD].view(rows, width),
        [LinearTerm(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)],
        activation, rest, norm, norm_weight, norm_bias, epsilon if norm != "norm_none" else 0.0,
    )  # fmt: skip
    return Case(output, guarded, expected, bound)


def run(kernels: LinearKernels, cases: list[Case], constant: bool = False) -> float:
    stream = torch.cuda.current_stream().cuda_stream
    kernels.linear([case.output for case in cases], constant_weights=constant, stream=stream)
    torch.cuda.synchronize()
    return max(case.check() for case in cases)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("norm", ["norm_none", "layer_norm", "rms_norm"])
def test_rows_and_norms(kernels: LinearKernels, dtype: Any, rows: int, norm: str) -> None:
    print("linear", dtype, rows, norm, run(kernels, [make(dtype, rows, [768], 1000, norm=norm, seed=rows)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", [32, 64, 96, 160, 256, 1024, 2560, 4096, 11008])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 64, 515, 3072])
def test_sizes(kernels: LinearKernels, dtype: Any, inner: int, width: int) -> None:
    for rows in (1, 3):
        run(kernels, [make(dtype, rows, [inner], width, seed=inner + width)], constant=rows == 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_activations(kernels: LinearKernels, dtype: Any, activation: str, residual: bool, bias: bool) -> None:
    inner = [512, 512] if activation == "swiglu" else [512]
    for rows, norm in ((1, "norm_none"), (8, "layer_norm"), (11, "rms_norm")):
        run(
            kernels,
            [make(dtype, rows, inner, 328, activation=activation, residual=residual, bias=bias, norm=norm)],
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_two_terms_are_added(kernels: LinearKernels, dtype: Any, rows: int) -> None:
    for inner in ([1024, 4096], [32, 4096], [2560, 10240], [96, 64], [256, 256]):
        run(kernels, [make(dtype, rows, inner, 520, residual=True, seed=inner[0])], constant=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_several_outputs_in_one_launch(kernels: LinearKernels, dtype: Any, rows: int) -> None:
    run(kernels, [
        make(dtype, rows, [1024], 3072, norm="layer_norm", seed=1),
        make(dtype, rows, [1024], 1000, bias=False, seed=2),
        make(dtype, rows, [1024], 4096, norm="layer_norm", activation="gelu", seed=3),
    ], constant=True)  # fmt: skip
    run(kernels, [
        make(dtype, rows, [256, 4096], 1024, residual=True, seed=4),
        make(dtype, rows, [64, 64], 9, activation="swiglu", norm="rms_norm", seed=5),
    ])  # fmt: skip


def test_numbers_that_are_none_stay_so(kernels: LinearKernels) -> None:
    for activation in ACTIVATIONS[:-1]:
        case = make(torch.float16, 3, [256], 64, activation=activation)
        case.output.terms[0].input[1, 17] = float("nan")
        kernels.linear([case.output])
        torch.cuda.synchronize()
        assert case.output.output[1].isnan().all(), activation
        assert not case.output.output[[0, 2]].isnan().any()


def test_nothing_depends_on_how_often_or_where(kernels: LinearKernels) -> None:
    case = make(torch.float16, 8, [1024, 4096], 1024, residual=True)
    first = None
    for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
        for _ in range(20):
            case.output.output.fill_(float("nan"))
            torch.cuda.synchronize()
            kernels.linear([case.output], constant_weights=True, stream=stream.cuda_stream)
            torch.cuda.synchronize()
            first = case.output.output.clone() if first is None else first
            assert torch.equal(first, case.output.output)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_a_chain_in_a_graph_waits_for_what_it_reads(kernels: LinearKernels, rows: int) -> None:
    """Each call reads what the one before wrote and overwrites what the one before that read, as
    in an engine, where buffers are used again; kernels begin before the previous ones have ended."""
    hidden, inner, depth = 1024, 4096, 40
    generator = torch.Generator("cuda").manual_seed(3)
    up = [torch.randn(inner, hidden, generator=generator, device="cuda").half() / 32 for _ in range(depth)]
    down = [torch.randn(hidden, inner, generator=generator, device="cuda").half() / 64 for _ in range(depth)]
    scale = torch.ones(hidden, device="cuda")
    x = torch.randn(rows, hidden, generator=generator, device="cuda").half()
    buffers = [x.clone(), torch.empty_like(x)]
    wide = torch.empty(rows, inner, dtype=torch.float16, device="cuda")

    def chain(stream: int, wait: bool) -> None:
        for i in range(depth):
            old, new = buffers[i % 2], buffers[(i + 1) % 2]
            for output in (
                LinearOutput(wide, [LinearTerm(old, up[i])], "gelu", None, "rms_norm", scale, None, 1e-5),
                LinearOutput(new, [LinearTerm(wide, down[i])], "identity", old),
            ):
                kernels.linear([output], constant_weights=True, stream=stream)
                if wait:
                    torch.cuda.synchronize()

    chain(torch.cuda.current_stream().cuda_stream, wait=True)
    expected = buffers[depth % 2].clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(torch.cuda.current_stream().cuda_stream, wait=False)
    for _ in range(100):
        buffers[0].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(buffers[depth % 2], expected)
