"""The real builder of TensorRT for RTX makes plans of our graphs, without a GPU. None is run: nothing here
can.

`make bindings` fetches the wheels. `make rtx-test` builds every geometry in every type for several sets of
GPUs (DIJIANG_RTX_MATRIX), and with TRT_INCLUDE, the folder of TensorRT's open headers, also with the compiled
plugin. CI builds each geometry in one type.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.fakes.step_network import OnAStream, as_onnx, make
from support.fakes.tensorrt import FakeMachine
from support.makers import random_models as rm
from support.makers.checkpoints import neox
from support.makers.engine_folders import Exported
from support.paths import TESTS
from support.step_emulator import compile_emulated, missing
from support.step_specs import MODELS as STEP_MODELS
from support.tensorrt_wheels import FOLDER, REQUIRED, unpack, version_of, wheels, without

from dijiang_engines import io_names
from dijiang_engines.building.plans import plans
from dijiang_engines.building.recipes import Recipe
from dijiang_engines.building.request import BuildRequest
from dijiang_engines.building.run_worker import run_worker
from dijiang_engines.building.signed_blocks import write_signed
from dijiang_engines.errors import RunnerError
from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.formats.manifest import graph_io
from dijiang_engines.formats.onnx_external import external_tensors
from dijiang_engines.kernels.library import Device
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.nvidia.private_link import PATH_VARIABLE, parser_environment
from dijiang_engines.nvidia.tensorrt_versions import TENSORRT_RTX, dialect_of
from dijiang_engines.plugin.cache import find_tensorrt_library
from dijiang_engines.progress import silent
from dijiang_engines.spec import ModelSpec
from dijiang_engines.weight_formats import BLOCK
from dijiang_export.graph import lower

WHEELS = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
MISSING = without(*WHEELS)
pytestmark = pytest.mark.skipif(MISSING is not None and not REQUIRED, reason=MISSING or "")
MATRIX = bool(os.environ.get("DIJIANG_RTX_MATRIX"))
HEADERS = os.environ.get("DIJIANG_TENSORRT_INCLUDE", "")

GEOMETRIES = {
    "gpt-neox": rm.NEOX,
    "tables": rm.with_tables(rm.NEOX, 400),
    "d80": rm.with_heads(rm.NEOX, 2, 2, 80, 20),
    "llama-grouped": rm.LLAMA,
    "opt": dataclasses.replace(
        rm.OPT_350M, post_norm=False, final_norm=True, embedding_size=48, tied_embeddings=False
    ),
    "opt-350m": rm.OPT_350M,
}
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SOME = {
    "gpt-neox": ("float16", (89,)), "tables": ("float32", (86,)), "d80": ("bfloat16", (120,)),
    "llama-grouped": ("float16", (86, 120)), "opt": ("float32", (121,)), "opt-350m": ("bfloat16", (80,)),
}  # fmt: skip
"""Of each geometry what CI builds."""
CASES = [
    (name, dtype, capabilities)
    for name in GEOMETRIES
    for dtype in TYPES
    for capabilities in ((80,), (86, 89, 120), (121,))
]
BATCH, LENGTH = 4, 200
RTX_TYPES = {"int64": "INT64", "float32": "FLOAT"}


@pytest.fixture(scope="module")
def site() -> Path:
    assert MISSING is None, MISSING
    paths = [wheels(name)[-1] for name in WHEELS]
    return unpack(FOLDER / f"rtx-{version_of(paths[0])}", *paths)


def spec_of(name: str) -> ModelSpec:
    """One layer: what a builder makes of a second one is the same."""
    return dataclasses.replace(GEOMETRIES[name], num_layers=1)


def shapes(spec: ModelSpec, kind: str) -> dict[str, list[list[int]]]:
    lengths = (1, 1, 1) if kind == "step" else (1, 64, LENGTH)
    batches = (1, 1, BATCH)
    found = {io_names.INPUT_IDS: [[b, n] for b, n in zip(batches, lengths, strict=True)]}
    found |= {name: [[b] for b in batches] for name in (io_names.POSITIONS, io_names.SEQ_LENS)}
    states = {
        io_names.past_state(i): [[b, *spec.state_shape] for b in batches] for i in range(spec.num_layers)
    }
    return found | states


def request(
    folder: Path, name: str, dtype: str, kind: Literal["prefill", "step"], capabilities: tuple[int, ...],
    plugin: Path | None = None,
) -> BuildRequest:  # fmt: skip
    """A graph with small random weights inside, and what the worker is asked for."""
    spec = spec_of(name)
    graph = rm.traced(spec, TYPES[dtype], kind)
    if plugin is None:
        lower.lower_to_standard(graph, kind)
    else:
        lower.lower_to_tensorrt(graph)
    rm.give_weights(graph, spec, rm.random_model(spec, dtype=TYPES[dtype]))
    path = folder / f"{kind}{'.trt' if plugin else ''}.onnx"
    ir.save(graph, path)
    return BuildRequest(
        onnx=path, plan=folder / f"{kind}.plan", plugin=plugin, dtype=dtype, profiles=[shapes(spec, kind)],
        workspace=1 << 28, optimization_level=3, timing_cache=None, device=0, plugin_products=False,
        runtime=TENSORRT_RTX, capabilities=capabilities,
    )  # fmt: skip


def run(site: Path, folder: Path, requests: list[BuildRequest], *, link: bool = True) -> list[dict[str, Any]]:
    """What the probe says of each."""
    (folder / "requests.json").write_text(json.dumps([r.to_json() for r in requests]))
    links = folder / "links"
    links.mkdir(exist_ok=True)
    if link and not any(links.iterdir()):
        (links / "libtensorrt_rtx.so").symlink_to(site / "tensorrt_rtx_libs/libtensorrt_rtx.so.1")
    command = [sys.executable, TESTS / "support/probes/rtx_build.py", site, folder / "requests.json"]
    done = subprocess.run(
        [*command, folder / "out.json"], env=os.environ | {PATH_VARIABLE: str(links)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def check(made: BuildRequest, found: dict[str, Any], name: str, kind: str) -> None:
    """Names, types, shapes, profiles; a plan of this version, of a size that its weights explain."""
    assert "error" not in found, found["error"]
    spec = spec_of(name)
    inputs, outputs = graph_io(spec, step=kind == "step", all_logits=False)
    for part, tensors in (("inputs", inputs), ("outputs", outputs)):
        assert list(found[part]) == [tensor.name for tensor in tensors]
        for tensor in tensors:
            dtype, shape = found[part][tensor.name]
            assert dtype == RTX_TYPES[tensor.dtype], tensor.name
            known = [size for size in tensor.shape if isinstance(size, int)]
            assert [size for size in shape if size != -1] == known or kind == "step", tensor.name
    assert found["inputs"][io_names.INPUT_IDS][1] == ([-1, 1] if kind == "step" else [-1, -1])
    assert found["capabilities"] == list(made.capabilities)
    assert found["profiles"] == 1 and found["tf32"] is False
    assert found["plugins"] == (spec.num_layers if made.plugin else 0)
    plan = made.plan.read_bytes()
    assert plan[4 * 6 : 4 * 6 + 3] == bytes([1, 7, 1]) and plan.startswith(b"vtrt")
    for tensor in (*inputs, *outputs):
        assert tensor.name.encode() in plan
    weights = made.onnx.stat().st_size
    assert 0.5 * weights < len(plan) < 20 * weights + (8 << 20), (len(plan), weights)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.skipif(MATRIX, reason="the whole matrix is built")
def test_a_geometry(name: str, site: Path, tmp_path: Path) -> None:
    dtype, capabilities = SOME[name]
    kinds: tuple[Literal["step", "prefill"], ...] = ("step", "prefill")
    requests = [request(tmp_path, name, dtype, kind, capabilities) for kind in kinds]
    for kind, made, found in zip(kinds, requests, run(site, tmp_path, requests), strict=True):
        check(made, found, name, kind)


@pytest.mark.skipif(not MATRIX, reason="set DIJIANG_RTX_MATRIX: `make rtx-test`")
@pytest.mark.parametrize(("name", "dtype", "capabilities"), CASES)
def test_the_matrix(name: str, dtype: str, capabilities: tuple[int, ...], site: Path, tmp_path: Path) -> None:
    kinds: tuple[Literal["step", "prefill"], ...] = ("step", "prefill")
    requests = [request(tmp_path, name, dtype, kind, capabilities) for kind in kinds]
    for kind, made, found in zip(kinds, requests, run(site, tmp_path, requests), strict=True):
        check(made, found, name, kind)
        _report(name, dtype, capabilities, kind, made, found)


def _report(
    name: str, dtype: str, capabilities: tuple[int, ...], kind: str, made: BuildRequest, found: dict[str, Any]
) -> None:
    """A line for the record, if DIJIANG_RTX_RECORD names a file."""
    record = os.environ.get("DIJIANG_RTX_RECORD")
    if record:
        graphs = "plugin" if made.plugin else "standard"
        numbers = " ".join(map(str, capabilities))
        size = f"{made.plan.stat().st_size / 1e6:6.2f} MB"
        line = f"{graphs:8} {name:14} {dtype:8} {kind:7} sm {numbers:16} {size}"
        with open(record, "a", encoding="utf-8") as file:
            file.write(f"{line} {found['done']['seconds']:6.1f} s\n")


# Quantised weights


@pytest.fixture(scope="module")
def quantised(exported: Exported) -> Bundle:
    """In both formats: head, embedding, v and dense in int8, all else in int4."""
    model = neox(hidden=64, heads=4, intermediate=96, vocab=128)
    return open_bundle(exported(model, weight_format="int4", dtype="float16", cases="none")[0])


def quantised_requests(bundle: Bundle, folder: Path, plugin: Path | None = None) -> list[BuildRequest]:
    recipe = Recipe("r", max_batch=BATCH, max_length=LENGTH, opt_length=64, layout="two")
    sources = list(plans(bundle, recipe, standard=plugin is None))
    graphs = write_signed(bundle, [source.graph for source in sources], folder)
    return [
        BuildRequest(
            onnx=graphs[source.graph], plan=folder / source.file, plugin=plugin, dtype=bundle.dtype,
            profiles=source.profiles, workspace=1 << 28, optimization_level=3, timing_cache=None, device=0,
            plugin_products=False, runtime=TENSORRT_RTX, capabilities=(80, 86, 89, 120, 121),
        )
        for source in sources
    ]  # fmt: skip


def check_quantised(bundle: Bundle, made: BuildRequest) -> None:
    """Each matrix is in the plan as q in its own bits, by rows or by columns, and not in float16; the
    embedding is as it is stored."""
    plan = made.plan.read_bytes()
    stored = (bundle.path / "weights.data").read_bytes()
    places = {t.name: t for t in external_tensors((bundle.path / "step.onnx").read_bytes())}
    assert bundle.quantised is not None
    for part in (part for parts in bundle.quantised.values() for part in parts):
        data, scales = (
            stored[places[name].offset : places[name].offset + places[name].length]
            for name in (part.stored_name, part.scale_name)
        )
        if part.name == "embed_tokens.weight":
            assert data in plan
            continue
        signed = np.frombuffer(data, np.uint8) ^ (0x88 if part.format == "int4" else 0x80)
        turned = signed.reshape(part.rows, -1).T.tobytes() if part.format == "int8" else b""
        assert signed.tobytes() in plan or (turned and turned in plan), part.stored_name
        q = (
            signed.view(np.int8)
            if part.format == "int8"
            else np.stack((signed << 4, signed), -1).view(np.int8) >> 4
        )
        blocks = q.reshape(*part.scale_shape, BLOCK).astype(np.float32)
        floats = blocks * np.frombuffer(scales, np.float16).reshape(part.scale_shape)[..., None]
        wide = floats.reshape(part.rows, part.columns).astype(np.float16)
        for matrix in (wide, wide.T):
            assert matrix.tobytes()[:4096] not in plan, f"{part.name} is there in float16"


def test_plans_keep_quantised_weights_in_their_bits(quantised: Bundle, site: Path, tmp_path: Path) -> None:
    requests = quantised_requests(quantised, tmp_path)
    for made, found in zip(requests, run(site, tmp_path, requests), strict=True):
        assert "error" not in found, found["error"]
        check_quantised(quantised, made)


def test_the_bundle_s_own_graphs_are_refused(quantised: Bundle, site: Path, tmp_path: Path) -> None:
    """Which is why there are others; a version that takes them makes these needless."""
    (made, _) = quantised_requests(quantised, tmp_path)
    (found,) = run(site, tmp_path, [dataclasses.replace(made, onnx=quantised.graph_path("prefill"))])
    assert "MatMulNBits" in found["error"]


# The plugin


@pytest.fixture(scope="module")
def plugin() -> Path:
    """Compiled for 8.0, whose PTX every GPU of TensorRT for RTX takes; minutes, kept in the user's cache."""
    if not HEADERS:
        pytest.skip("DIJIANG_TENSORRT_INCLUDE names no headers: `make rtx-test TRT_INCLUDE=...`")
    command = [sys.executable, "-m", "dijiang_export", "build-plugin", "--tensorrt-include", HEADERS]
    subprocess.run([*command, "--architecture", "80", "--jobs", str(os.cpu_count())], check=True)
    return find_tensorrt_library(11, (80, 86, 89, 120, 121))


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", TYPES)
def test_with_the_plugin(name: str, dtype: str, site: Path, plugin: Path, tmp_path: Path) -> None:
    kinds: tuple[Literal["step", "prefill"], ...] = ("step", "prefill")
    capabilities = (80, 86, 89, 120, 121)
    requests = [request(tmp_path, name, dtype, kind, capabilities, plugin) for kind in kinds]
    for kind, made, found in zip(kinds, requests, run(site, tmp_path, requests), strict=True):
        check(made, found, name, kind)
        _report(name, dtype, capabilities, kind, made, found)


def test_quantised_weights_beside_the_plugin_s_attention(
    quantised: Bundle, site: Path, plugin: Path, tmp_path: Path
) -> None:
    requests = quantised_requests(quantised, tmp_path, plugin)
    for made, found in zip(requests, run(site, tmp_path, requests), strict=True):
        assert "error" not in found, found["error"]
        assert found["plugins"] == quantised.spec.num_layers, "attention alone"
        check_quantised(quantised, made)


@pytest.mark.parametrize(
    ("dtype", "weights"), [("float16", None), ("bfloat16", None), ("float16", "int4"), ("bfloat16", "int8")]
)
@pytest.mark.parametrize("name", ["neox", "neox, tables", "llama", "opt"])
def test_a_step_in_one_launch(
    name: str, dtype: str, weights: str | None, site: Path, plugin: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What TensorRT 8.6 to 11 are given is taken by this builder too, as a graph, for its bindings put no
    plugin into a network. Packed for a GPU that is not here, and in the plan once: float weights, or
    quantised ones with the embedding's elements and scales."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    FakeMachine(tmp_path / "machine").enter(monkeypatch)
    kernels = OnAStream(compile_emulated(tmp_path).path)
    kernels.device = Device(89, 128, 99 << 10)
    spec = STEP_MODELS[name]
    network, *_ = make(tmp_path, spec, dtype, BATCH, kernels, Cuda(), modern=True, kind=weights)
    ir.save(as_onnx(network), tmp_path / "one.onnx")
    made = BuildRequest(
        onnx=tmp_path / "one.onnx", plan=tmp_path / "step.plan", plugin=plugin, dtype=dtype,
        profiles=[shapes(spec, "step")], workspace=1 << 28, optimization_level=3, timing_cache=None, device=0,
        plugin_products=False, runtime=TENSORRT_RTX, capabilities=(80, 86, 89, 120, 121),
    )  # fmt: skip
    (found,) = run(site, tmp_path, [made])
    assert "error" not in found, found["error"]
    assert found["plugins"] == 1
    inputs, outputs = graph_io(spec, step=True, all_logits=False)
    for part, tensors in (("inputs", inputs), ("outputs", outputs)):
        assert {n: kind for n, (kind, _) in found[part].items()} == {
            tensor.name: RTX_TYPES[tensor.dtype] for tensor in tensors
        }
    plan = made.plan.read_bytes()
    for constant in (tensor.array for tensor in network.layers[0].inputs if tensor.array is not None):
        assert plan.count(constant.tobytes()) == 1


def test_without_the_link_the_parser_ends_its_process(site: Path, plugin: Path, tmp_path: Path) -> None:
    """What nvidia/private_link.py is for; the parent makes a sentence of it, with the node from the log."""
    made = request(tmp_path, "gpt-neox", "float16", "step", (89,), plugin)
    with pytest.raises(
        RunnerError, match=r"died while it parsed step\.trt\.onnx, at the node /layers\.0"
    ) as info:
        build_in_a_process(site, tmp_path, made, {"LD_LIBRARY_PATH": ""})
    assert str(info.value.got).startswith("signal 6")
    dialect = dialect_of("1.7.1", TENSORRT_RTX)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        with parser_environment(dialect, "1.7.1") as environment:
            done = build_in_a_process(site, tmp_path, made, environment)
    assert done["layers"] > 0 and made.plan.stat().st_size > 0


def build_in_a_process(site: Path, folder: Path, made: BuildRequest, environment: dict[str, str]) -> Any:
    """As `build-engine` does it."""
    path = os.pathsep.join((str(site), *sys.path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.syspath_prepend(str(site))
        return run_worker(made, folder, silent, "", os.environ | environment | {"PYTHONPATH": path})


def test_the_builder_s_process(site: Path, tmp_path: Path) -> None:
    """The worker itself, started as `build-engine` starts it."""
    made = request(tmp_path, "gpt-neox", "float32", "step", (89,))
    done = build_in_a_process(site, tmp_path, made, {})
    assert done["layers"] > 0 and done["peak_device_bytes"] is None and done["peak_host_bytes"] > 1 << 26
    assert made.plan.read_bytes().startswith(b"vtrt")
    assert "layer /" in (tmp_path / "cache/dijiang-export/build-engine.log").read_text()


# What goes wrong


def test_a_node_that_the_parser_does_not_take_is_named(site: Path, tmp_path: Path) -> None:
    """A plugin's node without the plugin. The builder's own sentence for it, from the real parser."""
    spec = spec_of("gpt-neox")
    graph = rm.traced(spec, torch.float16, "step")
    lower.lower_to_tensorrt(graph)
    rm.give_weights(graph, spec, rm.random_model(spec, dtype=torch.float16))
    made = request(tmp_path, "gpt-neox", "float16", "step", (89,))
    ir.save(graph, made.onnx)
    (found,) = run(site, tmp_path, [made])
    assert (
        "cannot parse" in found["error"] and "stops at the node /layers.0/attention/Dijiang" in found["error"]
    )
    assert "(DijiangAttention)" in found["error"] and "build-plugin" in found["error"]
    assert not made.plan.exists()
