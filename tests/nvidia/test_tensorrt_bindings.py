"""What this project uses of TensorRT is in the real Python bindings, with the arguments that it gives.

`make bindings` fetches the wheels (1 MB each) and DIJIANG_TENSORRT_BINDINGS may name another folder of them
(tests/support/tensorrt_wheels.py).

The bindings are imported for real, over empty libraries (tests/support/fakes/strict_tensorrt.py). No
TensorRT and no GPU is needed, and none is tested: what is, is that names, signatures and flags fit. Needs a
C compiler and binutils.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.fakes.strict_tensorrt import write_stubs
from support.paths import ROOT, TESTS
from support.probes.tensorrt_uses import OTHER_VERSIONS, users
from support.tensorrt_wheels import REQUIRED, unpack, version_of, wheels, without

from dijiang_engines import io_names

ENGINES = ROOT / "engines"
TOOLS = ("cc", "nm", "readelf")
BINDINGS = wheels("tensorrt_bindings") + wheels("tensorrt_cu1[23]_bindings")


def cannot() -> str | None:
    """Why nothing can be tested here, or None."""
    if not BINDINGS:
        return without("tensorrt_cu13_bindings") or without("tensorrt_bindings")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {missing[0]} to write stub libraries with" if missing else without("polygraphy")


needs_bindings = pytest.mark.skipif(cannot() is not None and not REQUIRED, reason=cannot() or "")


@needs_bindings
def test_all_generations_are_here() -> None:
    """A folder that was named has what is to be tested."""
    assert cannot() is None
    if REQUIRED and sys.version_info < (3, 12):  # newer Pythons have no bindings of 8.6
        assert {version_of(path).partition(".")[0] for path in BINDINGS} == {"8", "10", "11"}


class Probe:
    """One version's bindings, ready to be asked.

    Attributes:
        version: (major, minor, patch).
    """

    def __init__(self, source: Path, polygraphy: Path, folder: Path) -> None:
        self.site = unpack(folder / "site", source)
        (self.module,) = self.site.glob("tensorrt*bindings/tensorrt.so")
        text = (self.module.parent / "__init__.py").read_text()
        found = re.search(r'^__version__ = "(\d+)\.(\d+)\.(\d+)', text, re.MULTILINE)
        assert found is not None
        self.version = (int(found[1]), int(found[2]), int(found[3]))
        major, minor, patch = self.version
        number = (major * 10 + minor) * 100 + patch  # 8.6.1 is 8601
        if major >= 10:
            number = (major * 100 + minor) * 100 + patch  # 10.13.3 is 101303
        self.stubs = folder / "stubs"
        write_stubs(self.module, number, self.stubs)
        self.polygraphy, self.folder = polygraphy, folder

    def run(self, engines: Path, first: bool = False) -> tuple[dict[str, Any], str]:
        """What the probe says about the sources in `engines`, one failure if `first`, and what it printed."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / "model.onnx").write_bytes(os.urandom(1000))
        request = {
            "onnx": str(work / "model.onnx"), "folder": str(work), "result": str(work / "result.json"),
            "plugin": str(next(self.stubs.glob("libnvinfer_plugin.so.*"))),
            "first": first,
        }  # fmt: skip
        (work / "request.json").write_text(json.dumps(request))
        path = [self.site, self.polygraphy, engines, TESTS]
        done = subprocess.run(
            [sys.executable, str(TESTS / "support/probes/bindings.py"), str(work / "request.json")],
            env=os.environ | {
                "LD_LIBRARY_PATH": str(self.stubs),
                "PYTHONPATH": os.pathsep.join(str(p) for p in path),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
        )  # fmt: skip
        result = work / "result.json"
        assert result.exists(), done.stdout
        return json.loads(result.read_text()), done.stdout


@pytest.fixture(scope="session")
def polygraphy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package."""
    return unpack(tmp_path_factory.mktemp("polygraphy") / "site", wheels("polygraphy")[-1])


@pytest.fixture(scope="module", params=BINDINGS, ids=version_of)
def probe(
    request: pytest.FixtureRequest, polygraphy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Probe:
    return Probe(request.param, polygraphy, tmp_path_factory.mktemp(version_of(request.param)))


@needs_bindings
def test_everything_that_is_used_exists(probe: Probe) -> None:
    """Logger, registry, plans, contexts, and the builder through the real Polygraphy."""
    found, text = probe.run(ENGINES)
    assert found["failures"] == {}, text
    assert found["version"] == "{}.{}.{}".format(*probe.version)
    assert len(found["used"]) > 40
    builds = [name for name in found if name.startswith("builder ")]
    print(
        f"TensorRT {found['tensorrt']}: {len(found['used'])} names in {len(builds)} builds and one runner, "
        f"Polygraphy {found['polygraphy']}"
    )
    assert len(builds) == (3 if probe.version[0] < 10 else 4)
    for name in builds:
        _check_build(found[name], name.split()[1], name.endswith("products"), probe.version)
    _check_one_launch(found["one launch"], probe.version)


@pytest.mark.parametrize("wanted", ["verbose", ""])
@needs_bindings
def test_the_builder_s_log_says_everything_if_asked(wanted: str, polygraphy: Path) -> None:
    """Through Polygraphy's own logger, which is silent about tactics otherwise."""
    program = (
        "from polygraphy.logger import G_LOGGER; from dijiang_engines.building import worker; "
        "worker._say_all(); G_LOGGER.extra_verbose('tactic 7'); G_LOGGER.error('an error')"
    )
    path = os.pathsep.join([str(polygraphy), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path, "DIJIANG_TENSORRT_LOG": wanted},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert "an error" in said and ("tactic 7" in said) == bool(wanted)


def _check_build(asked: dict[str, Any], dtype: str, products: bool, version: tuple[int, int, int]) -> None:
    """What the builder was asked for, as its methods were called."""
    old = version[0] < 10
    launches = 2 if products else 0
    assert asked["plugins"] == ([launches, 0] if old else [0, launches])
    assert asked["products"] == ({"launches": 2, "products": 2, "left": 0} if products else None)
    assert asked["moved"] == (["0", "0"] if products else [])  # the second product, and the sum's reader
    assert "TF32" not in asked["flags"]
    assert (asked["profiles"], len(asked["shapes"])) == (2, 10)
    assert ["input_ids", "(1, 1)", "(2, 32)", "(4, 64)"] in asked["shapes"]
    assert asked["workspace"] == [["MemoryPoolType.WORKSPACE", str(256 << 20)]]
    assert asked["level"] == [["3"]]
    assert asked["caches"] == [["b'old'"], ["b'old'"]]  # read before the build, and again when saved
    assert asked["network"] == ["EXPLICIT_BATCH" if old else "STRONGLY_TYPED"]
    assert asked["monitors"] == (0 if old else 1)
    typed = old and dtype == "float16"
    assert asked["flags"] == (["FP16", "OBEY_PRECISION_CONSTRAINTS"] if typed else [])
    assert asked["constraints"] == ("obey" if typed else "none")
    assert asked["contexts"] == (1 if typed else 0)  # whether the plan can be run is tried
    precisions = [["DataType.HALF"], ["DataType.HALF"], ["DataType.FLOAT"]]
    assert asked["precisions"] == (precisions if typed else [])
    chosen = [feature.partition(".")[2] for feature, on in asked["preview"] if on == "True"]
    assert chosen == (["FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806"] if old else [])
    assert asked["tactics"] == ([["3"]] if old else [])  # cuBLAS and cuBLASLt are bits 0 and 1


def _check_one_launch(asked: dict[str, Any], version: tuple[int, int, int]) -> None:
    """A network of its own with one plugin layer, its inputs and outputs the step graph's."""
    old = version[0] < 10
    assert asked["step"] == {"launches": 1, "blocks": 7, "packed_bytes": 256} and asked["products"] is None
    assert asked["plugins"] == ([1, 0] if old else [0, 1])
    integer = f"DataType.INT{32 if old else 64}"
    assert asked["inputs"][:3] == [
        ["input_ids", integer, "(-1, 1)"], ["positions", integer, "(-1,)"], ["seq_lens", integer, "(-1,)"],
    ]  # fmt: skip
    assert [kind for _, kind, _ in asked["inputs"][3:]] == ["DataType.FLOAT"] * 2
    assert asked["names"] == ["logits", *(io_names.present_state(layer) for layer in range(2))]
    assert asked["outputs"] == 3 and asked["network"] == ["EXPLICIT_BATCH" if old else "STRONGLY_TYPED"]
    assert asked["flags"] == [] and asked["precisions"] == []
    assert asked["contexts"] == 1, "whether the plan can be run here is tried"


OLD, NEW, ANY = (8, 9), (10, 12), (8, 12)
MUTATIONS: dict[str, list[tuple[str, str, tuple[int, int]]]] = {
    "nvidia/tensorrt_library.py": [
        ("trt.ILogger.WARNING", "trt.ILogger.WARN", ANY),
        ("runtime.deserialize_cuda_engine(plan)", "runtime.deserialize_engine(plan)", (8, 10)),
        ("runtime.deserialize_cuda_engine(plan)", "runtime.deserialize_cuda_engine(1)", (11, 12)),
        ("return self._read(min(", "return self._reads(min(", (10, 11)),
        ('"all_creators"', '"all_creator"', NEW),
    ],
    "nvidia/tensorrt_versions.py": [
        ("device_memory_size_v2", "device_memory_size_v9", (11, 12)),
        ("context.set_device_memory(address, size)", "context.set_device_memory(address)", NEW),
        ("context.device_memory = address", "context.device_memories = address", OLD),
        ("strategies.USER_MANAGED", "strategies.USER", NEW),
        ("PROFILE_SHARING_0806", "PROFILE_SHARING_0807", OLD),
    ],
    "runners/tensorrt/contexts.py": [
        ("context.execute_async_v3(", "context.execute_async_v4(", ANY),
        ("context.set_tensor_address(name, address)", "context.set_tensor_address(address)", ANY),
        ("set_optimization_profile_async(place.profile, ", "set_optimization_profile_async(", ANY),
    ],
    "runners/tensorrt/checks.py": [
        ("plan.num_io_tensors", "plan.num_bindings", NEW),
    ],
    "building/typed_network.py": [
        ("layer.precision = trt.DataType.HALF", "layer.precision = 1", OLD),
        ("set_output_type(0, trt.DataType.FLOAT)", "set_output_type(trt.DataType.FLOAT)", OLD),
        ("tensor.shape = tuple(", "tensor.shapes = tuple(", ANY),
    ],
    "building/worker.py": [
        ("trt.MemoryPoolType.WORKSPACE", "trt.MemoryPoolType.WORKSPACES", ANY),
        ('"builder_optimization_level": req', '"optimization_level": req', ANY),
        ("strongly_typed=dialect", "typed=dialect", ANY),
    ],
    "building/events.py": [
        ("trt.IProgressMonitor)", "trt.IProgressMonitors)", NEW),
        ("def step_complete(", "def step_completed(", NEW),
        ('getattr(layer, "precision", None)', "layer.precision", (11, 12)),
    ],
    "building/step_graph.py": [
        ('"IMatrixMultiplyLayer"', '"IMatMulLayer"', ANY),
        ("layer.get_input(i)", "layer.get_inputs(i)", ANY),
    ],
    "building/plugin_products.py": [
        ("node.layer.op1", "node.layer.transpose1", ANY),
    ],
    "building/product_layers.py": [
        ("node.layer.set_input(place, ", "node.layer.set_input(", ANY),
    ],
    "building/plugin_layers.py": [
        ("trt.PluginFieldType.INT32", "trt.PluginFieldType.INTEGER32", ANY),
        ("network.add_constant(array.shape, ", "network.add_constant(", ANY),
        ("registry.get_creator if", "registry.get_creators if", NEW),
        ("collection, trt.TensorRTPhase.BUILD", "collection", NEW),
        ("add_plugin_v3(inputs, [], plugin)", "add_plugin_v3(inputs, plugin)", NEW),
        ("else registry.get_plugin_creator", "else registry.get_creator", OLD),
        ("else network.add_plugin_v2(inputs, ", "else network.add_plugin(inputs, ", OLD),
    ],
    "building/step/one_launch.py": [
        ("network.add_input(INPUT_IDS, integer, ", "network.add_input(INPUT_IDS, ", ANY),
        ("trt.DataType.FLOAT", "trt.DataType.FLOAT32", ANY),
        ("network.mark_output(tensor)", "network.mark_outputs(tensor)", ANY),
    ],
}  # fmt: skip


def newest(first: int, end: int) -> Path | None:
    """The newest bindings of major versions from `first` to before `end`."""
    return next((p for p in reversed(BINDINGS) if first <= int(version_of(p).split(".")[0]) < end), None)


CASES = [
    pytest.param(source, file, old, new, id=f"{version_of(source)}-{file}-{new}")
    for file, mutations in MUTATIONS.items()
    for old, new, versions in mutations
    if (source := newest(*versions)) is not None
]
"""Each with the newest version that gets to it."""


def test_every_module_has_a_mutation() -> None:
    """So a module that begins to use TensorRT is one whose use is tried."""
    changed = {file.removesuffix(".py").replace("/", ".") for file in MUTATIONS}
    rtx = {name for name, dialect in OTHER_VERSIONS.items() if dialect == "RTX"}  # test_rtx_bindings.py's
    assert users(ENGINES) <= changed | rtx


@needs_bindings
@pytest.mark.parametrize(("probe", "file", "old", "new"), CASES, indirect=["probe"])
def test_a_wrong_name_is_seen(probe: Probe, file: str, old: str, new: str, tmp_path: Path) -> None:
    """The test above can fail: with one name changed, it does."""
    shutil.copytree(ENGINES, tmp_path / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "engines" / "dijiang_engines" / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r} any more: choose another mutation"
    path.write_text(text.replace(old, new))
    found, printed = probe.run(tmp_path / "engines", first=True)
    assert found["failures"], printed
