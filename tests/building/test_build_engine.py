"""build-engine on a fake machine: what the builder is asked for, and everything that keeps it from working.

The builder's process is a real one; only TensorRT, Polygraphy and CUDA in it are fakes (support/fakes).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes.tensorrt import FakeMachine
from support.makers.engine_folders import build, visible
from support.makers.toy_bundle import make_bundle

from dijiang_engines.building.build import build_engine
from dijiang_engines.building.plans import plugin_multiplies, profile_shapes
from dijiang_engines.building.recipes import load_recipe
from dijiang_engines.errors import (
    BundleError,
    RunnerError,
    UsageError,
)  # fmt: skip
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import Profiles, open_engine
from dijiang_engines.runners.tensorrt import cublaslt
from dijiang_export.cli import main

VERSIONS = ["8.6.0", "10.3.0", "10.13.3", "11.1.0"]
STATE = "past_key_values.{}.recurrent_state"
Export = Callable[..., tuple[Path, Any]]


@pytest.fixture
def bundle(exported: Export) -> Path:
    return exported()[0]


@pytest.fixture
def half(exported: Export) -> Path:
    return exported(dtype="float16")[0]


# What the builder is asked for


@pytest.mark.parametrize("version", VERSIONS)
def test_flags_of_a_float32_engine(bundle: Path, tmp_path: Path, version: str) -> None:
    """TF32 is on by default in every version: a float32 engine must say that it does not want it."""
    machine = FakeMachine(tmp_path / "machine", tensorrt=version)
    build(
        machine, bundle, tmp_path / "e", validate=False, recipe={"workspace_mb": 7, "optimization_level": 4}
    )
    (call,) = machine.calls
    old = version == "8.6.0"
    assert call["flags"] == [] and call["strongly_typed"] is not old
    assert call["tactics"] == (["CUBLAS", "CUBLAS_LT"] if old else None)
    assert call["preview"] == (["FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806"] if old else [])
    assert call["pools"] == {"WORKSPACE": 7 << 20} and call["level"] == 4
    assert call["monitor"] is not old
    assert {precision for _, precision, _ in call["layers"].values()} == {None}
    assert call["onnx"].endswith("prefill.trt.onnx")


@pytest.mark.parametrize("version", VERSIONS)
def test_flags_of_a_float16_engine(half: Path, tmp_path: Path, version: str) -> None:
    """Types are the graph's in 10 and 11; 8.6 needs a flag and constraints to come close."""
    machine = FakeMachine(tmp_path / "machine", tensorrt=version)
    made = build(machine, half, tmp_path / "e", validate=False)
    (call,) = machine.calls
    if version != "8.6.0":
        assert call["flags"] == [] and call["strongly_typed"]
        assert {precision for _, precision, _ in call["layers"].values()} == {None}
        return
    assert call["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"] and not call["strongly_typed"]
    kinds: dict[str, set[str | None]] = {}
    for kind, precision, _ in call["layers"].values():
        kinds.setdefault(kind.removeprefix("LayerType."), set()).add(precision)
    assert kinds["MATRIX_MULTIPLY"] == {"HALF"}
    assert kinds["PLUGIN_V2"] == kinds["CONSTANT"] == {None}
    assert [types for _, _, types in call["layers"].values() if types.get("0") == "FLOAT"], "the logits"
    assert made.engine.manifest["made_with"]["plans"][0]["constraints"] == "obey"


def test_layers_that_cannot_obey_are_preferred_instead(half: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine", builder="obey")
    made = build(machine, half, tmp_path / "e", validate=False)
    assert [call["flags"] for call in machine.calls] == [["FP16", "PREFER_PRECISION_CONSTRAINTS"]]
    assert made.engine.manifest["made_with"]["plans"][0]["constraints"] == "prefer"


@pytest.mark.parametrize("broken", [1, 2])
def test_a_plan_without_a_context_is_built_otherwise(half: Path, tmp_path: Path, broken: int) -> None:
    """8.6 makes float16 plans that it cannot run; which layers are held to float16 changes how it fuses."""
    machine = FakeMachine(tmp_path / "machine", builder=f"broken:{broken}")
    made = build(machine, half, tmp_path / "e", validate=False)
    held = [
        {precision for kind, precision, _ in call["layers"].values() if kind.endswith("ELEMENTWISE")}
        for call in machine.calls
    ]
    assert held == [{None}, {"HALF"}, {"HALF"}][: broken + 1]
    (plan,) = made.engine.manifest["made_with"]["plans"]
    assert (plan["held"], plan["constraints"]) == ("arithmetic", ("obey", "prefer")[broken - 1])


@pytest.mark.parametrize(("layout", "held"), [("one", "embeddings"), ("two", "products")])
def test_embeddings_are_held_where_norms_are_the_plugin_s(
    half: Path, tmp_path: Path, layout: str, held: str
) -> None:
    recipe = {"layout": layout, "prefill_products": "plugin", "step": "products"}
    for broken, expected in ((0, held), (1, "products" if layout == "one" else "arithmetic")):
        machine = FakeMachine(tmp_path / f"{broken}", builder=f"broken:{broken}")
        build(machine, half, tmp_path / f"{broken}.engine", recipe=recipe, validate=False)
        plans = open_engine(tmp_path / f"{broken}.engine").manifest["made_with"]["plans"]
        assert (plans[0]["held"], plans[0]["constraints"]) == (expected, "obey")


def test_no_plan_has_a_context(half: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine", builder="broken:9")
    with pytest.raises(RunnerError, match="a plan that it cannot run") as caught:
        build(machine, half, tmp_path / "e", validate=False)
    assert "--layout two" in str(caught.value.hint) and len(machine.calls) == 3
    assert not (tmp_path / "e").exists()


def test_profiles_of_one_plan(bundle: Path, tmp_path: Path) -> None:
    """Profile 0 reads prompts, profile 1 makes steps; sizes that are the same in both become static."""
    machine = FakeMachine(tmp_path / "machine")
    recipe = {"max_batch": 4, "opt_batch": 2, "max_length": 64, "opt_length": 16}
    made = build(machine, bundle, tmp_path / "e", recipe=recipe, validate=False)
    (call,) = machine.calls
    context, generation = call["profiles"]
    assert context["input_ids"] == [[1, 1], [2, 16], [4, 64]]
    assert generation["input_ids"] == [[1, 1], [2, 1], [4, 1]]
    for profile in (context, generation):
        assert profile["positions"] == profile["seq_lens"] == [[1], [2], [4]]
        assert profile[STATE.format(1)] == [[b, 4, 16, 16] for b in (1, 2, 4)]
    assert call["inputs"] == {
        "input_ids": [-1, -1], "positions": [-1], "seq_lens": [-1],
        STATE.format(0): [-1, 4, 16, 16], STATE.format(1): [-1, 4, 16, 16],
    }  # fmt: skip
    assert made.engine.profiles == Profiles(4, 64, 2, 16)


def test_profiles_of_two_plans(bundle: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine")
    build(machine, bundle, tmp_path / "e", recipe={"layout": "two", "max_batch": 1}, validate=False)
    prefill, step = machine.calls
    assert [Path(call["onnx"]).name for call in machine.calls] == ["prefill.trt.onnx", "step.trt.onnx"]
    assert [len(call["profiles"]) for call in machine.calls] == [1, 1]
    assert prefill["inputs"]["input_ids"] == [1, -1] and step["inputs"]["input_ids"] == [1, 1]
    assert step["inputs"]["positions"] == [1] and step["inputs"][STATE.format(0)] == [1, 4, 16, 16]
    assert prefill["loaded_cache"] is None and step["loaded_cache"] is not None
    assert sorted(path.name for path in (tmp_path / "e").glob("*.plan")) == ["prefill.plan", "step.plan"]


@pytest.mark.parametrize(
    ("dtype", "batch", "who", "sizes", "expected"),
    [
        ("float16", 1, "plugin", (1024, 4096, True), True),
        ("float16", 8, "plugin", (1024, 4096, True), True),
        ("float16", 9, "plugin", (1024, 4096, True), False),
        ("float16", 1, "tensorrt", (1024, 4096, True), False),
        ("float32", 1, "plugin", (1024, 4096, True), False),
        ("bfloat16", 1, "plugin", (1024, 4096, True), False),
        ("float16", 3, "plugin", (2560, 10240, True), True),
        (
            "float16",
            4,
            "plugin",
            (2560, 10240, True),
            False,
        ),  # dense and down read 4 x 12800 x 2 bytes together
        ("float16", 4, "plugin", (2560, 10240, False), True),
    ],
)
def test_who_multiplies(
    dtype: str, batch: int, who: str, sizes: tuple[int, int, bool], expected: bool
) -> None:
    hidden, inner, parallel = sizes
    spec = SimpleNamespace(hidden_size=hidden, intermediate_size=inner, parallel_residual=parallel)
    recipe = load_recipe("datacenter").with_changes(max_batch=batch, step_products=who)
    made: Any = SimpleNamespace(dtype=dtype, spec=spec)
    assert plugin_multiplies(made, recipe, step=True) is expected


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("who", ["plugin", "auto", "tensorrt"])
def test_who_multiplies_where_prompts_are_read(dtype: str, who: str) -> None:
    """Any number of rows, of any width."""
    spec = SimpleNamespace(hidden_size=8192, intermediate_size=32768, parallel_residual=True)
    recipe = load_recipe("datacenter").with_changes(max_batch=64, prefill_products=who)
    made: Any = SimpleNamespace(dtype=dtype, spec=spec)
    assert plugin_multiplies(made, recipe, step=False) is (dtype == "float16" and who != "tensorrt")


def test_an_engine_says_who_multiplies(half: Path, tmp_path: Path) -> None:
    for who in ("plugin", "tensorrt"):
        machine = FakeMachine(tmp_path / who)
        recipe = {"layout": "two", "step_products": who}
        build(machine, half, tmp_path / f"{who}.engine", recipe=recipe, validate=False)
        plans = open_engine(tmp_path / f"{who}.engine").manifest["made_with"]["plans"]
        assert plans[0]["plugin_products"] is None  # prefill
        found = plans[1]["plugin_products"]
        # The fake network shows no weights, so that every product is left.
        assert found is None if who == "tensorrt" else found["launches"] == 0 < found["left"]


@pytest.mark.parametrize("layout", ["one", "two"])
def test_products_of_prompts_may_be_the_plugin_s(half: Path, tmp_path: Path, layout: str) -> None:
    recipe = {"layout": layout, "prefill_products": "plugin", "step_products": "tensorrt"}
    build(FakeMachine(tmp_path / "m"), half, tmp_path / "e", recipe=recipe, validate=False)
    found = [plan["plugin_products"] for plan in open_engine(tmp_path / "e").manifest["made_with"]["plans"]]
    assert found[0]["launches"] == 0 < found[0]["left"]
    assert found[1:] == [None] * (layout == "two")


@pytest.mark.parametrize("layout", ["one", "two"])
@pytest.mark.parametrize("why", [None, "there is no cuBLASLt; got nothing"])
def test_the_recipe_for_data_centres_asks_for_cublaslt(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, why: str | None
) -> None:
    """`auto`: the plugin's products where they are fast."""
    asked: list[str] = []
    monkeypatch.setattr(cublaslt, "load_from_wheels", lambda: asked.append("load"))
    monkeypatch.setattr(cublaslt, "not_found", lambda library: asked.append(library.name) or why)
    said: list[str] = []
    recipe = {"layout": layout}
    build(FakeMachine(tmp_path / "m"), half, tmp_path / "e", recipe=recipe, validate=False, log=said.append)
    assert asked == ["load", "libdijiang_kernels.so"]
    found = open_engine(tmp_path / "e").manifest["made_with"]["plans"][0]["plugin_products"]
    assert found is None if why else found["launches"] == 0 < found["left"]
    file = "model.plan" if layout == "one" else "prefill.plan"
    words = [line for line in said if "TensorRT multiplies" in line]
    assert words == ([f"{file}: TensorRT multiplies, {why}"] if why else [])


def test_auto_is_silent_about_types_that_the_plugin_lacks(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublaslt, "not_found", None)  # nobody asks
    said: list[str] = []
    build(FakeMachine(tmp_path / "m"), bundle, tmp_path / "e", validate=False, log=said.append)
    assert not [line for line in said if "multiplies" in line]


def test_where_they_cannot_be_that_is_said(bundle: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = {"layout": "two", "prefill_products": "plugin"}
    build(FakeMachine(tmp_path / "m"), bundle, tmp_path / "e", recipe=recipe, validate=False, log=said.append)
    found = [plan["plugin_products"] for plan in open_engine(tmp_path / "e").manifest["made_with"]["plans"]]
    assert found == [None, None]
    words = [line for line in said if "TensorRT multiplies" in line]
    assert words == ["prefill.plan: TensorRT multiplies, the plugin has no products in float32"]


def test_every_graph_input_has_a_profile(bundle: Path) -> None:
    opened = open_bundle(bundle)
    shapes = profile_shapes(opened, Profiles(4, 64), step=False)
    assert set(shapes) == {tensor.name for tensor in opened.graphs["prefill_trt"].inputs}


# What is made


def test_an_engine_says_what_it_is(bundle: Path, tmp_path: Path) -> None:
    made = build(FakeMachine(tmp_path / "machine"), bundle, tmp_path / "e")
    source, opened = open_bundle(bundle), open_engine(tmp_path / "e")
    opened.verify()
    manifest = opened.manifest
    assert (opened.spec, opened.dtype, opened.identity) == (source.spec, "float32", source.identity)
    assert manifest["made_for"] | {"plugin_sources": "", "plugin_version": ""} == {
        "runtime": "tensorrt", "tensorrt": "8.6.0", "gpu": "NVIDIA Test", "compute_capability": 90,
        "compute_capabilities": [90], "graphs": "plugin", "plugin_sources": "", "plugin_version": "",
    }  # fmt: skip
    assert manifest["made_with"]["cuda_driver"] == "12.8" and manifest["made_with"]["tf32"] is False
    assert manifest["validated"]["passed"] and manifest["validated"]["checks"] > 100
    assert opened.cases == source.cases and list(opened.reference().cases) == source.cases
    assert made.report.passed
    copied = {name for name in source.files if name.endswith(".json") or name == "reference.safetensors"}
    assert set(opened.files) == copied - set(source.manifest["genai"]) | {"model.plan"}
    assert visible(tmp_path) == ["e"], "no lock, log or request is left"


def test_the_log_is_kept_in_the_cache(bundle: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine")
    build(machine, bundle, tmp_path / "e", validate=False)
    log = machine.folder / "cache/dijiang-export/build-engine.log"
    assert "DijiangAttention LayerType.PLUGIN_V2" in log.read_text()


def test_timings_are_kept_for_each_tensorrt_and_gpu(bundle: Path, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path / "machine", gpu="NVIDIA RTX 6000 Ada/Test")
    build(machine, bundle, tmp_path / "a", validate=False)
    build(machine, bundle, tmp_path / "b", validate=False)
    build(machine, bundle, tmp_path / "c", validate=False, use_timing_cache=False)
    build(machine, bundle, tmp_path / "d", validate=False, timing_cache=tmp_path / "own/timings")
    name = "timing/tensorrt-8.6.0-sm90-NVIDIA-RTX-6000-Ada-Test.cache"
    kept = machine.folder / "cache/dijiang-export" / name
    assert [call["loaded_cache"] for call in machine.calls] == [None, str(kept), None, None]
    assert (tmp_path / "own/timings").exists()


# Bundle and recipe


def test_a_bundle_of_another_precision(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another precision") as info:
        build(FakeMachine(tmp_path / "machine"), bundle, tmp_path / "e", precision="float16")
    assert (info.value.got, info.value.expected) == ("float32", "float16")
    assert "--dtype float16" in str(info.value.hint)


def test_a_recipe_for_another_precision(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "half.toml").write_text('precisions = ["float16"]')
    recipe = load_recipe(str(tmp_path / "half.toml"))
    with pytest.raises(UsageError, match="the recipe half is not meant for") as info:
        build_engine(open_bundle(bundle), tmp_path / "e", recipe)
    assert "--dtype float16" in str(info.value.hint)


def test_8_6_has_no_bfloat16(bundle: Path, tmp_path: Path) -> None:
    source = open_bundle(bundle)
    source.dtype = "bfloat16"  # no weight is looked at here
    with pytest.raises(RunnerError, match=r"TensorRT 8\.6\.0 has no bfloat16") as info:
        build(FakeMachine(tmp_path / "machine"), source, tmp_path / "e")
    assert "--dtype float16" in str(info.value.hint)
    machine = FakeMachine(tmp_path / "machine", tensorrt="10.3.0")
    build(machine, source, tmp_path / "e", validate=False)
    assert machine.calls[0]["strongly_typed"] and machine.calls[0]["flags"] == []


def test_a_recipe_for_another_board(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeMachine(tmp_path / "machine").enter(monkeypatch)
    with pytest.raises(UsageError, match="the recipe jetson-orin is for other GPUs") as info:
        build_engine(open_bundle(bundle), tmp_path / "e", load_recipe("jetson-orin"))
    assert (info.value.got, info.value.expected) == ("NVIDIA Test, sm_90", "sm_87")


def test_a_bundle_without_the_plugin_s_graphs(tmp_path: Path) -> None:
    make_bundle(tmp_path / "toy.bundle")
    with pytest.raises(BundleError, match="no graph 'prefill_trt'") as info:
        build(FakeMachine(tmp_path / "machine"), tmp_path / "toy.bundle", tmp_path / "e")
    assert "export the checkpoint again" in str(info.value.hint)
    assert visible(tmp_path) == ["toy.bundle"]


# The command


def test_the_command(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    machine = FakeMachine(tmp_path / "machine", capability=[8, 7], integrated=True).enter(monkeypatch)
    monkeypatch.setattr("dijiang_engines.building.memory.available_memory", lambda: 64 << 30)
    arguments = ["--recipe", "jetson-orin", "--max-length", "64", "--layout", "two", "--precision", "float16"]
    assert main(["build-engine", str(half), "-o", str(tmp_path / "e"), *arguments]) == 0
    out, err = capfd.readouterr()
    assert "validated: " in out and "generate" in out and "for NVIDIA Test and TensorRT 8.6.0" in out
    assert "up to 1 sequences, 64 prompt tokens a call" in out
    assert "building prefill.plan" in err
    assert machine.calls[0]["pools"] == {"WORKSPACE": 256 << 20}
    again = ["--force", "--no-validate", "--no-timing-cache", "--workspace", "5", "--optimization-level", "0"]
    assert main(["--json", "build-engine", str(half), "-o", str(tmp_path / "e"), *again]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["manifest"]["validated"] is None and result["manifest"]["layout"] == "one"
    call = machine.calls[-1]
    assert (call["pools"], call["level"], call["loaded_cache"]) == ({"WORKSPACE": 5 << 20}, 0, None)


def test_the_engine_is_named_after_the_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMachine(tmp_path / "machine").enter(monkeypatch)
    (tmp_path / "model.bundle").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    assert main(["-q", "build-engine", "model.bundle", "--no-validate"]) == 0
    assert open_engine("model.engine").identity == open_bundle(bundle).identity


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--timing-cache", "x", "--no-timing-cache"], 2, "exclude each other"),
        (["--max-length", "0"], 2, "--max-length"),
        (["--layout", "three"], 2, "--layout"),
        (["--optimization-level", "6"], 2, "--optimization-level"),
        (["--precision", "int8"], 2, "--precision"),
        (["--device", "-1"], 2, "--device"),
        ([], 1, "there is no bundle"),
    ],
)
def test_bad_usage(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["build-engine", str(tmp_path / "none.bundle"), *arguments]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and "Traceback" not in err


def test_a_timing_cache_that_cannot_be_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    FakeMachine(tmp_path / "machine").enter(monkeypatch)
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file/timings"
    assert (
        main(["-q", "build-engine", str(bundle), "-o", str(tmp_path / "e"), "--timing-cache", str(cache)])
        == 1
    )
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "internal error" not in err
    assert visible(tmp_path) == ["file"]
