"""bench products: sizes and bytes, what it compares, its command. Times need a GPU; here they are set."""

from __future__ import annotations

import ctypes
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.fakes.bench_gpu import FakeGpu
from support.fakes.linear import Products
from support.linear_emulator import compiled, host_call_of
from support.step_specs import MODELS

from dijiang_engines.bench.timing import Timing
from dijiang_engines.kernels import abi
from dijiang_engines.kernels.linear import LinearOutput
from dijiang_export.bench.kernels.peers import PeerError
from dijiang_export.bench.products import cells
from dijiang_export.bench.products import gpu as products_gpu
from dijiang_export.bench.products.cells import Cell, planned
from dijiang_export.bench.products.gpu import ALLOWED
from dijiang_export.bench.products.layers import Layers
from dijiang_export.bench.step.shapes import SHAPES, weight_bytes
from dijiang_export.cli import main
from dijiang_export.commands.bench import products as bench_products

CPU = torch.device("cpu")
ONE_LAYER = dataclasses.replace(MODELS["neox"], num_layers=1)


def test_few_rows_are_a_step() -> None:
    for shape in get_args(cells.Name):
        for weights in ("float", "int8", "int4"):
            cell = Cell(shape, weights, 1)  # type: ignore[arg-type]
            assert cell.nbytes == weight_bytes(SHAPES[shape], weights), cell  # type: ignore[arg-type]
            assert cell.layers == SHAPES[shape].num_layers and len(cell.sizes) == 5 * cell.layers + 1
    assert Cell("410m", "float", 1).operations == Cell("410m", "float", 1).nbytes


def test_many_rows_are_eight_layers_whose_mixed_matrices_are_int8() -> None:
    few, many = (planned(SHAPES["410m"], "int4", rows) for rows in (16, 17))
    assert few is not None and many is not None
    assert [it.format for it in few["layers.0.attention.qkv.weight"]] == ["int4", "int8"]
    (qkv,) = many["layers.0.attention.qkv.weight"]
    assert (qkv.format, qkv.rows, qkv.first_row) == ("int8", 3072, 0)
    cell = Cell("410m", "float", 2048)
    matrices = 1024 * (3 * 1024 + 1024 + 4096) + 1024 * (1024 + 4096)
    assert cell.nbytes == 2 * 8 * matrices
    assert cell.operations == 2 * 2048 * 8 * matrices
    mixed = Cell("410m", "int4", 2048).nbytes / 8
    int8 = 1024 * (3 * 1024 + 1024)  # q, k, v and dense
    assert mixed == pytest.approx(int8 * (1 + 1 / 16) + (matrices - int8) * (1 / 2 + 1 / 16))


# -- what is compared --------------------------------------------------------------------------------------


class Emulated:
    """`dijiang_linear` of quantised weights on emulated threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._emulate, self.plans = library.emulate_quantized, list[str]()

    def workspace_size(self, outputs: list[LinearOutput]) -> int:
        return 0

    def linear(self, outputs: list[LinearOutput], **_: Any) -> None:
        call, plan = host_call_of(outputs), ctypes.create_string_buffer(256)
        device = abi.DeviceStruct(90, 132, 232448)
        assert self._emulate(ctypes.byref(call), ctypes.byref(device), 0, plan, len(plan)) == 0
        self.plans.append(plan.value.decode())


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    sources = ("tests/emulator/quantized.cpp", "kernels/linear/quantized/cut.cpp")
    return Emulated(ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("products") / "quantized.so", sources))))


@pytest.mark.parametrize(("weights", "rows"), [("int8", 2), ("int4", 2), ("int4", 17)])
def test_quantised_products_are_compared_with_float64(emulated: Any, weights: Any, rows: int) -> None:
    """The kernels themselves; and with one weight changed behind their back."""
    layers = Layers(emulated, ONE_LAYER, weights, rows, 2, "float16", CPU)
    emulated.plans.clear()
    assert layers.error() <= ALLOWED["float16"]
    assert len(emulated.plans) == (5 if rows == 2 else 4)
    qkv = layers.layers[1]["attention.qkv"]
    assert [it.format for it in qkv] == {"int8": ["int8"], "int4": ["int4", "int8"][rows > 16 :]}[weights]
    qkv[-1].tensor[3] ^= 64
    assert layers.error() > ALLOWED["float16"]


@pytest.mark.parametrize(("rows", "fault"), [(3, False), (20, False), (20, True)])
def test_float_products_are_compared_with_float64(rows: int, fault: bool) -> None:
    products: Any = Products(fault)
    layers = Layers(products, ONE_LAYER, "float", rows, 3, "bfloat16", CPU)
    assert (layers.error() <= ALLOWED["bfloat16"]) is not fault
    assert products.calls == (7 if rows == 3 else 6)


def test_every_layer_has_weights_of_its_own() -> None:
    layers = Layers(Products(), ONE_LAYER, "float", 1, 3, "float16", CPU)  # type: ignore[arg-type]
    addresses = {it.tensor.data_ptr() for layer in layers.layers for parts in layer.values() for it in parts}
    assert len(addresses) == 3 * 5


def test_products_are_of_one_kind_of_model() -> None:
    spec = dataclasses.replace(MODELS["llama"], num_layers=1)
    with pytest.raises(PeerError, match="parallel residual"):
        Layers(Products(), spec, "float", 1, 1, "float16", CPU)  # type: ignore[arg-type]


def test_everybody_runs(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where tinygemm is another operator: its failure is a reason, and the others count."""
    timed: list[int] = []

    def took(run: Any, seconds: float) -> Timing:
        run()
        timed.append(1)
        return FakeGpu.took(seconds)

    monkeypatch.setattr(products_gpu, "timed", took)
    monkeypatch.setattr(cells, "SHAPES", {"410m": MODELS["neox"]})
    gpu: Any = object.__new__(products_gpu.ProductsGpu)
    gpu.device, gpu._dtype, gpu._kernels = CPU, "float16", emulated
    found = gpu.measure(Cell("410m", "int4", 1), 0.5)
    assert found["ours"]["right"] is True
    assert {"timing", "first", "second", "head"} < found["ours"].keys()
    assert found["cublas"] == {"timing": FakeGpu.took(0.5)}
    assert found["tinygemm"]["skipped"].startswith("failed: ")
    assert len(timed) == 5


# -- the command -------------------------------------------------------------------------------------------


class Gpu(FakeGpu):
    """On which ours take twice the floor, and cuBLAS 1.5 times."""

    def __init__(self, error: float = 1e-4) -> None:
        super().__init__(ALLOWED["float16"], error, dtype="float16")

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        floor = cell.nbytes / 3e12
        found = {
            "ours": self.ours(2 * floor, "first", "second"),
            "cublas": {"timing": self.took(1.5 * floor)},
        }
        if cell.weights == "int4":
            found["tinygemm"] = {"skipped": "failed: no such operator"}
        return found


def run(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *arguments: str) -> int:
    monkeypatch.setattr(products_gpu, "ProductsGpu", lambda dtype, library: gpu)
    return main(["bench", "products", *arguments])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    saved = tmp_path / "products.json"
    assert run(monkeypatch, Gpu(), "--shape", "410m", "--rows", "2048", "--save", str(saved)) == 0
    out = capsys.readouterr().out
    assert "Fake GPU, float16, a copy moves 3.00 TB/s" in out
    assert "75%" in out and "2.00" in out
    assert "note: 410m, int4 weights, 2048 rows, tinygemm: failed: no such operator" in out
    record = json.loads(saved.read_text())
    assert [cell["weights"] for cell in record["cells"]] == ["float", "int8", "int4"]
    first = record["cells"][0]
    assert first["floor"] == pytest.approx(first["bytes"] / 3e12)
    assert first["operations"] == Cell("410m", "float", 2048).operations


def test_its_choices_are_all_there_is() -> None:
    """The command says them again, so that `--help` loads nothing."""
    assert get_args(bench_products.Shape) == get_args(cells.Name)
    assert {name for name, spec in SHAPES.items() if spec.parallel_residual} == set(get_args(cells.Name))


def test_wrong_products_fail_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, Gpu(0.1), "--shape", "1b", "--rows", "1", "--weights", "int8") == 1
    captured = capsys.readouterr()
    assert "wrong" in captured.out
    assert "1b, int8 weights, 1 row, ours: 1.0e-01" in captured.err


def test_it_needs_a_gpu(capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(["bench", "products", "--shape", "410m"]) == 1
    assert "bench products needs an NVIDIA GPU" in capsys.readouterr().err
