"""The plugin in TensorRT's real plugin registry, and in C++ alone; no GPU is needed.

DIJIANG_TENSORRT_INCLUDE  folders with TensorRT's headers, 10.3 or newer, with colons between
DIJIANG_TENSORRT_RUNTIME  libnvinfer or libnvinfer_lean of the same major versions, with colons; default: what
                          `make registry-test` fetched, or an installed tensorrt or tensorrt_lean package
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.makers.plugin_builds import ROOT, missing_tool, needs_nvcc, run

from dijiang_engines.op_contract import ATTRIBUTES, DOMAIN, INPUTS, OP_NAME
from dijiang_engines.plugin.toolchain import read_headers

SHELLS = ROOT / "plugins/tensorrt"
HEADERS = [Path(folder) for folder in os.environ.get("DIJIANG_TENSORRT_INCLUDE", "").split(":") if folder]


def runtime(major: int) -> Path | None:
    """A TensorRT runtime of this major version, or None."""
    named = [Path(p) for p in os.environ.get("DIJIANG_TENSORRT_RUNTIME", "").split(":") if p]
    fetched = sorted((ROOT / "build/tensorrt-lean").glob("*/libnvinfer*.so.*"))
    installed: list[Path] = []
    for package in ("tensorrt_libs", "tensorrt_lean_libs"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            installed += Path(folder).glob("libnvinfer*.so.*")
    pattern = re.compile(rf"libnvinfer(_lean|_dispatch)?\.so\.{major}(\.|$)")
    return next((p for p in named + fetched + installed if pattern.match(p.name)), None)


@pytest.fixture(scope="module")
def build() -> Path:
    """Plugins and drivers for all headers; the kernels for one architecture, since none runs."""
    if missing_tool() is not None:
        pytest.skip(f"cannot compile CUDA here: {missing_tool()}")
    folder = ROOT / "build/registry-test"
    configure: list[str | Path] = ["-S", ROOT / "plugins", "-B", folder, "-DCMAKE_CUDA_ARCHITECTURES=90-real"]
    configure += ["-DDIJIANG_BUILD_TESTS=ON", "-DDIJIANG_WARNINGS_AS_ERRORS=ON"]
    configure += ["-DTENSORRT_INCLUDE=" + ";".join(str(h) for h in HEADERS)]
    run("cmake", *configure)
    run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1))
    return folder


@pytest.mark.skipif(not HEADERS, reason="no DIJIANG_TENSORRT_INCLUDE")
@pytest.mark.parametrize("folder", HEADERS, ids=[h.parent.name for h in HEADERS])
def test_in_the_real_registry(folder: Path, build: Path) -> None:
    headers = read_headers(folder)
    assert headers is not None, f"{folder} has no TensorRT headers"
    major = headers.version[0]
    plugin = (
        build if len(HEADERS) == 1 else build / f"tensorrt-{headers}"
    ) / f"libdijiang_tensorrt_{major}.so"
    if major < 10:  # the registry of 8.6 is in the full library alone
        done = subprocess.run(
            [build / f"tests/step_v2_driver-{headers}", plugin],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.endswith("all right\n"), done.stdout
        return
    library = runtime(major)
    if library is None:
        pytest.skip(
            f"no TensorRT {major} runtime: name it in DIJIANG_TENSORRT_RUNTIME or `make registry-test`"
        )
    done = subprocess.run(
        [build / f"tests/registry_driver-{headers}", library, plugin],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("all right\n")
    fields = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("field ")]
    assert fields == [[name, kind, "1"] for name, kind in ATTRIBUTES.items()]


@needs_nvcc
def test_plan_bytes_of_tensorrt_8(tmp_path: Path) -> None:
    """Write and read back, and refuse anything else; with sanitizers."""
    program = tmp_path / "blob_test"
    sources = [ROOT / "plugins/tests/blob_test.cpp", *(SHELLS / "v2").glob("*blob.cpp")]
    sources.append(SHELLS / "step/formats.cpp")
    includes = [f"-I{p}" for p in (ROOT / "plugins/include", SHELLS, SHELLS / "common", SHELLS / "v2")]
    checks = ["-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    run("g++", "-std=c++17", "-g", *checks, *includes, *sources, "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_one_node_graph_is_onnx(tmp_path: Path) -> None:
    """tests/gpu/tensorrt86_plugin.py writes ONNX without the onnx package, where TensorRT 8.6 runs."""
    onnx = pytest.importorskip("onnx")
    sys.path.insert(0, str(ROOT / "tests/gpu"))
    import tensorrt86_plugin as script
    from support.makers.kernel_cases import Case, make_call
    from support.makers.tensorrt_cases import write

    cases = {
        "a": Case(heads=2, d=32, dtype="float16", length=3, batch=2, decay="trained", rows=5, rotary=0),
        "b": Case(heads=3, d=16),
        "c": Case(heads=2, d=16, dtype="bfloat16"),
    }
    write(tmp_path / "cases.bin", cases)
    read = script.read_cases(tmp_path / "cases.bin")
    assert [case.name for case in read] == list(cases)
    assert [case.is_bfloat16 for case in read] == [False, False, True]
    call = make_call(cases["a"])
    assert np.array_equal(read[0].inputs[0], call.qkv.numpy())
    assert np.array_equal(read[0].inputs[11], call.read_scale.numpy())  # type: ignore[union-attr]

    for case, count in ((read[0], 12), (read[1], 10)):
        model = onnx.load_from_string(script.onnx_model(case))
        onnx.checker.check_model(model)
        assert model.ir_version == 8
        assert {o.domain: o.version for o in model.opset_import} == {"": 17, "dijiang": 1}
        (node,) = model.graph.node
        assert (node.domain, node.op_type, len(node.input)) == (DOMAIN, OP_NAME, count)
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert given.pop("plugin_namespace") == b"dijiang" and given.pop("plugin_version") == b"1"
        assert list(given) == list(ATTRIBUTES)
        assert given["epsilon"] == pytest.approx(1e-5)
        assert [i.name for i in model.graph.input] == [f.name for f in INPUTS[:5]]
        shape = model.graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param for d in shape[:2]] == ["batch", "length"]
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        for name, value in zip(script.NAMES[5:], case.inputs[5:], strict=False):
            np.testing.assert_array_equal(weights[name], value)
