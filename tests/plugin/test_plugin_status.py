"""What doctor says about the plugin: tools, headers, and whether what is built may still be loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.fakes.toolchain import FakeToolchain, without_tools
from support.makers.machines import GPU, HERE, works
from support.makers.plugin_cache import make_build

from dijiang_engines import doctor
from dijiang_engines.plugin import toolchain
from dijiang_engines.plugin.cache import KERNELS, cache_folder
from dijiang_engines.plugin.status import plugin_needs, plugin_status
from dijiang_export.cli import main


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeToolchain:
    made = FakeToolchain(tmp_path / "tools")
    monkeypatch.setattr(toolchain, "SYSTEM", made.system)
    monkeypatch.setattr(toolchain, "_ask_driver", lambda: [])
    monkeypatch.setattr("sys.executable", str(made.bin / "python"))  # no CMake of pip's
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    assert "TENSORRT_ROOT" not in without_tools()
    return made


def test_everything_is_there(tools: FakeToolchain) -> None:
    tools.headers((10, 3, 0))
    needs = {need.name: (need.version, need.enough, need.hint) for need in plugin_needs()}
    assert needs == {
        "nvcc": ("12.6", True, None), "C++ compiler": ("12.2.0", True, None), "cmake": ("3.25.1", True, None),
        "make or ninja": ("found", True, None), "TensorRT headers": ("10.3.0", True, None),
    }  # fmt: skip


def test_nothing_is_there(tools: FakeToolchain) -> None:
    for path in tools.bin.iterdir():
        path.unlink()
    needs = plugin_needs()
    assert not any(need.enough for need in needs)
    assert all(need.version is None and need.hint for need in needs)
    status = plugin_status(HERE)
    assert (status.nvcc, status.known_architectures, status.headers, status.built) == (None, (), (), ())


def test_too_old_is_said(tools: FakeToolchain) -> None:
    tools.nvcc("11.8")
    tools.cmake("3.16.3")
    needs = {need.name: need for need in plugin_needs()}
    assert (needs["nvcc"].version, needs["nvcc"].enough, needs["nvcc"].least) == ("11.8", False, "12.0")
    assert (needs["cmake"].version, needs["cmake"].enough) == ("3.16.3", False)


def test_a_gpu_without_its_build_is_told_what_to_run(tools: FakeToolchain) -> None:
    ada = replace(HERE, gpus=(GPU,))
    assert plugin_status(HERE).hint is None  # no GPU: nothing to do
    assert plugin_status(ada).hint == "dijiang-export build-plugin --kernels-only"
    tools.headers()
    assert plugin_status(ada).hint == "dijiang-export build-plugin"
    make_build(cache_folder(), "other", architectures=["sm_90", "compute_90"])
    assert plugin_status(ada).hint == "dijiang-export build-plugin"
    make_build(cache_folder(), "stale", architectures=["sm_89"], sources="0" * 64)
    assert plugin_status(ada).hint == "dijiang-export build-plugin"
    make_build(cache_folder(), "right", architectures=["sm_89"])
    assert plugin_status(ada).hint is None
    assert plugin_status(ada).gpu_architectures == (89,)


def test_current_stale_and_damaged_are_told_apart(tools: FakeToolchain) -> None:
    make_build(cache_folder(), "good")
    make_build(cache_folder(), "stale", version="0.0.1")
    (make_build(cache_folder(), "bad", tensorrt=None) / KERNELS).write_text("changed")
    states = {Path(b.folder).name: (b.state, b.tensorrt) for b in plugin_status(HERE).built}
    assert states == {"good": ("current", "10.13.3"), "stale": ("stale", "10.13.3"), "bad": ("damaged", None)}
    found = doctor.diagnose(works, HERE)
    (problem,) = [p for p in found.problems if "damaged" in p.what]
    assert problem.hint == "dijiang-export build-plugin --force"


def test_the_command_shows_it(
    tools: FakeToolchain, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "probe_in_subprocess", works)
    folder = make_build(cache_folder(), "good")
    headers = tools.headers()
    assert main(["doctor"]) == 0
    shown = capfd.readouterr().out
    assert all(text in shown for text in ("current", str(folder), f"TensorRT 10.13.3 in {headers}"))
    assert main(["doctor", "--json"]) == 0
    plugin = json.loads(capfd.readouterr().out)["plugin"]
    assert plugin["built"][0]["state"] == "current"
    assert plugin["known_architectures"] == [80, 87, 89, 90]
