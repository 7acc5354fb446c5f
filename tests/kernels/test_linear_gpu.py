"""dijiang_linear on a GPU against float64: sizes, norms, activations, residuals, two terms, chains of calls.

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

from support.linear_cases import ACTIVATIONS, check_chain, check_repeats, make, run  # noqa: E402


@pytest.fixture(scope="module")
def kernels() -> LinearKernels:
    try:
        return LinearKernels(Path(os.environ.get("DIJIANG_KERNELS") or find_kernels_library()))
    except PluginError as error:
        pytest.skip(str(error))


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
    check_repeats(kernels, make(torch.float16, 8, [1024, 4096], 1024, residual=True))


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_a_chain_in_a_graph_waits_for_what_it_reads(kernels: LinearKernels, rows: int) -> None:
    hidden, inner, depth = 1024, 4096, 40
    generator = torch.Generator("cuda").manual_seed(3)
    up = [torch.randn(inner, hidden, generator=generator, device="cuda").half() / 32 for _ in range(depth)]
    down = [torch.randn(hidden, inner, generator=generator, device="cuda").half() / 64 for _ in range(depth)]
    x = torch.randn(rows, hidden, generator=generator, device="cuda").half()
    norm = ("rms_norm", torch.ones(hidden, device="cuda"), None, 1e-5)
    check_chain(kernels, x, up, down, inner, norm=norm)
