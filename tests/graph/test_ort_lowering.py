"""The graphs for ONNX Runtime on CUDA: right on the CPU, and steps that a CUDA graph can hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.makers import random_models as rm
from support.makers.checkpoints import neox
from test_graph import GEOMETRIES, compare

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import open_runner
from dijiang_engines.validation.validate import validate
from dijiang_export.export.to_onnx import export_bundle
from dijiang_export.graph import body_ort, lower

GRAPHS = {
    "prefill_ort": ("prefill", lambda model, kind: lower.lower_to_ort(model, kind)),
    "step_ort": ("step", lambda model, kind: lower.lower_to_ort(model, kind)),
    "step_capture": ("step", lambda model, _: lower.lower_to_capture(model)),
}


def lowered(monkeypatch: pytest.MonkeyPatch, name: str, spec, model, **options):
    kind, how = GRAPHS[name]
    monkeypatch.setattr(lower, "lower_to_standard", how)
    return rm.graph_model(spec, model, kind, **options)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_graph_is_the_recurrence(name: str, geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GEOMETRIES[geometry]
    model = rm.random_model(spec, dtype=torch.float32)
    session = rm.session(lowered(monkeypatch, name, spec, model))
    lengths = (1,) if name.startswith("step") else (1, 5, 130)
    far = 0 if spec.position_embeddings else 999_950
    for length in lengths:
        for start in (0, far):
            call = rm.random_call(spec, 4, length, seed=length, far=start)
            compare(spec, model, session, call)


@pytest.mark.parametrize("name", GRAPHS)
def test_logits_of_all_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rm.random_model(rm.LLAMA, dtype=torch.float32)
    session = rm.session(lowered(monkeypatch, name, rm.LLAMA, model, all_logits=True))
    length = 1 if name.startswith("step") else 70
    compare(rm.LLAMA, model, session, rm.random_call(rm.LLAMA, 3, length, seed=2), all_logits=True)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_operator_carries_the_recurrence_unless_heads_are_too_wide(
    geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = GEOMETRIES[geometry]
    model = rm.random_model(spec, dtype=torch.float32)
    expected = spec.num_layers if spec.head_dim <= body_ort.WIDEST_HEAD else 0
    for name in ("prefill_ort", "step_ort"):
        graph = lowered(monkeypatch, name, spec, model)
        ops = [node for node in graph.graph if node.domain == body_ort.DOMAIN]
        assert len(ops) == expected
        assert (body_ort.DOMAIN in graph.opset_imports) == bool(expected)
        for node in ops:
            assert node.attributes["update_rule"].value == "gated"
            assert node.attributes["scale"].value == 1.0  # 0 would stand for 1 / sqrt(d)


# -- bundles ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sample-float32", "sample-float16", "tables"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dijiang_engines.shipped_sample import sample_checkpoint

    folder = tmp_path_factory.mktemp("variants")
    kind, _, dtype = request.param.partition("-")
    source = sample_checkpoint() if kind == "sample" else Path("tests/data/goldens/neox-trained-tables")
    export_bundle(source, folder / "b", dtype=dtype or "float32", variants=("ort", "capture", "ort"))
    return folder / "b"


@pytest.mark.parametrize("lowering", ["ort", "ort-step", "capture"])
def test_recorded_cases_pass(bundle: Path, lowering: str) -> None:
    opened = open_bundle(bundle)
    runner = open_runner(opened, "cpu", threads=1, lowering=lowering)
    report = validate(runner, opened.reference(), dtype=opened.dtype)
    assert report.passed, report.failures[:3]
    assert report.results


def sizes_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Sizes of int64 initializers that are vectors."""
    return {
        i.name: onnx.numpy_helper.to_array(i).tolist()
        for i in model.graph.initializer
        if i.data_type == onnx.TensorProto.INT64 and len(i.dims) == 1 and i.data_location == 0
    }


def obstacles(model: onnx.ModelProto) -> list[str]:
    """Nodes of a graph that a CUDA graph cannot hold, or that copy from the host while it runs.

    Shapes may be computed, on the CPU and before the capture, if all that they end in is a Reshape or a
    Range, whose CUDA kernels read them there.
    """
    sizes = sizes_of(model)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    of_shapes: set[str] = set()
    found = []
    for node in model.graph.node:
        touched = [index for index, name in enumerate(node.input) if name in of_shapes]
        if node.op_type == "Shape" or (
            touched
            and node.op_type in ("Concat", "Slice", "Gather", "Squeeze", "Unsqueeze")
            and all(name in of_shapes or name in sizes for name in node.input)
        ):
            of_shapes.update(node.output)
            continue
        uneven = False
        if node.op_type == "Split":
            parts = sizes.get(node.input[1]) if len(node.input) > 1 else [1]
            uneven = parts is None or len(set(parts)) > 1
        if node.op_type == "Concat":
            axis = next(a.i for a in node.attribute if a.name == "axis")
            uneven = len({shapes.get(name, [index] * 9)[axis] for index, name in enumerate(node.input)}) > 1
        elsewhere = ("Size", "Loop", "If", "Scan", "NonZero", "ScatterND", "Where")
        misused = touched and node.op_type != "Range" and (node.op_type != "Reshape" or touched != [1])
        if uneven or misused or node.op_type in elsewhere:
            found.append(f"{node.op_type} {node.name}")
    return found


def optimized(model: str | bytes, folder: Path, level: str = "ORT_ENABLE_ALL") -> onnx.ModelProto:
    """A graph as ONNX Runtime rewrites it for the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result = onnx.load(folder / "optimized.onnx", load_external_data=False)
    assert len(result.graph.node) > 20
    return result


@pytest.mark.parametrize("name", ["step_ort", "step_capture"])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_steps_for_cuda_graphs_have_nothing_in_their_way(
    bundle: Path, name: str, level: str, tmp_path: Path
) -> None:
    """Neither as they are written nor as ONNX Runtime rewrites them."""
    graph = open_bundle(bundle).graph_path(name)
    assert obstacles(optimized(str(graph), tmp_path, level)) == []


def test_the_standard_step_is_what_the_obstacles_are_about(bundle: Path) -> None:
    """Its RoPE and its heads are split into unequal parts; if it changes, it may be captured too."""
    model = onnx.load(open_bundle(bundle).graph_path("step"), load_external_data=False)
    assert any(line.startswith("Split") for line in obstacles(model))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_other_families_have_nothing_in_their_way(
    geometry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = GEOMETRIES[geometry]
    model = rm.random_model(spec, dtype=torch.float32)
    for name in ("step_ort", "step_capture"):
        proto = rm.ir.to_proto(lowered(monkeypatch, name, spec, model))
        assert obstacles(proto) == []
        assert obstacles(optimized(proto.SerializeToString(), tmp_path)) == []


def test_default_bundles_have_no_variants(sample_bundle: Path) -> None:
    opened = open_bundle(sample_bundle)
    assert set(opened.graphs) == {"prefill", "step", "prefill_trt", "step_trt"}
    assert not list(sample_bundle.glob("*.ort.onnx"))


def test_wide_heads_export_and_run(tmp_path: Path) -> None:
    source = neox(hidden=256, heads=1).save(tmp_path / "wide")
    export_bundle(source, tmp_path / "b", variants=("ort",))
    opened = open_bundle(tmp_path / "b")
    report = validate(open_runner(opened, "cpu", threads=1, lowering="ort"), opened.reference())
    assert report.passed, report.failures[:3]


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown variant 'cuda'"):
        export_bundle("anything", tmp_path / "b", variants=("cuda",))


def test_the_cpu_takes_the_standard_graphs_by_itself(bundle: Path) -> None:
    assert open_runner(open_bundle(bundle), "cpu").config.lowering == "standard"  # type: ignore[attr-defined]


def test_both_steps_agree(bundle: Path) -> None:
    opened = open_bundle(bundle)
    results = []
    for lowering in ("standard", "ort", "capture"):
        runner = open_runner(opened, "cpu", threads=1, lowering=lowering)
        state = runner.new_state(2)
        ids = np.array([[5, 6, 7], [8, 9, 0]])
        runner.prefill(ids, np.zeros(2, np.int64), np.array([3, 2]), state)
        results.append(runner.step(np.array([[4], [4]]), np.array([3, 2]), np.ones(2, np.int64), state))
    for other in results[1:]:
        assert np.abs(other - results[0]).max() <= 0.02 * results[0].std()
