"""ONNX Runtime's provider for TensorRT for RTX: registering it, its devices, and what keeps it away.

The first part stands in for the package and for ONNX Runtime's registry of providers. The second loads
NVIDIA's real library (`make rtx-test` fetches its wheel) into the real ONNX Runtime, over a driver that knows
no GPU: that it registers and names its provider. No session of it has run anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.makers.toy_bundle import ToyModel
from support.tensorrt_wheels import FOLDER, unpack, version_of, wheels

from dijiang_engines.errors import RunnerError, UsageError
from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.onnxruntime import rtx
from dijiang_engines.runners.onnxruntime.providers import PROVIDERS, RTX

NAME = "NvTensorRTRTXExecutionProvider"


class Registry:
    """What of ONNX Runtime is used: providers from libraries, and their devices."""

    __version__ = "1.32.0"

    def __init__(self, devices: int = 2, error: str | None = None) -> None:
        self.registered: list[tuple[str, str]] = []
        self._devices, self._error = devices, error

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self._error is not None:
            raise RuntimeError(self._error)
        self.registered.append((name, path))

    def get_ep_devices(self) -> list[Any]:
        cpu = SimpleNamespace(ep_name="CPUExecutionProvider", index=0)
        mine = [SimpleNamespace(ep_name=NAME, index=i) for i in range(self._devices)]
        return [cpu, *(mine if self.registered else [])]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType(rtx.MODULE)
    module.get_library_path = lambda: "/somewhere/libprovider.so"
    monkeypatch.setitem(sys.modules, rtx.MODULE, module)


@pytest.mark.usefixtures("package")
def test_the_library_is_registered_once() -> None:
    registry = Registry()
    assert PROVIDERS[RTX] == NAME
    assert [rtx.rtx_device(registry, index).index for index in (0, 1, 0)] == [0, 1, 0]
    assert registry.registered == [(NAME, "/somewhere/libprovider.so")]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("registry", "index", "words", "hint"),
    [
        (Registry(devices=0), 0, "finds no GPU that it runs on", "580"),
        (Registry(devices=1), 1, "there is no such GPU", None),
        (Registry(error="Failed: libcuda.so.1: cannot open"), 0, "does not load", "CUDA 13"),
        (SimpleNamespace(__version__="1.20.1"), 0, "takes no providers from other packages", "1.24"),
    ],
)
def test_what_is_not_right(registry: Any, index: int, words: str, hint: str | None) -> None:
    with pytest.raises(RunnerError, match=words) as info:
        rtx.rtx_device(registry, index)
    assert hint is None or hint in str(info.value.hint) + str(info.value.expected)


def test_the_package_is_not_installed(toy: tuple[Path, ToyModel], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, rtx.MODULE, None)
    with pytest.raises(RunnerError, match="is not installed") as info:
        open_runner(open_bundle(toy[0]), "onnxruntime-rtx")
    assert rtx.PACKAGE in str(info.value.hint)


def test_options_that_it_does_not_know(toy: tuple[Path, ToyModel]) -> None:
    with pytest.raises(UsageError, match="the runner onnxruntime-rtx has no option 'threads'"):
        open_runner(open_bundle(toy[0]), "onnxruntime-rtx", threads=2)


@pytest.mark.usefixtures("package")
def test_a_session_gets_the_device(toy: tuple[Path, ToyModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner around it, with the CPU's provider in RTX's place: states on the host, right numbers."""
    import onnxruntime as ort

    given: list[Any] = []

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, devices: Any, options: Any) -> None:
            given.append((devices, options))

    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr("dijiang_engines.runners.onnxruntime.sessions.rtx_device", lambda ort, index=0: index)
    monkeypatch.setitem(PROVIDERS, RTX, "CPUExecutionProvider")
    runner = open_runner(open_bundle(toy[0]), "onnxruntime-rtx", device=1)
    oracle = open_runner(open_bundle(toy[0]), "cpu", threads=1)
    assert (runner.name, runner.config.lowering, runner.config.tensors_on) == (RTX, "standard", "cpu")
    ids, zero, lens = [[1, 2, 3]], [0], [3]
    states = runner.new_state(1), oracle.new_state(1)
    got, expected = (r.prefill(ids, zero, lens, s) for r, s in zip((runner, oracle), states, strict=True))
    assert abs(got - expected).max() < 1e-5
    got, expected = (r.step([[4]], [3], [1], s) for r, s in zip((runner, oracle), states, strict=True))
    assert abs(got - expected).max() < 1e-5
    assert given == [([1], {})] * 2


# The real library

WHEEL = "onnxruntime_ep_nv_tensorrt_rtx_cu13"
REASON = f"no wheel of {WHEEL} in {FOLDER}: `make rtx-test` fetches it (146 MB)"


def stub(folder: Path, library: Path, soname: str, prefix: str, status: int) -> None:
    """An empty library of NVIDIA's driver: every function that `library` wants of it returns `status`."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    names = set(re.findall(rf"\b({prefix}\w+)", listed))
    source = folder / f"{soname}.c"
    source.write_text("\n".join(f"int {name}(void) {{ return {status}; }}" for name in sorted(names)))
    options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
    subprocess.run(["cc", *options, str(source)], check=True)


@pytest.mark.skipif(not wheels(WHEEL), reason=REASON)
@pytest.mark.skipif(shutil.which("cc") is None or shutil.which("nm") is None, reason="no C compiler")
def test_the_real_library_registers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", minversion="1.24")
    path = wheels(WHEEL)[-1]
    site = unpack(FOLDER / f"rtx-ep-{version_of(path)}", path)
    library = site / "onnxruntime_ep_nv_tensorrt_rtx/libonnxruntime_providers_nv_tensorrt_rtx.so"
    stub(tmp_path, library, "libcuda.so.1", "cu[A-Z]", 100)  # CUDA_ERROR_NO_DEVICE
    stub(tmp_path, library, "libnvidia-ml.so.1", "nvml", 9)  # NVML_ERROR_DRIVER_NOT_LOADED
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "import onnxruntime as ort\n"
        "from dijiang_engines.errors import RunnerError\n"
        "from dijiang_engines.runners.onnxruntime import rtx\n"
        "found = []\n"
        "for _ in range(2):\n"
        "    try: rtx.rtx_device(ort)\n"
        "    except RunnerError as error: found.append([error.what, error.got])\n"
        "print(json.dumps(found))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def tried(**more: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", code, str(site)], env=environment | more, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with_driver = tried(LD_LIBRARY_PATH=str(tmp_path))
    assert with_driver == [[f"{NAME} finds no GPU that it runs on", None]] * 2, "registered, and no GPU"
    without = tried(LD_LIBRARY_PATH="")
    assert (
        without[0][0] == f"the library of {NAME} does not load" or without == with_driver
    )  # a driver is here
