"""A step plan of one plugin layer: what TensorRT is given computes the model's step, its weights bit for bit.

The layer is computed by the kernel itself, compiled for the host, from nothing but what the network holds:
its constants and the plugin's fields (support/fakes/step_network.py). That TensorRT takes such a layer is
tests/building/test_rtx_builds.py's and the GPU's to show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.fakes.step_network import OnAStream, computed, make, write_graph
from support.fakes.tensorrt import FakeMachine
from support.makers.engine_folders import build
from support.makers.random_models import LLAMA, OPT_350M, random_call, random_model
from support.oracles.packed_step import unpacked
from support.quantised_models import STORED_KINDS, formats_of, quantise_model
from support.step_emulator import compile_emulated, missing
from support.step_models import EmulatedKernels, PackedStep, reference_step, torch_dtype
from support.step_specs import MODELS, SMALL

from dijiang_engines import io_names
from dijiang_engines.building import build as build_module
from dijiang_engines.building.plans import no_one_launch
from dijiang_engines.building.recipes import Recipe, load_recipe, recipe_names
from dijiang_engines.building.step.one_launch import fields
from dijiang_engines.building.step.tensors import StepTensors
from dijiang_engines.errors import KernelError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.kernels.library import Device
from dijiang_engines.kernels.step import StepModel
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.spec import ModelSpec
from dijiang_export.bench.step.gpu import ALLOWED, relative_error

H100 = Device(90, 132, 232448)
Export = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> OnAStream:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    return OnAStream(compile_emulated(tmp_path_factory.mktemp("step")).path)


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    FakeMachine(tmp_path / "machine").enter(monkeypatch)
    return Cuda()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "modern", "rows"), [("float16", False, 2), ("bfloat16", True, 3)])
def test_the_network_is_the_models_step(
    name: str, dtype: str, modern: bool, rows: int, emulated: OnAStream, cuda: Cuda, tmp_path: Path
) -> None:
    spec = MODELS[name]
    network, model, _ = make(tmp_path, spec, dtype, rows, emulated, cuda, modern)
    check_step(network, model, spec, dtype, rows, emulated)


def check_step(network: Any, model: Any, spec: ModelSpec, dtype: str, rows: int, emulated: OnAStream) -> None:
    """What the layer computes of what the network holds is what the model does."""
    _, positions, lens, states = random_call(spec, rows, 1, 3)
    ids = np.random.default_rng(2).integers(0, spec.vocab_size, (rows, 1))
    past = {io_names.past_state(i): state for i, state in enumerate(states)}
    given = {"input_ids": ids, "positions": positions, "seq_lens": lens} | past
    logits, *new = computed(network, given, emulated)
    wanted, expected = reference_step(model, ids[:, 0], positions, lens, states)
    read = [row for row in range(rows) if lens[row]]
    assert relative_error(torch.from_numpy(logits[read, 0]), wanted[read]) <= ALLOWED[dtype]
    for mine, theirs in zip(new, expected, strict=True):
        assert relative_error(torch.from_numpy(mine), theirs) <= ALLOWED[dtype]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("kind", "dtype", "modern", "rows"),
    [("int8", "float16", False, 1), ("int4", "bfloat16", True, 3), ("mixed", "float16", True, 2)],
)
def test_the_network_is_the_models_step_with_quantised_weights(
    name: str, kind: str, dtype: str, modern: bool, rows: int, emulated: OnAStream, cuda: Cuda, tmp_path: Path
) -> None:
    """The reference has the weights that are stored, q times scale, in float64."""
    spec = MODELS[name]
    network, model, _ = make(tmp_path, spec, dtype, rows, emulated, cuda, modern, kind)
    check_step(network, model, spec, dtype, rows, emulated)


@pytest.mark.parametrize("modern", [False, True])
def test_inputs_and_outputs_are_those_of_the_step_graph(
    modern: bool, emulated: OnAStream, cuda: Cuda, tmp_path: Path
) -> None:
    network, *_ = make(tmp_path, SMALL, "float16", 8, emulated, cuda, modern)
    graph = ir.load(tmp_path / "step.trt.onnx").graph
    assert [tensor.name for tensor in network.inputs] == [value.name for value in graph.inputs]
    assert [tensor.name for tensor in network.outputs] == [value.name for value in graph.outputs]
    for tensor, value in zip(network.inputs, graph.inputs, strict=True):
        assert value.shape is not None
        assert tensor.shape == tuple(size if isinstance(size, int) else -1 for size in value.shape)
        assert tensor.kind == ("float32" if len(tensor.shape) == 4 else "int64" if modern else "int32")
    (layer,) = network.layers
    assert layer.inputs[: len(network.inputs)] == network.inputs and layer.name == "DijiangStep"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_keep_their_bits(
    name: str, dtype: str, emulated: OnAStream, cuda: Cuda, tmp_path: Path
) -> None:
    """Packed from the file as from the model; tables as they are in it, once each."""
    spec = MODELS[name]
    network, model, done = make(tmp_path, spec, dtype, 1, emulated, cuda)
    packed, embedding, *learned = (t.array for t in network.layers[0].inputs if t.array is not None)
    step = PackedStep(emulated_now(emulated), spec, model, dtype, 1, "cpu")
    size = step.size.packed
    assert done.packed_bytes == size and packed.shape == (size // 128, 32)
    mine, theirs = packed.view(np.uint8).reshape(-1), step.packed.numpy()
    written = theirs != 0xFF  # PackedStep poisons what nobody writes, add_step has zeros there
    assert np.array_equal(mine[written], theirs[written]) and not mine[~written & (mine != 0xFF)].any()
    state = model.state_dict()
    tables = {"embed_tokens.weight": embedding} | ({"embed_positions.weight": learned[0]} if learned else {})
    for source, array in tables.items():
        assert np.array_equal(array.view(np.int16), bits(state[source], dtype)), source
    assert len(learned) == ("embed_positions.weight" in state)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", STORED_KINDS)
def test_quantised_weights_keep_their_bits(
    name: str, kind: str, emulated: OnAStream, cuda: Cuda, tmp_path: Path
) -> None:
    """Packed from the file byte for byte as from the matrices in memory; all of them, as step.h says; the
    embedding as it is stored, once."""
    spec = MODELS[name]
    quantised = quantise_model(spec, random_model(spec, 1, torch.float16), kind)
    network, model, done = make(tmp_path, spec, "float16", 1, emulated, cuda, kind=kind)
    packed, embedding, scales, *learned = (t.array for t in network.layers[0].inputs if t.array is not None)
    step = PackedStep(emulated_now(emulated), spec, model, "float16", 1, "cpu", quantised)
    assert done.packed_bytes == step.size.packed and packed.shape == (step.size.packed // 128, 32)
    mine, theirs = packed.view(np.uint8).reshape(-1), step.packed.numpy()
    written = theirs != 0xFF
    assert np.array_equal(mine[written], theirs[written]) and not mine[~written & (mine != 0xFF)].any()
    found = unpacked(StepModel.of(spec, "float16", quantised.parts), mine, step.size.blocks)
    state = model.state_dict()
    head = torch.from_numpy(found[0, "head"])
    assert relative_error(head, state["lm_head.weight"].double()) < 1e-3  # of float16
    for layer in range(spec.num_layers):
        down = state[f"layers.{layer}.mlp.down.weight"].double()
        assert relative_error(torch.from_numpy(found[layer, "down"]), down) < 1e-3
    values = quantised.values["embed_tokens.weight"].numpy()
    stored = quantised.scales["embed_tokens.weight"].numpy().tobytes()
    assert embedding.dtype == np.int32 and embedding.shape == (spec.vocab_size, spec.hidden_size // 4)
    assert embedding.tobytes() == values.tobytes()
    assert scales.shape == (-(-len(stored) // 128), 32)
    assert scales.tobytes() == stored.ljust(scales.nbytes, b"\0")
    assert len(learned) == ("embed_positions.weight" in state)


def bits(tensor: torch.Tensor, dtype: str) -> Any:
    return tensor.to(torch_dtype(dtype)).view(torch.int16).numpy()


def emulated_now(kernels: OnAStream) -> EmulatedKernels:
    """The same library, which packs at once."""
    return EmulatedKernels(kernels.path)


def test_a_layer_for_another_gpu_has_other_blocks(
    emulated: OnAStream, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many is a field, by which the plugin refuses to run where it is another."""
    monkeypatch.setattr(emulated, "device", H100)
    network, _, done = make(tmp_path, SMALL, "float16", 8, emulated, cuda)
    blocks = emulated.step_size(StepModel.of(SMALL, "float16"), 8, H100).blocks
    assert network.layers[0].fields["blocks"].tolist() == [blocks] == [done.blocks]
    assert done.to_json() == {"launches": 1, "blocks": blocks, "packed_bytes": done.packed_bytes}


def test_the_fields_are_the_plugins() -> None:
    """Those of plugins/tensorrt/step/fields.cpp; one is of quantised weights alone, one of plans alone."""
    text = (Path(__file__).parents[2] / "plugins/tensorrt/step/fields.cpp").read_text()
    rules = dict(re.findall(r'\{"(\w+)", k(Integer|Real), \w+\}', text))
    assert rules.pop("packing") == "Integer"
    constants: Any = SimpleNamespace(size=SimpleNamespace(blocks=7))
    parts = formats_of(SMALL, "int4")
    made = fields(StepModel.of(SMALL, "float16", parts), 3, constants)
    assert {n: {"int32": "Integer", "float32": "Real"}[str(v.dtype)] for n, v in made.items()} == rules
    assert made["rows"].tolist() == [3] and made["blocks"].tolist() == [7]
    # the head's and the embedding's formats, then v and dense of each layer
    assert made.pop("weight_formats").tolist() == [1, 1, *[0b10100] * SMALL.num_layers]
    assert made == fields(StepModel.of(SMALL, "float16"), 3, constants)


# -- what is refused -----------------------------------------------------------------------------------


def test_a_graph_with_other_weights_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path, SMALL, random_model(SMALL, 1, torch.float16), "float16")
    for changes, word in (
        ({"num_layers": SMALL.num_layers + 1}, f"layers.{SMALL.num_layers}"),
        ({"num_layers": 1}, "layers.1"), ({"mlp_bias": False}, "mlp.down.bias"),
        ({"intermediate_size": 160}, "mlp.down.weight"), ({"tied_embeddings": True}, "lm_head"),
        ({"norm": "rms_norm"}, "final_norm.bias"), ({"rotary_dim": 2}, "inv_freq"),
    ):  # fmt: skip
        with pytest.raises(RunnerError, match="is not what the model has") as caught:
            StepTensors(path, dataclasses.replace(SMALL, **changes), "float16")  # type: ignore[arg-type]
        assert word in caught.value.what
    tensors = StepTensors(path, SMALL, "bfloat16")
    with pytest.raises(RunnerError, match="another type"):
        tensors.layer(0)


def test_a_graph_with_other_formats_is_refused(tmp_path: Path) -> None:
    model = random_model(SMALL, 1, torch.float16)
    path = write_graph(tmp_path, SMALL, model, "float16", "int4")
    assert (
        len(StepTensors(path, SMALL, "float16", formats_of(SMALL, "int4")).parts())
        == 1 + 7 * SMALL.num_layers
    )
    for other, word in ((formats_of(SMALL, "int8"), "layers.0.attention"), (None, "embed_tokens.weight")):
        with pytest.raises(RunnerError, match="is not what the model has") as caught:
            StepTensors(path, SMALL, "float16", other)
        assert word in caught.value.what
    spec = dataclasses.replace(SMALL, intermediate_size=160)
    with pytest.raises(RunnerError, match=r"mlp\.down\.weight"):
        StepTensors(path, spec, "float16", formats_of(spec, "int4"))


def test_a_real_quantised_bundle_is_read(exported: Export) -> None:
    folder, _ = exported(dtype="float16", weight_format="int4")
    bundle = open_bundle(folder)
    assert bundle.quantised is not None
    tensors = StepTensors(bundle.graph_path("step_trt"), bundle.spec, "float16", bundle.quantised)
    stored = {part.stored.name for part in tensors.parts()} | {"embed_tokens.weight"}
    assert stored == {matrix.name for matrices in bundle.quantised.values() for matrix in matrices}
    for part in tensors.parts():
        values, scales = tensors.part(part)
        assert values.flags["C_CONTIGUOUS"] and len(values) == len(scales) == part.rows
    assert "head" not in tensors.ends() and "qkv" not in tensors.layer(0)


def test_a_real_bundle_is_read(exported: Export) -> None:
    folder, _ = exported(dtype="float16")
    bundle = open_bundle(folder)
    tensors = StepTensors(bundle.graph_path("step_trt"), bundle.spec, "float16")
    for layer in range(bundle.spec.num_layers):
        assert all(array.flags["C_CONTIGUOUS"] for array in tensors.layer(layer).values())
    assert tensors.ends()["head"].shape == (bundle.spec.vocab_size, bundle.spec.hidden_size)


def test_what_the_kernel_does_not_have(emulated: OnAStream, cuda: Cuda, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="rows is out of range"):
        make(tmp_path, SMALL, "float16", 9, emulated, cuda)


@pytest.mark.parametrize(
    ("spec", "dtype", "changes", "word"),
    [
        (SMALL, "float16", {}, None),
        (LLAMA, "bfloat16", {"max_batch": 8}, None),
        (SMALL, "float32", {}, "weights in float32"),
        (OPT_350M, "float16", {}, "no step in one launch for this model"),
        (SMALL, "float16", {"max_batch": 9}, "up to 9 sequences; expected at most 8"),
        (SMALL, "float16", {"quantised": formats_of(SMALL, "int4")}, None),
        (SMALL, "float32", {"quantised": formats_of(SMALL, "int8")}, "activations in float32"),
        (SMALL, "float16", {"ahead_of_time": True}, "multiprocessors"),
    ],
)
def test_what_is_known_before_it_is_built(
    spec: ModelSpec, dtype: str, changes: dict[str, Any], word: str | None
) -> None:
    bundle: Any = SimpleNamespace(spec=spec, dtype=dtype, quantised=changes.get("quantised"))
    recipe = Recipe("r", layout="two", max_batch=changes.get("max_batch", 1))
    found = no_one_launch(bundle, recipe, ahead_of_time=changes.get("ahead_of_time", False))
    assert found is None if word is None else word in str(found)


# -- build-engine --------------------------------------------------------------------------------------


def test_one_launch_needs_a_plan_of_its_own() -> None:
    with pytest.raises(UsageError, match="a plan of its own"):
        Recipe("r", step="one-launch")
    assert Recipe("r", step="auto").step == "auto" and Recipe("r").step == "products"
    with pytest.raises(UsageError, match="unknown step"):
        Recipe("r", step="both")


def test_auto_says_why_it_fell_back(exported: Export, tmp_path: Path) -> None:
    """The fake machine's library is none of the kernels: as where a plugin is too old for a step."""
    half, whole = exported(dtype="float16")[0], exported()[0]
    recipe = {"layout": "two", "step": "auto"}
    build(FakeMachine(tmp_path / "a"), half, tmp_path / "a.engine", recipe=recipe, validate=False)
    prefill, step = open_engine(tmp_path / "a.engine").manifest["made_with"]["plans"]
    assert prefill["plugin_step"] is None and step["plugin_products"] is not None
    assert step["plugin_step"]["launches"] == 0 and "is not a library" in step["plugin_step"]["left"]
    build(FakeMachine(tmp_path / "b"), whole, tmp_path / "b.engine", recipe=recipe, validate=False)
    _, step = open_engine(tmp_path / "b.engine").manifest["made_with"]["plans"]
    assert "weights in float32" in step["plugin_step"]["left"]


def test_quantised_weights_are_asked_for_too(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder's process is told the formats of all matrices."""
    asked: list[Any] = []
    run = build_module.run_worker
    monkeypatch.setattr(build_module, "run_worker", lambda it, *rest: asked.append(it) or run(it, *rest))
    folder = exported(dtype="float16", weight_format="int4")[0]
    build(
        FakeMachine(tmp_path / "a"),
        folder,
        tmp_path / "e",
        recipe={"layout": "two", "step": "auto"},
        validate=False,
    )
    prefill, step = asked
    bundle = open_bundle(folder)
    assert bundle.quantised is not None
    assert prefill.matrices is None and step.step == "auto" and step.quantised == dict(bundle.quantised)
    _, made = open_engine(tmp_path / "e").manifest["made_with"]["plans"]
    assert "is not a library" in made["plugin_step"]["left"]


def test_auto_is_for_gpus_that_copy_in_bulk(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = exported(dtype="float16")[0]
    monkeypatch.setattr("dijiang_engines.building.build.FAST_STEP", 1000)
    build(
        FakeMachine(tmp_path / "a"),
        half,
        tmp_path / "e",
        recipe={"layout": "two", "step": "auto"},
        validate=False,
    )
    _, step = open_engine(tmp_path / "e").manifest["made_with"]["plans"]
    assert step["plugin_step"] == {
        "launches": 0, "left": "before compute capability 9.0 products are expected to be faster",
    }  # fmt: skip


def test_one_launch_insists(exported: Export, tmp_path: Path) -> None:
    half, whole = exported(dtype="float16")[0], exported()[0]
    recipe = {"layout": "two", "step": "one-launch"}
    with pytest.raises(RunnerError, match="is not a library of these kernels"):
        build(FakeMachine(tmp_path / "a"), half, tmp_path / "a.engine", recipe=recipe, validate=False)
    with pytest.raises(UsageError, match="not possible"):
        build(FakeMachine(tmp_path / "b"), whole, tmp_path / "b.engine", recipe=recipe, validate=False)
    assert not (tmp_path / "a.engine").exists() and not (tmp_path / "b.engine").exists()


def test_which_recipes_want_one_launch(exported: Export, tmp_path: Path) -> None:
    """The data centre's, whose GPUs it was tried on."""
    found = {name: load_recipe(name).step for name in recipe_names()}
    assert {name for name, step in found.items() if step == "auto"} == {"datacenter"}
    assert set(found.values()) == {"auto", "products"} and Recipe("r").step == "products"
    half = exported(dtype="float16")[0]
    build(FakeMachine(tmp_path / "m"), half, tmp_path / "e", recipe={"layout": "two"}, validate=False)
    plans = open_engine(tmp_path / "e").manifest["made_with"]["plans"]
    assert plans[0]["plugin_step"] is None and "left" in plans[1]["plugin_step"]
    products = {"layout": "two", "step": "products"}
    build(FakeMachine(tmp_path / "n"), half, tmp_path / "f", recipe=products, validate=False)
    plans = open_engine(tmp_path / "f").manifest["made_with"]["plans"]
    assert [plan["plugin_step"] for plan in plans] == [None, None]
