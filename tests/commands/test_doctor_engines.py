"""doctor on NVIDIA's runtimes: which are here and for what, which engines fit, and what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.makers.engine_folders import write_engine
from support.makers.machines import GPU, HERE, works
from support.makers.plugin_cache import make_build

from dijiang_engines import doctor
from dijiang_engines.machine import Gpu, Machine
from dijiang_engines.nvidia import status, tensorrt_library
from dijiang_engines.plugin.cache import cache_folder, source_hash
from dijiang_export.cli import main

ADA = replace(HERE, gpus=(replace(GPU, driver="580.65"),))
HOPPER = replace(HERE, gpus=(Gpu("NVIDIA H100", 80 << 30, "580.65", "9.0"),))
OLD = replace(HERE, gpus=(GPU,))  # driver 555
ORIN = replace(HERE, board="NVIDIA Jetson AGX Orin")
RTX = {"tensorrt-rtx-cu13-bindings": "1.7.1.116", "tensorrt-rtx-cu13-libs": "1.7.1.116"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Packages that are there, for a test to change; nothing else is, and no plugin."""
    packages = {"onnxruntime": "1.32.0"}
    for module in (doctor, status):
        monkeypatch.setattr(module, "package_version", packages.get)
    monkeypatch.setattr(
        tensorrt_library, "package_versions", lambda names: {n: packages[n] for n in names if n in packages}
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return packages


def look(machine: Machine) -> doctor.Diagnosis:
    return doctor.diagnose(works, machine)


def rtx(found: doctor.Diagnosis) -> status.RuntimeStatus:
    return next(runtime for runtime in found.runtimes if runtime.name == "tensorrt-rtx")


def engine(folder: Path, plugin: bool = False, **changes: Any) -> Path:
    made_for = {
        "runtime": "tensorrt-rtx", "tensorrt": "1.7.1", "gpu": None, "compute_capabilities": [86, 89],
        "graphs": "plugin" if plugin else "standard",
        "plugin_sources": source_hash() if plugin else None, "plugin_version": "0.1.0" if plugin else None,
    }  # fmt: skip
    return write_engine(folder, made_for=made_for | changes)


# Runtimes


@pytest.mark.parametrize(
    ("machine", "runs", "detail"),
    [(ADA, True, "installed; not tried"), (HOPPER, False, "compute capability 9.0 of 8.0, 8.6"),
     (HERE, False, "there is no GPU"), (OLD, False, "the driver 555.1 is too old for CUDA 13")],
)  # fmt: skip
def test_tensorrt_for_rtx(installed: dict[str, str], machine: Machine, runs: bool, detail: str) -> None:
    """It builds everywhere."""
    installed |= RTX
    found = rtx(look(machine))
    assert (found.version, found.runs, found.builds) == ("1.7.1.116", runs, True)
    assert detail in found.detail
    assert (found.hint is not None) == (machine is OLD)


@pytest.mark.parametrize(
    ("machine", "missing"),
    [(ADA, "pip install 'dijiang-export[rtx]'"), (HOPPER, "pip install 'dijiang-export[tensorrt]'"),
     (HERE, None), (ORIN, "pip install 'dijiang-export[tensorrt]'")],
)  # fmt: skip
def test_nothing_is_installed(installed: dict[str, str], machine: Machine, missing: str | None) -> None:
    found = look(machine)
    assert not any(runtime.runs or runtime.builds for runtime in found.runtimes)
    assert found.missing == missing
    runner = next(r for r in found.runners if r.name == "tensorrt")
    assert not runner.works and runner.detail == "not installed"


def test_wheels_of_different_versions(installed: dict[str, str]) -> None:
    installed |= RTX | {"tensorrt-rtx-cu13-libs": "1.8.0.1"}
    found = look(ADA)
    assert rtx(found).broken and "of different versions" in rtx(found).detail
    assert found.missing == rtx(found).hint and "==1.8.0.1" in str(found.missing)
    assert any("of different versions" in problem.what for problem in found.problems)


def test_a_version_that_is_not_supported(installed: dict[str, str]) -> None:
    installed |= dict.fromkeys(RTX, "1.4.0.1")
    assert "not supported" in rtx(look(ADA)).detail and not rtx(look(ADA)).builds


def test_the_runner_of_engines_names_what_runs(installed: dict[str, str]) -> None:
    installed |= RTX | {"tensorrt": "10.13.3.9"}
    runner = next(r for r in look(ADA).runners if r.name == "tensorrt")
    assert runner.works and runner.version == "TensorRT 10.13.3.9, TensorRT for RTX 1.7.1.116"
    assert next(r for r in look(HOPPER).runners if r.name == "tensorrt").version == "TensorRT 10.13.3.9"


# Engines


def test_an_engine_that_fits(installed: dict[str, str], tmp_path: Path) -> None:
    installed |= RTX
    engine(tmp_path / "a.engine")
    found = look(ADA)
    (one,) = found.engines
    assert one.fits and one.made_for == (
        "TensorRT for RTX 1.7.1, compute capability 8.6, 8.9, without the plugin"
    )
    assert found.missing is None


@pytest.mark.parametrize(
    ("changes", "detail", "hint"),
    [
        ({"compute_capabilities": [120]}, "another GPU than NVIDIA Test 8.9", "build-engine"),
        ({"tensorrt": "1.8.0"}, "TensorRT for RTX is 1.7.1.116 here", "build-engine"),
        ({"runtime": "tensorrt", "gpu": "NVIDIA Test", "compute_capability": 89}, "is not installed", "pip"),
        ({"runtime": "tensorrt", "gpu": "NVIDIA Other", "compute_capability": 89}, "another GPU", "build"),
        ({"plugin": True}, "not built for compute capability 8.9", "build-plugin --architecture 89"),
        ({"plugin": True, "plugin_sources": "0" * 64}, "another version's plugin", "build-engine"),
    ],
)
def test_an_engine_that_does_not(
    installed: dict[str, str], tmp_path: Path, changes: dict[str, Any], detail: str, hint: str
) -> None:
    installed |= RTX
    engine(tmp_path / "a.engine", **changes)
    found = look(ADA)
    (one,) = found.engines
    assert not one.fits and detail in one.detail and hint in str(one.hint)
    assert found.missing == one.hint


def test_a_plugin_that_was_built(installed: dict[str, str], tmp_path: Path) -> None:
    installed |= RTX
    engine(tmp_path / "a.engine", plugin=True)
    make_build(cache_folder(), "built", architectures=["sm_89"], tensorrt="11.1.0")
    assert look(ADA).engines[0].fits


@pytest.mark.parametrize("headers", ["10.13.3", "8.6.1", None])
def test_a_plugin_for_another_tensorrt(
    installed: dict[str, str], tmp_path: Path, headers: str | None
) -> None:
    """It would not be opened: the runner looks for that of the headers of TensorRT 11."""
    installed |= RTX
    engine(tmp_path / "a.engine", plugin=True)
    make_build(cache_folder(), "built", architectures=["sm_89"], tensorrt=headers)
    (one,) = look(ADA).engines
    assert not one.fits and "not built for compute capability 8.9" in one.detail


def test_a_folder_that_only_looks_like_one(installed: dict[str, str], tmp_path: Path) -> None:
    installed |= RTX
    (tmp_path / "a").mkdir()
    (tmp_path / "a/engine.json").write_text("{")
    (one,) = look(ADA).engines
    assert not one.fits and one.made_for == "?"


def test_the_command_shows_it(
    installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    installed |= RTX
    engine(tmp_path / "a.engine", tensorrt="1.8.0")
    monkeypatch.setattr(doctor, "describe_machine", lambda: ADA)
    monkeypatch.setattr(doctor, "probe_in_subprocess", works)
    assert main(["doctor"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "TensorRT for RTX" in out and "a.engine" in out
    assert "missing for an engine: dijiang-export build-engine BUNDLE -o a.engine --force" in out
