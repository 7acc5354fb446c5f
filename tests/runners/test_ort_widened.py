"""`--prepack wide`: a prefill of quantised weights on ONNX Runtime that multiplies with float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from support.makers.checkpoints import llama, neox
from support.makers.toy_bundle import ToyModel
from support.oracles.numpy_runner import NumpyRunner

from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.onnxruntime import config
from dijiang_engines.runners.onnxruntime.runner import OrtRunner
from dijiang_engines.runners.onnxruntime.widened import Widened, widen
from dijiang_engines.validation.validate import validate
from dijiang_export.cli import main
from dijiang_export.commands import arguments

Exported = Callable[..., tuple[Path, NumpyRunner]]
A = np.array
CASES: dict[str, dict[str, Any]] = {
    "int8": {"weight_format": "int8"},
    "int4 and int8": {"weight_format": "int4"},  # head, v and dense are int8 then
    "all logits": {"weight_format": "int8", "logits": "all"},
}
MODELS = {"neox": neox(vocab=97, hidden=64, heads=4, intermediate=96), "llama": llama(vocab=97, kv_heads=2)}


def runner_of(folder: Path, prepack: str) -> OrtRunner:
    runner = open_runner(open_bundle(folder), "onnxruntime-cpu", threads=1, prepack=prepack)
    assert isinstance(runner, OrtRunner)
    return runner


def widened_graph(bundle: Bundle) -> Widened:
    assert bundle.quantisation is not None
    data = np.fromfile(bundle.path / "weights.data", np.uint8)
    model = bundle.graph_path("prefill").read_bytes()
    return widen(model, bundle.quantisation.stored, data, "weights.data")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_it_computes_what_all_does(exported: Exported, model: str, case: str) -> None:
    folder, _ = exported(MODELS[model], **CASES[case])
    bundle = open_bundle(folder)
    found = {}
    for prepack in ("all", "wide"):
        runner = runner_of(folder, prepack)
        validate(
            runner, bundle.reference(), dtype=bundle.dtype, activations=bundle.activations
        ).raise_on_mismatch()
        state = runner.new_state(2)
        rng = np.random.default_rng(5)
        lens = A([70, 33])
        prefilled = runner.prefill(rng.integers(0, 97, (2, 70)), A([0, 0]), lens, state)
        stepped = runner.step(rng.integers(0, 97, (2, 1)), lens, A([1, 1]), state)
        found[prepack] = [prefilled[0], prefilled[1, :33], stepped, *runner.export_state(state)]
    for one, other in zip(found["all"], found["wide"], strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * float(np.std(one)))


@pytest.mark.parametrize("case", CASES)
def test_the_matrices_are_the_stored_ones_exactly(exported: Exported, case: str) -> None:
    """Some elements of each, by the definition of MatMulNBits: q · scale."""
    folder, _ = exported(MODELS["neox"], **CASES[case])
    bundle = open_bundle(folder)
    wide = widened_graph(bundle)
    tensors = {
        t.name: onnx.numpy_helper.to_array(t, str(folder))
        for t in onnx.load(bundle.graph_path("prefill"), load_external_data=False).graph.initializer
    }
    assert bundle.quantisation is not None
    seen = set()
    for matrix in bundle.quantisation.stored:
        array = wide.arrays.get(f"{matrix.name}.wide")
        if array is None:
            continue
        seen.add(matrix.format)
        bytes_of, scales = tensors[matrix.stored_name], tensors[matrix.scale_name]
        for n, k in ((0, 0), (1, 31), (matrix.rows - 1, matrix.columns - 1), (matrix.rows // 2, 33)):
            block, at = divmod(k, 32)
            if matrix.format == "int8":
                q = int(bytes_of[n, block, at]) - 128
            else:
                q = (int(bytes_of[n, block, at // 2]) >> 4 * (at % 2) & 15) - 8
            assert array[k, n] == np.float32(q) * np.float32(scales[n, block])
    assert seen == ({"int8"} if case != "int4 and int8" else {"int4", "int8"})


def test_no_product_of_floats_is_left_and_others_are(exported: Exported) -> None:
    folder, _ = exported(MODELS["neox"], weight_format="int8")
    bundle = open_bundle(folder)
    made = onnx.load_from_string(widened_graph(bundle).model).graph
    levels = [
        {a.name: a.i for a in node.attribute}.get("accuracy_level", 0)
        for node in made.node
        if node.op_type == "MatMulNBits"
    ]
    assert levels == [4], "the head, whose one token is read in terms of int8"
    assert sum(node.op_type == "MatMul" for node in made.node) > 2 * 5


def test_only_the_prefill_is_wide(exported: Exported) -> None:
    folder, _ = exported(MODELS["neox"], weight_format="int8")
    runner = runner_of(folder, "wide")
    assert runner.settings()["prepack"] == "wide"
    runner.warm_up(prefill=False)
    assert not runner.sessions._wide
    runner.warm_up()
    assert runner.sessions._wide


def test_there_is_nothing_to_widen(toy: tuple[Path, ToyModel], exported: Exported) -> None:
    with pytest.raises(RunnerError, match="float weights, float32 activations"):
        runner_of(toy[0], "wide")
    half, _ = exported(MODELS["neox"], weight_format="int8", dtype="float16")
    with pytest.raises(RunnerError, match="int8 weights, float16 activations"):
        runner_of(half, "wide")


def test_int8_activations_stay(exported: Exported) -> None:
    """Exported so that a prefill rounds activations, it has no product of floats."""
    folder, _ = exported(MODELS["neox"], weight_format="int8", activations="int8")
    assert not widened_graph(open_bundle(folder)).arrays
    runner_of(folder, "wide").warm_up()


def test_commands_take_it(exported: Exported) -> None:
    folder, _ = exported(MODELS["neox"], weight_format="int8")
    assert main(["validate", str(folder), "--runner", "cpu", "--threads", "1", "--prepack", "wide"]) == 0
    assert get_args(arguments.Prepack) == get_args(config.Prepack)
