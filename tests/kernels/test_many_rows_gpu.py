"""dijiang_linear_with_workspace on a GPU against float64: every kind of weight, norm, activation and cut.

Skipped, with the reason, without a GPU, the compiled kernels, or cuBLASLt.
"""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dijiang_engines.errors import KernelError, PluginError
from dijiang_engines.kernels.linear import LinearKernels, LinearOutput, LinearTerm
from dijiang_engines.plugin.cache import find_kernels_library

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from support.linear_cases import (  # noqa: E402
    ACTIVATIONS,
    Case,
    check_chain,
    check_every_integer,
    check_repeats,
    make,
    quantised,
    run,
    workspace_for,
)

DTYPES = [torch.float16, torch.bfloat16]
FORMATS = ["same", "int8", "int4"]


@pytest.fixture(scope="module")
def kernels() -> LinearKernels:
    try:
        it = LinearKernels(Path(os.environ.get("DIJIANG_KERNELS") or find_kernels_library()))
        print("cuBLASLt", it.library())
    except (PluginError, KernelError) as error:
        pytest.skip(str(error))
    return it


def many(dtype: Any, rows: int, inner: list[int], width: int, **more: Any) -> Case:
    return make(dtype, rows, inner, width, rounded=True, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [17, 33, 64, 127, 350, 2048])
@pytest.mark.parametrize("norm", ["norm_none", "layer_norm", "rms_norm"])
def test_rows_and_norms(kernels: LinearKernels, dtype: Any, form: str, rows: int, norm: str) -> None:
    case = many(dtype, rows, [768], 1000, norm=norm, seed=rows, weight_format=form)
    print("many", dtype, form, rows, norm, run(kernels, [case], workspace=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("inner", [32, 64, 96, 160, 1024, 11008])
def test_sizes(kernels: LinearKernels, dtype: Any, form: str, inner: int) -> None:
    for width in (1, 7, 8, 9, 515, 640):
        for bias in (False, True):
            case = many(dtype, 200, [inner], width, seed=inner + width, weight_format=form, bias=bias)
            run(kernels, [case], constant=bias, workspace=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_activations(kernels: LinearKernels, dtype: Any, form: str, activation: str, residual: bool) -> None:
    inner = [544, 544] if activation == "swiglu" else [544]
    for bias in (False, True):
        for rows, norm, width in ((200, "norm_none", 328), (77, "rms_norm", 329)):
            case = many(
                dtype, rows, inner, width, activation=activation, residual=residual, bias=bias, norm=norm,
                weight_format=form,
            )  # fmt: skip
            run(kernels, [case], workspace=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [150, 2048])
@pytest.mark.parametrize("width", [1, 9, 8, 520, 640, 3072])
@pytest.mark.parametrize(
    ("activation", "residual"), [("identity", False), ("identity", True), ("relu", False)]
)
def test_biases_of_the_types_numbers(
    kernels: LinearKernels, dtype: Any, form: str, rows: int, width: int, activation: str, residual: bool
) -> None:
    """cuBLASLt adds them, before it rounds, where the width lets it."""
    case = many(
        dtype, rows, [1024], width, residual=residual, activation=activation, bias="rounded", seed=width,
        weight_format=form,
    )  # fmt: skip
    run(kernels, [case], workspace=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_biases_of_several_kinds(kernels: LinearKernels, dtype: Any, form: str) -> None:
    kinds: dict[str, Any] = {"bias": "rounded", "weight_format": form}
    run(kernels, [
        many(dtype, 300, [1024], 3072, **kinds),
        many(dtype, 300, [1024], 1024, norm="layer_norm", seed=1, **kinds),
        many(dtype, 300, [1024], 1000, weight_format=form, seed=2),
        many(dtype, 300, [1024], 4096, activation="gelu", seed=3, **kinds),
    ], constant=True, workspace=True)  # fmt: skip
    run(kernels, [many(dtype, 300, [1024, 4096], 1024, residual=True, **kinds)], workspace=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", [["same", "same"], ["int4", "int4"], ["int4", "int8"]])
def test_two_terms_are_added(kernels: LinearKernels, dtype: Any, forms: list[str]) -> None:
    for inner in ([1024, 4096], [32, 4096], [96, 64], [288, 288]):
        for bias in (False, True):
            case = many(dtype, 130, inner, 520, residual=bias, bias=bias, seed=inner[0], weight_format=forms)
            run(kernels, [case], constant=True, workspace=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", [("same", "same"), ("int4", "int8")])
def test_several_outputs_in_one_call(kernels: LinearKernels, dtype: Any, forms: tuple[str, str]) -> None:
    one, other = forms
    for norm in ("layer_norm", "norm_none"):
        run(kernels, [
            many(dtype, 300, [1024], 2048, norm=norm, seed=1, weight_format=one),
            many(dtype, 300, [1024], 1024, norm=norm, seed=2, weight_format=other),
            many(dtype, 300, [1024], 1000, bias=False, seed=3, weight_format=one),
            many(dtype, 300, [1024], 4096, norm=norm, activation="gelu", seed=4, weight_format=one),
        ], constant=True, workspace=True)  # fmt: skip


@pytest.mark.parametrize("form", ["same", "int4"])
def test_what_comes_in_pieces(kernels: LinearKernels, form: str) -> None:
    """More sums, weights and rows than have room at once."""
    run(kernels, [many(torch.float16, 2048, [256], 20000, weight_format=form)], workspace=True)
    run(kernels, [many(torch.float16, 96, [2560], 20011, bias=False, weight_format=form)], workspace=True)
    run(kernels, [many(torch.float16, 8192 + 70, [768], 520, norm="rms_norm", activation="silu",
                       weight_format=form)], workspace=True)  # fmt: skip


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_is_itself(kernels: LinearKernels, dtype: Any, form: str) -> None:
    """Widening loses nothing where the scale is a power of two."""
    check_every_integer(kernels, dtype, form, rows=128, workspace=True)


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_that_are_none_stay_so(kernels: LinearKernels, form: str) -> None:
    for activation, bias in itertools.product(ACTIVATIONS[:-1], (True, "rounded")):
        case = many(torch.float16, 80, [288], 64, activation=activation, weight_format=form, bias=bias)
        case.output.terms[0].input[1, 17] = float("nan")
        kernels.linear([case.output], workspace=workspace_for(kernels, [case.output]))
        torch.cuda.synchronize()
        assert case.output.output[1].isnan().all(), activation
        assert not case.output.output[[0, *range(2, 80)]].isnan().any()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [64, 2048])
def test_nothing_depends_on_how_often_or_where(kernels: LinearKernels, form: str, rows: int) -> None:
    case = many(torch.float16, rows, [1024, 4096], 1024, residual=True, weight_format=form)
    check_repeats(kernels, case, workspace=True)


@pytest.mark.parametrize("form", FORMATS)
def test_a_chain_in_a_graph_waits_for_what_it_reads(kernels: LinearKernels, form: Any) -> None:
    """The first of its calls that a process makes may be captured."""
    hidden, inner, depth, rows = 1024, 4096, 8, 72
    generator = torch.Generator("cuda").manual_seed(3)

    def weight(n: int, k: int) -> Any:
        if form == "same":
            return (torch.randn(n, k, generator=generator, device="cuda") * k**-0.5).half()
        return quantised(form, n, k, generator)[1]

    up = [weight(inner, hidden) for _ in range(depth)]
    down = [weight(hidden, inner) for _ in range(depth)]
    x = torch.randn(rows, hidden, generator=generator, device="cuda").half()
    wide, narrow = (torch.empty(rows, n, device="cuda").half() for n in (inner, hidden))
    size = max(
        kernels.workspace_size([LinearOutput(to, [LinearTerm(of, w[0], None, form)])])
        for to, of, w in ((wide, x, up), (narrow, wide, down))
    )
    memory = torch.empty(size, dtype=torch.uint8, device="cuda")
    check_chain(kernels, x, up, down, inner, formats=(form, form), workspace=memory)


def test_a_first_call_may_be_captured(kernels: LinearKernels) -> None:
    """A shape that no other test has: its algorithm is chosen while a stream is captured."""
    case = many(torch.float16, 91, [416], 424, weight_format="int4")
    memory = workspace_for(kernels, [case.output])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        kernels.linear([case.output], workspace=memory, stream=stream)
    assert case.output.output.isnan().all()
    graph.replay()
    torch.cuda.synchronize()
    case.check()


def test_threads_may_call_at_the_same_time(kernels: LinearKernels) -> None:
    cases = [many(torch.float16, 100 + i % 3, [256], 264, seed=i, weight_format="int8") for i in range(6)]
    memory = [workspace_for(kernels, [case.output]) for case in cases]
    torch.cuda.synchronize()
    wrong: list[KernelError] = []

    def call(i: int) -> None:
        try:
            stream = torch.cuda.Stream()
            for _ in range(20):
                kernels.linear([cases[i].output], workspace=memory[i], stream=stream.cuda_stream)
            stream.synchronize()
        except KernelError as error:  # told below
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for case in cases:
        case.check()
