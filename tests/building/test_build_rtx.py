"""build-engine with TensorRT for RTX on a fake machine: what the builder is asked for, and what goes wrong.

tests/building/test_rtx_builds.py builds with the real one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.fakes.tensorrt_rtx import FakeRtx
from support.makers.checkpoints import llama, neox
from support.makers.engine_folders import build, visible
from support.makers.plugin_cache import make_build

from dijiang_engines.building.memory import MemoryEstimate, check_memory, estimate_memory
from dijiang_engines.building.recipes import Recipe
from dijiang_engines.building.target import choose_runtime, choose_target
from dijiang_engines.errors import PluginError, RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import MadeFor, open_engine
from dijiang_engines.nvidia import tensorrt_library
from dijiang_engines.nvidia.tensorrt_library import installed_runtimes, tensorrt_module, tensorrt_version
from dijiang_engines.nvidia.tensorrt_versions import (
    TENSORRT_RTX,
    dialect_of,
    library_version,
    parse_capability,
)
from dijiang_engines.plugin.cache import cache_folder
from dijiang_engines.validation.report.facts import _types
from dijiang_export.cli import main

Export = Callable[..., tuple[Path, Any]]
RTX: dict[str, Any] = {"runtime": TENSORRT_RTX, "validate": False}
NONE_HERE: dict[str, Any] = {"gpus": 0}


@pytest.fixture
def bundle(exported: Export) -> Path:
    return exported()[0]


@pytest.mark.parametrize(
    ("dtype", "plugin", "graph"),
    [
        ("float16", True, "prefill.trt.onnx"),
        ("float16", False, "prefill.onnx"),
        ("float32", True, "prefill.onnx"),
    ],
)
def test_quantised_weights(exported: Export, tmp_path: Path, dtype: str, plugin: bool, graph: str) -> None:
    """Graphs of their own, which are gone afterwards; with float32 activations the plugin has no products."""
    sizes = {"hidden": 64, "heads": 4, "intermediate": 96, "vocab": 97}
    tied = llama(kv_heads=2, **sizes).with_config(tie_word_embeddings=True)  # test_signed_blocks has both too
    bundle = exported(
        tied if dtype == "float32" else neox(**sizes), dtype=dtype, weight_format="int4", cases="none"
    )[0]
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE)
    said: list[str] = []
    made = build(
        machine, bundle, tmp_path / "e", use_plugin=None if plugin else False, log=said.append, **RTX
    )
    (call,) = machine.calls
    assert Path(call["onnx"]).name == graph and Path(call["onnx"]).parent != bundle
    assert not Path(call["onnx"]).parent.exists() and visible(tmp_path) == ["e"]
    files = sorted(path.name for path in (tmp_path / "e").iterdir())
    assert [name for name in files if not name.endswith(".json")] == ["model.plan"]
    assert "genai_config.json" not in files, "it is about graphs that are not there"
    assert made.engine.made_for.graphs == ("plugin" if "trt" in graph else "standard")
    engine, source = open_engine(tmp_path / "e"), open_bundle(bundle)
    assert (engine.weight_format, engine.quantised) == ("int4", source.quantised)
    assert source.activations is not None and engine.activations is None, "no engine rounds activations"
    assert "matrices int4" in _types(engine) and f"activations of products {dtype};" in _types(engine)
    standard = "int4 weights with float32 activations: standard graphs"
    assert (standard in said) == (dtype == "float32")


# The table


@pytest.mark.parametrize("version", ["1.7.1", "1.7", "1.12.0.3"])
def test_supported_versions(version: str) -> None:
    dialect = dialect_of(version, TENSORRT_RTX)
    assert dialect.strongly_typed and dialect.ahead_of_time and dialect.plugin_major(version) == 11
    assert dialect.capabilities == (80, 86, 89, 120, 121)


@pytest.mark.parametrize("version", ["1.6.0", "2.0", "10.3.0", "11.1", "8.6.0", ""])
def test_other_versions(version: str) -> None:
    with pytest.raises(RunnerError, match="this version of TensorRT for RTX is not supported") as info:
        dialect_of(version, TENSORRT_RTX)
    assert "1.7" in str(info.value.expected) and "[rtx]" in str(info.value.hint)


def test_the_library_s_number_is_not_tensorrt_10_s() -> None:
    assert library_version(10701) == "1.7.1"


@pytest.mark.parametrize(
    ("text", "words"),
    [("9.0", "does not build for"), ("7.5", "does not build for"), ("8.7", "does not build for"),
     ("99.9", "does not build for"), ("86", "is not one"), ("sm_86", "is not one"), ("", "is not one"),
     ("8.6.1", "is not one"), ("٨.٦", "is not one")],
)  # fmt: skip
def test_a_capability_that_is_none(text: str, words: str) -> None:
    dialect = dialect_of("1.7.1", TENSORRT_RTX)
    with pytest.raises(UsageError, match=words) as info:
        parse_capability(text, dialect)
    assert info.value.expected == "8.0, 8.6, 8.9, 12.0, 12.1"
    assert ("--runtime tensorrt" in str(info.value.hint)) == (text in ("9.0", "8.7"))


# What the builder is asked for


def test_one_plan_for_several_gpus_without_one(bundle: Path, tmp_path: Path) -> None:
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE)
    made = build(
        machine, bundle, tmp_path / "e", capabilities=("8.9", "8.6", "8.9"), runtime=TENSORRT_RTX,
        recipe={"optimization_level": 2},
    )  # fmt: skip
    (call,) = machine.calls
    assert call["capabilities"] == [86, 89] and call["flags"] == [] and call["level"] == 2
    assert call["onnx"].endswith("prefill.trt.onnx") and len(call["profiles"]) == 2
    assert call["links"] == {"libtensorrt_rtx.so": "libtensorrt_rtx.so.1"}, "what the parser opens"
    assert made.report is None and made.engine.manifest["validated"] is None
    built = made.engine.made_for
    assert (built.runtime, built.tensorrt, built.gpu, built.graphs) == (
        "tensorrt-rtx",
        "1.7.1",
        None,
        "plugin",
    )
    assert built.compute_capabilities == (86, 89)
    with_facts = made.engine.manifest["made_with"]
    assert with_facts["cuda_driver"] is None and with_facts["plugin_tensorrt_headers"] == "11.1.0"
    assert visible(tmp_path) == ["e"]


def test_standard_graphs(bundle: Path, tmp_path: Path) -> None:
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE)
    recipe = {"layout": "two", "max_batch": 1}
    made = build(machine, bundle, tmp_path / "e", use_plugin=False, recipe=recipe, **RTX)
    assert [Path(call["onnx"]).name for call in machine.calls] == ["prefill.onnx", "step.onnx"]
    assert [call["capabilities"] for call in machine.calls] == [[80, 86, 89, 120, 121]] * 2
    assert machine.calls[0]["inputs"]["input_ids"] == [1, -1]
    built = open_engine(tmp_path / "e").made_for
    assert built == MadeFor("tensorrt-rtx", "1.7.1", None, (80, 86, 89, 120, 121), None, None)
    assert made.engine.manifest["made_for"]["plugin_sources"] is None


def test_without_a_plugin_the_standard_graphs_are_taken(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE).enter(monkeypatch)
    monkeypatch.delenv("DIJIANG_PLUGIN")
    make_build(cache_folder(), "jetson", machine="another", tensorrt="11.1.0")  # which is none here
    said: list[str] = []
    target = choose_target(open_bundle(bundle), Recipe("r"), runtime=TENSORRT_RTX, log=said.append)
    assert target.plugin is None and "standard graphs" in said[0]
    monkeypatch.setenv("DIJIANG_PLUGIN", str(machine.plugin))
    machine.build_plugin(version="0.0.1")  # one that is there, and stale, is not passed over
    with pytest.raises(PluginError, match="does not fit this program"):
        choose_target(open_bundle(bundle), Recipe("r"), runtime=TENSORRT_RTX)


def test_the_recipe_s_gpus_that_the_plugin_holds(bundle: Path, tmp_path: Path) -> None:
    """Machine code for 8.6 and 8.9, and PTX that newer GPUs compile: not 8.0."""
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE)
    said: list[str] = []
    build(machine, bundle, tmp_path / "e", log=said.append, **RTX)
    assert machine.calls[0]["capabilities"] == [86, 89, 120, 121]
    assert any("code for compute capability 8.6, 8.9, 12.0, 12.1" in line for line in said)


def test_products_of_prompts_are_not_the_plugin_s(bundle: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = {"prefill_products": "plugin"}
    build(FakeRtx(tmp_path / "m", **NONE_HERE), bundle, tmp_path / "e", recipe=recipe, log=said.append, **RTX)
    assert any("the plugin has no products for TensorRT for RTX" in line for line in said)


@pytest.mark.parametrize(
    ("architectures", "capabilities", "words"),
    [(["sm_89"], ("8.6", "8.9"), "sm_86, sm_89"), (["sm_90", "compute_90"], ("8.9",), "sm_89"),
     (["sm_87"], (), "none of the recipe's GPUs")],
)  # fmt: skip
def test_a_plugin_without_the_architecture(
    bundle: Path, tmp_path: Path, architectures: list[str], capabilities: tuple[str, ...], words: str
) -> None:
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE)
    machine.build_plugin(architectures=architectures)
    with pytest.raises(PluginError) as info:
        build(machine, bundle, tmp_path / "e", capabilities=capabilities, **RTX)
    assert words in str(info.value) and "--no-plugin" in str(info.value.hint)
    assert machine.calls == [] and visible(tmp_path) == []


def test_a_gpu_that_is_here_validates(bundle: Path, tmp_path: Path) -> None:
    machines = {"here": {}, "another": {"capability": [9, 0]}, "old": {"driver": 12080}}
    for name, settings in machines.items():
        machine = FakeRtx(tmp_path / name, **settings)
        options = {"runtime": TENSORRT_RTX, "capabilities": ("8.9",), "use_plugin": False}
        made = build(
            machine, bundle, tmp_path / f"{name}.engine", recipe={"max_batch": 6, "max_length": 64}, **options
        )
        assert (made.report is not None) == (name == "here")
        assert bool(made.engine.manifest["validated"]) == (name == "here")


def test_the_estimate_is_the_host_s_alone(bundle: Path) -> None:
    """Of a builder that needs no GPU, and makes no float32 copies of 16-bit weights."""
    opened = open_bundle(bundle)
    usual, ahead = (estimate_memory(opened, Recipe("r"), ahead_of_time=a) for a in (False, True))
    assert ahead.host < usual.host and ahead.host >= 1 << 30
    check_memory(MemoryEstimate(1 << 60, 1), None)
    with pytest.raises(RunnerError, match="the host has too little free memory"):
        check_memory(MemoryEstimate(0, 1 << 60), None)


# What does not go together


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": "tensorrt", "capabilities": ("8.6",)}, "--compute-capability goes with --runtime"),
        ({"runtime": "tensorrt", "use_plugin": False}, "--no-plugin goes with --runtime"),
        ({"runtime": "lean"}, "there is no runtime 'lean'"),
        ({"runtime": TENSORRT_RTX, "capabilities": ("9.0",)}, "does not build for this compute capability"),
        ({"runtime": TENSORRT_RTX, "timing_cache": Path("x")}, "measures nothing"),
    ],
)
def test_options_that_do_not_fit(bundle: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE)
    with pytest.raises(UsageError, match=words):
        build(machine, bundle, tmp_path / "e", **options)
    assert machine.calls == [] and visible(tmp_path) == []


def test_a_recipe_for_boards(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRtx(tmp_path / "machine").enter(monkeypatch)
    recipe = Recipe("jetson-orin", architectures=(87,))
    with pytest.raises(UsageError, match="the recipe jetson-orin is for other GPUs than TensorRT for RTX"):
        choose_target(open_bundle(bundle), recipe, runtime=TENSORRT_RTX)


# What is not right on the machine


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt_rtx_bindings", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RunnerError, match="tensorrt_rtx_bindings is not installed") as info:
        tensorrt_module(TENSORRT_RTX)
    assert info.value.hint == "pip install 'dijiang-export[rtx]'"


def test_what_is_installed_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRtx(tmp_path / "machine").enter(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert installed_runtimes() == ["tensorrt-rtx"] and choose_runtime(None) == "tensorrt-rtx"
    assert tensorrt_version(tensorrt_module(TENSORRT_RTX), TENSORRT_RTX) == "1.7.1"


def test_of_both_tensorrt_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRtx(tmp_path / "machine").enter(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    assert installed_runtimes() == ["tensorrt", "tensorrt-rtx"]
    assert choose_runtime(None) == "tensorrt" and choose_runtime("tensorrt-rtx") == "tensorrt-rtx"


def test_wheels_of_different_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRtx(tmp_path / "machine").enter(monkeypatch)
    versions = {"tensorrt-rtx-cu13-bindings": "1.7.1.116", "tensorrt-rtx-cu13-libs": "1.8.0.33"}
    monkeypatch.setattr(tensorrt_library, "package_versions", lambda names: {n: versions[n] for n in names})
    with pytest.raises(RunnerError, match="the wheels of TensorRT for RTX are of different versions") as info:
        tensorrt_module(TENSORRT_RTX)
    for text in versions.values():
        assert text in str(info.value.got)
    assert str(info.value.hint).count("==1.8.0.33") == 2


def test_a_node_that_the_parser_does_not_take(bundle: Path, tmp_path: Path) -> None:
    machine = FakeRtx(tmp_path / "machine", builder="node:/layers.1/attention/k_t Reshape", **NONE_HERE)
    with pytest.raises(RunnerError, match=r"stops at the node /layers\.1/attention/k_t \(Reshape\)") as info:
        build(machine, bundle, tmp_path / "e", **RTX)
    assert (
        "it does not fit" in str(info.value.got) and "TensorRT for RTX 1.7.1 cannot parse" in info.value.what
    )
    assert visible(tmp_path) == []


def test_a_parser_that_dies(bundle: Path, tmp_path: Path) -> None:
    """One sentence that names the node, not the runtime's last words alone."""
    node = "/layers.0/attention/DijiangAttention [DijiangAttention]"
    machine = FakeRtx(tmp_path / "machine", builder=f"dies:{node}", **NONE_HERE)
    with pytest.raises(RunnerError, match="the builder's process died while it parsed") as info:
        build(machine, bundle, tmp_path / "e", **RTX)
    assert info.value.what.endswith(f"prefill.trt.onnx, at the node {node}")
    assert str(info.value.got).startswith("signal 6") and "terminate called" in str(info.value.got)
    assert visible(tmp_path) == []


def test_a_builder_that_fails(bundle: Path, tmp_path: Path) -> None:
    machine = FakeRtx(tmp_path / "machine", builder="fails:no kernel for this layer", **NONE_HERE)
    with pytest.raises(RunnerError, match=r"TensorRT for RTX 1\.7\.1 could not build the engine") as info:
        build(machine, bundle, tmp_path / "e", **RTX)
    assert "no kernel for this layer" in str(info.value.got)


# The command


def test_the_command(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    machine = FakeRtx(tmp_path / "machine", **NONE_HERE).enter(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    folder = tmp_path / "e"
    arguments = ["build-engine", str(bundle), "-o", str(folder), "--max-length", "64"]
    assert (
        main([*arguments, "--compute-capability", "12.0", "--compute-capability", "8.6", "--no-plugin"]) == 0
    )
    out, err = capfd.readouterr()
    assert "for compute capability 8.6, 12.0 and TensorRT for RTX 1.7.1, without the plugin" in out
    assert "built, not validated: run `validate` on the device" in out
    assert f"dijiang-export validate {folder}" in out and "on the GPU" not in err
    assert open_engine(folder).manifest["made_with"]["recipe"]["name"] == "rtx", "the default for RTX"
    assert (
        main(["--json", *arguments, "--force", "--recipe", "rtx-portable", "--runtime", "tensorrt-rtx"]) == 0
    )
    made_for = json.loads(capfd.readouterr().out)["manifest"]["made_for"]
    assert (made_for["graphs"], made_for["compute_capabilities"]) == ("plugin", [86, 89, 120, 121])
    assert machine.calls[-1]["capabilities"] == [86, 89, 120, 121]
    assert main([*arguments, "--force", "--compute-capability", "9.0"]) == 2
    assert "8.0, 8.6, 8.9, 12.0, 12.1" in capfd.readouterr().err
