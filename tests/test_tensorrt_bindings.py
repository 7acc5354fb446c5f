"""What this project uses of TensorRT is in the real Python bindings, with the arguments that it gives.

DIJIANG_TENSORRT_BINDINGS  a folder with wheels of NVIDIA's bindings for this Python, packed or unpacked, from
                           `pip download --no-deps -d bindings tensorrt_cu12_bindings==10.13.3.9` (1 MB each),
                           and one of polygraphy unless that is installed

The bindings are imported for real, over empty libraries (tests/tensorrt_strict.py). No TensorRT and no GPU is
needed, and none is tested: what is, is that names, signatures and flags fit. Needs a C compiler and binutils.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tensorrt_strict import write_stubs

ENGINES = Path(__file__).resolve().parents[1] / "engines"
HERE = Path(__file__).resolve().parent
VARIABLE = "DIJIANG_TENSORRT_BINDINGS"
FOLDER = Path(os.environ.get(VARIABLE, ""))
TOOLS = ("cc", "nm", "readelf")
PYTHON_TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def distributions() -> list[Path]:
    """Wheels, and unpacked ones, in the folder."""
    if not os.environ.get(VARIABLE):
        return []
    unpacked = [p.parent.parent for p in FOLDER.glob("*/tensorrt*bindings/tensorrt.so")]
    return sorted([*FOLDER.glob("tensorrt*bindings-*.whl"), *unpacked])


def name_of(path: Path) -> str:
    """Such as "10.13.3.9"."""
    found = re.search(r"-(\d[\d.]*\d)", path.name)
    return found[1] if found else path.name


def cannot() -> str | None:
    """Why nothing can be tested here, or None."""
    if not os.environ.get(VARIABLE):
        return f"no {VARIABLE}: no bindings of TensorRT to test with"
    if not distributions():
        return f"there are no wheels of TensorRT's bindings in ${VARIABLE}"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {missing[0]} to write stub libraries with" if missing else None


pytestmark = pytest.mark.skipif(cannot() is not None, reason=cannot() or "")


class Probe:
    """One version's bindings, ready to be asked.

    Attributes:
        version: (major, minor, patch).
    """

    def __init__(self, source: Path, polygraphy: Path | None, folder: Path) -> None:
        self.site = source
        if source.suffix == ".whl":
            self.site = folder / "site"
            with zipfile.ZipFile(source) as archive:
                archive.extractall(self.site)
        (self.module,) = self.site.glob("tensorrt*bindings/tensorrt.so")
        tags = next(self.site.glob("tensorrt*.dist-info/WHEEL")).read_text()
        if f"Tag: {PYTHON_TAG}-" not in tags:
            pytest.skip(f"{source.name} is for another Python than {PYTHON_TAG}")
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

    def run(self, engines: Path) -> tuple[dict[str, Any], str]:
        """What the probe says about the sources in `engines`, and what it printed."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / "model.onnx").write_bytes(os.urandom(1000))
        request = {
            "onnx": str(work / "model.onnx"), "folder": str(work), "result": str(work / "result.json"),
            "plugin": str(next(self.stubs.glob("libnvinfer_plugin.so.*"))),
            "polygraphy": self.polygraphy is not None,
        }  # fmt: skip
        (work / "request.json").write_text(json.dumps(request))
        path = [self.site, *([self.polygraphy] if self.polygraphy else []), engines, HERE]
        done = subprocess.run(
            [sys.executable, str(HERE / "tensorrt_probe.py"), str(work / "request.json")],
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
def polygraphy(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder with the package, or None."""
    wheels = sorted(FOLDER.glob("polygraphy-*.whl"))
    if wheels:
        folder = tmp_path_factory.mktemp("polygraphy")
        with zipfile.ZipFile(wheels[-1]) as archive:
            archive.extractall(folder)
        return folder
    unpacked = list(FOLDER.glob("*/polygraphy/__init__.py"))
    if unpacked:
        return unpacked[0].parent.parent
    spec = importlib.util.find_spec("polygraphy")
    return Path(spec.origin).parents[1] if spec and spec.origin else None


@pytest.fixture(scope="module", params=distributions(), ids=name_of)
def probe(
    request: pytest.FixtureRequest, polygraphy: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Probe:
    return Probe(request.param, polygraphy, tmp_path_factory.mktemp(name_of(request.param)))


def test_everything_that_is_used_exists(probe: Probe) -> None:
    """Logger, registry, plans, contexts, and the builder through the real Polygraphy."""
    found, text = probe.run(ENGINES)
    assert found["failures"] == {}, text
    assert found["version"] == "{}.{}.{}".format(*probe.version)
    assert len(found["used"]) > 40
    builds = [name for name in found if name.startswith("builder ")]
    print(
        f"TensorRT {found['tensorrt']}: {len(found['used'])} names in {len(builds)} builds and one runner, "
        f"Polygraphy {found.get('polygraphy', 'not here')}"
    )
    if probe.polygraphy is None:
        return
    assert len(builds) == (2 if probe.version[0] < 10 else 3)
    for name in builds:
        _check_build(found[name], name.removeprefix("builder "), probe.version)


def _check_build(asked: dict[str, Any], dtype: str, version: tuple[int, int, int]) -> None:
    """What the builder was asked for, as its methods were called."""
    old = version[0] < 10
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
    assert asked["precisions"] == ([["DataType.HALF"], ["DataType.FLOAT"]] if typed else [])
    chosen = [feature.partition(".")[2] for feature, on in asked["preview"] if on == "True"]
    assert chosen == (["FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806"] if old else [])
    assert asked["tactics"] == ([["3"]] if old else [])  # cuBLAS and cuBLASLt are bits 0 and 1


OLD, NEW, ANY = (8, 9), (10, 12), (8, 12)
MUTATIONS = [
    ("tensorrt_library.py", "trt.ILogger.WARNING", "trt.ILogger.WARN", ANY),
    (
        "tensorrt_library.py",
        "runtime.deserialize_cuda_engine(plan)",
        "runtime.deserialize_engine(plan)",
        (8, 10),
    ),
    (
        "tensorrt_library.py",
        "runtime.deserialize_cuda_engine(plan)",
        "runtime.deserialize_cuda_engine(1)",
        (11, 12),
    ),
    ("tensorrt_library.py", "return self._read(min(", "return self._reads(min(", (10, 11)),
    ("tensorrt_library.py", '"all_creators"', '"all_creator"', NEW),
    ("tensorrt_versions.py", "device_memory_size_v2", "device_memory_size_v9", (11, 12)),
    (
        "tensorrt_versions.py",
        "context.set_device_memory(address, size)",
        "context.set_device_memory(address)",
        NEW,
    ),
    ("tensorrt_versions.py", "context.device_memory = address", "context.device_memories = address", OLD),
    ("tensorrt_versions.py", "strategies.USER_MANAGED", "strategies.USER", NEW),
    ("tensorrt_versions.py", "PROFILE_SHARING_0806", "PROFILE_SHARING_0807", OLD),
    ("runners/tensorrt.py", "context.execute_async_v3(", "context.execute_async_v4(", ANY),
    (
        "runners/tensorrt.py",
        "context.set_tensor_address(name, address)",
        "context.set_tensor_address(address)",
        ANY,
    ),
    (
        "runners/tensorrt.py",
        "set_optimization_profile_async(place.profile, ",
        "set_optimization_profile_async(",
        ANY,
    ),
    ("runners/tensorrt_checks.py", "plan.num_io_tensors", "plan.num_bindings", NEW),
    ("typed_network.py", "layer.precision = trt.DataType.HALF", "layer.precision = 1", OLD),
    (
        "typed_network.py",
        "set_output_type(0, trt.DataType.FLOAT)",
        "set_output_type(trt.DataType.FLOAT)",
        OLD,
    ),
    ("typed_network.py", "tensor.shape = tuple(", "tensor.shapes = tuple(", ANY),
    ("build_worker.py", "trt.MemoryPoolType.WORKSPACE", "trt.MemoryPoolType.WORKSPACES", ANY),
    ("build_worker.py", "trt.IProgressMonitor)", "trt.IProgressMonitors)", NEW),
    ("build_worker.py", "def step_complete(", "def step_completed(", NEW),
    ("build_worker.py", 'getattr(layer, "precision", None)', "layer.precision", (11, 12)),
]
NEEDS_POLYGRAPHY = [
    ("build_worker.py", '"builder_optimization_level": int', '"optimization_level": int', ANY),
    ("build_worker.py", "strongly_typed=dialect", "typed=dialect", ANY),
]  # fmt: skip


CASES = [
    pytest.param(source, *mutation, id=f"{name_of(source)}-{mutation[0]}-{mutation[2]}")
    for source in distributions()
    for *mutation, (first, end) in MUTATIONS + NEEDS_POLYGRAPHY
    if first <= int(name_of(source).split(".")[0]) < end
]
"""Of every version, those that it gets to."""


@pytest.mark.parametrize(("probe", "file", "old", "new"), CASES, indirect=["probe"])
def test_a_wrong_name_is_seen(probe: Probe, file: str, old: str, new: str, tmp_path: Path) -> None:
    """The test above can fail: with one name changed, it does."""
    if probe.polygraphy is None and file in ("build_worker.py", "typed_network.py"):
        pytest.skip("no polygraphy")
    shutil.copytree(ENGINES, tmp_path / "engines", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "engines" / "dijiang_engines" / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r} any more: choose another mutation"
    path.write_text(text.replace(old, new))
    found, printed = probe.run(tmp_path / "engines")
    assert found["failures"], printed
