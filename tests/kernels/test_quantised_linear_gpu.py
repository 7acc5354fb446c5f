"""dijiang_linear with quantised weights on a GPU against float64: few rows and many, every format and type.

Skipped, with the reason, without a GPU or without the compiled kernels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dijiang_engines.errors import PluginError
from dijiang_engines.kernels.linear import LinearKernels
from dijiang_engines.plugin.cache import find_kernels_library

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from support.linear_cases import (  # noqa: E402
    ACTIVATIONS,
    check_chain,
    check_every_integer,
    check_repeats,
    make,
    quantised,
    run,
)

DTYPES = [torch.float16, torch.bfloat16]
FORMATS = ["int8", "int4"]


@pytest.fixture(scope="module")
def kernels() -> LinearKernels:
    try:
        return LinearKernels(Path(os.environ.get("DIJIANG_KERNELS") or find_kernels_library()))
    except PluginError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 16, 17, 40, 127, 128, 129, 350])
@pytest.mark.parametrize("norm", ["norm_none", "layer_norm", "rms_norm"])
def test_rows_and_norms(kernels: LinearKernels, dtype: Any, form: str, rows: int, norm: str) -> None:
    case = make(dtype, rows, [768], 1000, norm=norm, seed=rows, weight_format=form)
    print("quantised", dtype, form, rows, norm, run(kernels, [case]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("inner", [32, 64, 96, 160, 1024, 2560, 11008])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 515])
def test_sizes(kernels: LinearKernels, dtype: Any, form: str, inner: int, width: int) -> None:
    for rows in (1, 3, 20, 200):
        case = make(dtype, rows, [inner], width, seed=inner + width, weight_format=form)
        run(kernels, [case], constant=rows == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_activations(
    kernels: LinearKernels, dtype: Any, form: str, activation: str, residual: bool, bias: bool
) -> None:
    inner = [544, 544] if activation == "swiglu" else [544]
    for rows, norm in (
        (1, "norm_none"), (8, "layer_norm"), (11, "rms_norm"), (200, "norm_none"), (33, "rms_norm")
    ):  # fmt: skip
        case = make(
            dtype, rows, inner, 328, activation=activation, residual=residual, bias=bias, norm=norm,
            weight_format=form,
        )  # fmt: skip
        run(kernels, [case])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", [["int8", "int8"], ["int4", "int4"], ["int4", "int8"], ["int8", "int4"]])
@pytest.mark.parametrize("rows", [1, 4, 16, 130])
def test_two_terms_are_added(kernels: LinearKernels, dtype: Any, forms: list[str], rows: int) -> None:
    for inner in ([1024, 4096], [32, 4096], [2560, 10240], [96, 64], [288, 288]):
        case = make(dtype, rows, inner, 520, residual=True, seed=inner[0], weight_format=forms)
        run(kernels, [case], constant=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_two_factors_of_unlike_formats(kernels: LinearKernels, dtype: Any, rows: int) -> None:
    for forms in (["int4", "int8"], ["int8", "int4"]):
        case = make(dtype, rows, [352, 352], 100, activation="swiglu", weight_format=forms)
        run(kernels, [case])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 13, 140])
def test_several_outputs_in_one_launch(kernels: LinearKernels, dtype: Any, rows: int) -> None:
    """The query and key rows of a layer in int4, its value rows in int8, gate and the MLP's first."""
    for norm in ("layer_norm", "norm_none"):
        run(kernels, [
            make(dtype, rows, [1024], 2048, norm=norm, seed=1, weight_format="int4"),
            make(dtype, rows, [1024], 1024, norm=norm, seed=2, weight_format="int8"),
            make(dtype, rows, [1024], 1000, bias=False, seed=3, weight_format="int4"),
            make(dtype, rows, [1024], 4096, norm=norm, activation="gelu", seed=4, weight_format="int4"),
        ], constant=True)  # fmt: skip
    run(kernels, [
        make(dtype, rows, [256, 4096], 1024, residual=True, seed=5, weight_format=["int4", "int8"]),
        make(dtype, rows, [64, 64], 9, activation="swiglu", norm="rms_norm", seed=6, weight_format="int4"),
    ])  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_is_itself(kernels: LinearKernels, dtype: Any, form: str) -> None:
    for rows in (1, 16, 128):
        check_every_integer(kernels, dtype, form, rows)


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_that_are_none_stay_so(kernels: LinearKernels, form: str) -> None:
    for rows in (3, 20):
        for activation in ACTIVATIONS[:-1]:
            case = make(torch.float16, rows, [288], 64, activation=activation, weight_format=form)
            case.output.terms[0].input[1, 17] = float("nan")
            kernels.linear([case.output])
            torch.cuda.synchronize()
            assert case.output.output[1].isnan().all(), activation
            assert not case.output.output[[0, 2]].isnan().any()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_nothing_depends_on_how_often_or_where(kernels: LinearKernels, form: str, rows: int) -> None:
    check_repeats(kernels, make(torch.float16, rows, [1024, 4096], 1024, residual=True, weight_format=form))


@pytest.mark.parametrize("forms", [("int4", "int4"), ("int4", "int8"), ("int8", "int4")])
@pytest.mark.parametrize("rows", [1, 8, 16, 256])
def test_a_chain_in_a_graph_waits_for_what_it_reads(
    kernels: LinearKernels, rows: int, forms: tuple[str, str]
) -> None:
    hidden, inner, depth = 1024, 4096, 20
    generator = torch.Generator("cuda").manual_seed(3)
    up = [quantised(forms[0], inner, hidden, generator)[1] for _ in range(depth)]
    down = [quantised(forms[1], hidden, inner, generator)[1] for _ in range(depth)]
    x = torch.randn(rows, hidden, generator=generator, device="cuda").half()
    norm = ("rms_norm", torch.ones(hidden, device="cuda"), None, 1e-5) if rows <= 16 else ()
    check_chain(kernels, x, up, down, inner, formats=forms, norm=norm)
