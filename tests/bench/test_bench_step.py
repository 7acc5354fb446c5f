"""bench step: its models and bytes, what it compares, its command. Times need a GPU; here they are set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.fakes.bench_gpu import FakeGpu
from support.fakes.linear import Products
from support.makers.random_models import random_model as small_model
from support.quantised_models import quantise_model
from support.step_emulator import compile_emulated, missing
from support.step_specs import MODELS

from dijiang_engines.kernels.step import StepKernels
from dijiang_engines.weight_formats import matrix_shapes
from dijiang_export.bench.kernels.peers import PeerError
from dijiang_export.bench.step import gpu as step_gpu
from dijiang_export.bench.step import shapes
from dijiang_export.bench.step.bare import cublas
from dijiang_export.bench.step.gpu import ALLOWED, step_error
from dijiang_export.bench.step.launches import Launches
from dijiang_export.bench.step.one_launch import OneLaunch
from dijiang_export.bench.step.shapes import SHAPES, Cell, formats, product_sizes, weight_bytes
from dijiang_export.bench.step.weights import random_model, widened
from dijiang_export.cli import main
from dijiang_export.commands.bench import cells as bench_cells
from dijiang_export.commands.bench import step as bench_step
from dijiang_export.reference import attention

CPU = torch.device("cpu")
NEOX = MODELS["neox"]


# -- what is measured --------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_matrices() -> None:
    """The sizes that docs/performance.md has for the same models."""
    assert weight_bytes(SHAPES["410m"], "float") == 757_334_016
    assert 5.69e9 < weight_bytes(SHAPES["2.8b"], "float") < 5.72e9
    assert 1.86e9 < weight_bytes(SHAPES["2.8b"], "int4") < 1.90e9
    for name, spec in SHAPES.items():
        shapes = matrix_shapes(spec)
        if not spec.tied_embeddings:
            del shapes["embed_tokens.weight"]
        elements = sum(n * k for n, k in shapes.values())
        assert weight_bytes(spec, "float") == 2 * elements, name
        assert weight_bytes(spec, "int8") == elements + 2 * elements // 32, name
        assert sum(n * k for n, k in product_sizes(spec)) == elements, name


def test_random_models_are_finite_and_of_the_shape() -> None:
    spec = dataclasses.replace(SHAPES["smollm2-135m"], num_layers=2, vocab_size=97)
    model = random_model(spec, torch.float16, CPU)
    ids = torch.tensor([[3, 5, 7]])
    zeros, lens = torch.zeros(1, dtype=torch.int64), torch.tensor([3])
    logits, _ = widened(model, CPU)(ids, zeros, lens, model.double().new_states(1), form="parallel")
    assert logits.shape == (1, 3, 97)
    assert torch.isfinite(logits).all() and 0.1 < float(logits.std()) < 100


# -- what is compared --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> StepKernels:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    return compile_emulated(tmp_path_factory.mktemp("step"))


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_one_launch_is_compared_with_the_reference(emulated: StepKernels, kind: str | None) -> None:
    """The kernel itself, on emulated threads; and with one weight changed behind its back."""
    model = small_model(NEOX, 1, torch.float16)
    quantised = None if kind is None else quantise_model(NEOX, model, kind)
    step = OneLaunch(emulated, NEOX, model, "float16", 2, "cpu", quantised)
    assert step_error(step, widened(model, CPU), 100) <= ALLOWED["float16"]
    model.state_dict()["layers.0.mlp.up.weight"][0] += 5.0
    assert step_error(step, widened(model, CPU), 100) > ALLOWED["float16"]


class Attention:
    """`dijiang_attention` by the reference."""

    def workspace_size(self, *_: Any) -> int:
        return 0

    sync_size = workspace_size

    def attention_tensors(self, g: Any, *, output: Any, past_state: Any, stream: int, **t: Any) -> None:
        made, state = attention.dijiang_attention(
            t["qkv"].double(), t["gate"].double(), past_state.double(), t["positions"], t["seq_lens"],
            t["proj"].double(), t["norm_weight"].double(), t["norm_bias"].double(), t["inv_freq"],
            decay=attention.Decay(t["log_decay"].double()), attributes=g,
        )  # fmt: skip
        output.copy_(made)
        past_state.copy_(state)


@pytest.mark.parametrize("fault", [False, True])
def test_launches_are_compared_with_the_reference(fault: bool) -> None:
    model = small_model(NEOX, 1, torch.float16)
    products: Any = Products(fault)
    step = Launches(Attention(), products, NEOX, model, "float16", 3)  # type: ignore[arg-type]
    found = step_error(step, widened(model, CPU), 100)
    assert (found <= ALLOWED["float16"]) is not fault
    assert products.calls == 2 * (2 * NEOX.num_layers + 1)


def test_launches_are_for_one_kind_of_model() -> None:
    spec = MODELS["llama"]
    with pytest.raises(PeerError, match="parallel residual"):
        Launches(Attention(), Products(), spec, small_model(spec, 1), "float16", 1)  # type: ignore[arg-type]


def test_bare_products_are_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], torch.matmul

    def matmul(a: Any, b: Any, *, out: Any) -> Any:
        seen.append((b.shape[1], b.shape[0]))
        return real(a, b, out=out)

    run = cublas(product_sizes(NEOX), 2, torch.float32, CPU)
    monkeypatch.setattr(torch, "matmul", matmul)
    run()
    assert seen == product_sizes(NEOX)


# -- the command -------------------------------------------------------------------------------------------


class Gpu(FakeGpu):
    """On which a step takes twice its floor."""

    def __init__(self, error: float = 1e-3) -> None:
        super().__init__(ALLOWED["float16"], error, dtype="float16")

    def measure(self, cell: Cell, seconds: float) -> dict[str, Any]:
        median = 2 * weight_bytes(SHAPES[cell.shape], cell.weights) / 3e12
        found = {"one launch": self.ours(median, "far")}
        if cell.weights == "int4":
            found["tinygemm"] = {"timing": self.took(median)}
        elif cell.rows == 8:
            found["one launch"] = {"skipped": "does not fit"}
        return found


def run(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *arguments: str) -> int:
    monkeypatch.setattr(step_gpu, "StepGpu", lambda dtype, library: gpu)
    return main(["bench", "step", *arguments])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    saved = tmp_path / "step.json"
    assert run(monkeypatch, Gpu(), "--shape", "410m", "--save", str(saved)) == 0
    out = capsys.readouterr().out
    assert "Fake GPU, float16, a copy moves 3.00 TB/s" in out
    assert "410m, int4 weights, 1 row " in out and "2.00" in out
    assert "note: 410m, float weights, 8 rows, one launch: does not fit" in out
    record = json.loads(saved.read_text())
    assert [(s["weights"], s["rows"]) for s in record["cells"]] == [
        (weights, rows) for weights in ("float", "int8", "int4") for rows in (1, 8)
    ]
    first = record["cells"][0]
    assert first["floor"] == pytest.approx(757_334_016 / 3e12)
    assert first["results"]["one launch"]["timing"]["median"] == pytest.approx(2 * first["floor"])
    assert formats(SHAPES["410m"], "float") is None


def test_its_choices_are_all_there_is() -> None:
    """The command says them again, so that `--help` loads nothing."""
    assert get_args(bench_step.Shape) == get_args(shapes.Name) == tuple(SHAPES)
    assert get_args(bench_cells.Weights) == get_args(shapes.Weights)
    assert set(get_args(bench_cells.Half)) == set(ALLOWED)


def test_a_wrong_step_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, Gpu(error=0.1), "--shape", "1b", "--rows", "1", "--weights", "int8") == 1
    captured = capsys.readouterr()
    assert "wrong" in captured.out
    assert "1b, int8 weights, 1 row, one launch: 1.0e-01" in captured.err


def test_it_needs_a_gpu(capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(["bench", "step", "--shape", "410m"]) == 1
    assert "bench step needs an NVIDIA GPU" in capsys.readouterr().err
