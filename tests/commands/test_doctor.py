"""doctor: what it finds, what it recommends, and that a broken runtime cannot take it down."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from support.makers.machines import GPU, HERE, works

from dijiang_engines import doctor, machine
from dijiang_engines.runners.onnxruntime.trial import doubling_model
from dijiang_export.cli import main


def broken(name: str) -> tuple[bool, str]:
    return False, "crashed"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages that are there, for a test to change; nothing else is."""
    packages = {"onnxruntime": "1.32.0", "torch": "2.13.0+cpu", "onnx": "1.20.0"}
    monkeypatch.setattr(doctor, "package_version", packages.get)
    return packages


def status(found: doctor.Diagnosis, name: str) -> doctor.RunnerStatus:
    return next(r for r in found.runners if r.name == name)


def test_the_one_node_model_is_valid_onnx_and_doubles() -> None:
    import onnx
    import onnxruntime as ort

    model = onnx.load_from_string(doubling_model())
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    session = ort.InferenceSession(doubling_model(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.arange(4, dtype=np.float32)})[0].tolist() == [0, 2, 4, 6]


def test_this_machine_has_a_working_runner() -> None:
    assert doctor.probe_in_subprocess("onnxruntime-cpu") == (
        True,
        "ran a one-node model on CPUExecutionProvider",
    )


@pytest.mark.skipif(machine.package_version("onnxruntime-gpu") is not None, reason="the provider is here")
def test_a_missing_provider_is_named() -> None:
    ok, detail = doctor.probe_in_subprocess("onnxruntime-cuda")
    assert not ok
    assert "CUDAExecutionProvider" in detail


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import sys; print('libfoo.so is missing', file=sys.stderr); sys.exit(3)", "libfoo.so is missing"),
        ("print('not json')", "exit code 0"),
        ("print('[1]')", "exit code 0"),
    ],
    ids=["crash", "fail", "noise", "other-json"],
)
def test_a_runtime_that_breaks_is_a_finding(
    code: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run
    monkeypatch.setattr(doctor.subprocess, "run", lambda _c, **kw: real([sys.executable, "-c", code], **kw))
    ok, detail = doctor.probe_in_subprocess("onnxruntime-cpu")
    assert not ok
    assert expected in detail


def test_a_runtime_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(doctor.subprocess, "run", lambda _c, **kw: real(command, **kw))
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.3)
    ok, detail = doctor.probe_in_subprocess("onnxruntime-cpu")
    assert not ok
    assert "did not answer" in detail


def test_the_trial_does_not_import_from_the_current_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert doctor.probe_in_subprocess("onnxruntime-cpu")[0]


def test_nothing_installed(installed: dict[str, str]) -> None:
    installed.clear()
    found = doctor.diagnose(broken, HERE)
    assert not found.works
    assert status(found, "onnxruntime-cpu").hint == "pip install 'dijiang-export[cpu]'"
    assert status(found, "onnxruntime-cuda").hint is None  # no GPU: nothing to recommend
    export = found.abilities[0]
    assert not export.works
    hints = {need.name: need.hint for need in export.needs}
    assert "--index-url https://download.pytorch.org/whl/cpu" in str(hints["torch"])
    assert hints["onnx"] == "pip install 'dijiang-export[export]'"
    assert found.problems == ()


def test_a_gpu_without_its_runtime_is_told_how(installed: dict[str, str]) -> None:
    found = doctor.diagnose(works, replace(HERE, gpus=(GPU,)))
    cuda = status(found, "onnxruntime-cuda")
    assert not cuda.works
    assert cuda.hint == "pip uninstall -y onnxruntime && pip install 'dijiang-export[gpu]'"
    assert found.works


def test_a_gpu_with_its_runtime(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = installed.pop("onnxruntime")
    found = doctor.diagnose(works, replace(HERE, gpus=(GPU,)))
    assert status(found, "onnxruntime-cuda").works
    assert status(found, "onnxruntime-cpu").works  # the GPU build has the CPU provider too
    failed = doctor.diagnose(lambda n: (n.endswith("cpu"), "libcudnn is missing"), replace(HERE, gpus=(GPU,)))
    assert "cudnn" in str(status(failed, "onnxruntime-cuda").hint)
    assert failed.works
    assert "libcudnn is missing" in failed.problems[0].what


@pytest.mark.parametrize(("gpus", "extra"), [((), "cpu"), ((GPU,), "gpu")])
def test_both_builds_of_onnxruntime_are_a_conflict(
    gpus: tuple[machine.Gpu, ...], extra: str, installed: dict[str, str]
) -> None:
    installed["onnxruntime-gpu"] = "1.32.0"
    found = doctor.diagnose(works, replace(HERE, gpus=gpus))
    (problem,) = found.problems
    assert "both installed" in problem.what
    assert problem.hint.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && ")
    assert f"[{extra}]" in problem.hint


def test_an_installed_runtime_that_fails_is_a_problem(installed: dict[str, str]) -> None:
    found = doctor.diagnose(broken, HERE)
    assert not found.works
    assert found.problems[0].hint == "pip install --force-reinstall onnxruntime"


def test_an_old_package_is_not_enough(installed: dict[str, str]) -> None:
    installed["torch"] = "2.9.1"
    torch = next(n for n in doctor.diagnose(works, HERE).abilities[0].needs if n.name == "torch")
    assert (torch.version, torch.enough, torch.least) == ("2.9.1", False, "2.13")
    installed["torch"] = "2.13.0+cpu"
    torch = next(n for n in doctor.diagnose(works, HERE).abilities[0].needs if n.name == "torch")
    assert torch.enough
    assert torch.hint is None


def test_least_versions_come_from_the_package_itself() -> None:
    least = doctor.least_versions("export")
    assert set(least) == {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "scipy"}
    assert least["torch"] == "2.13"
    assert doctor.least_versions("nonsense") == {}


def test_gpus_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA H200, 143771, 570.1, 9.0\nOrin (nvgpu), [N/A], 540.4, [N/A]\n\nbroken line\n"
    monkeypatch.setattr(machine, "run_tool", lambda *a: lines)
    first, second = machine.find_gpus()
    assert first == machine.Gpu("NVIDIA H200", 143771 << 20, "570.1", "9.0")
    assert second == machine.Gpu("Orin (nvgpu)", None, "540.4", None)
    monkeypatch.setattr(machine, "run_tool", lambda *a: None)
    assert machine.find_gpus() == ()


def test_tools_that_are_absent_or_fail_are_none() -> None:
    assert machine.run_tool("no-such-program-here") is None
    assert machine.run_tool("false") is None
    assert machine.run_tool("echo", "x") == "x\n"


def test_this_machine_is_described() -> None:
    here = machine.describe_machine()
    assert 1 <= here.usable_cpus <= here.logical_cpus
    assert here.cpu
    assert here.memory_bytes is None or here.memory_bytes > 1 << 28


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "onnxruntime-cpu" in capfd.readouterr().out
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["works"] is True
    names = [r["name"] for r in data["runners"]]
    if "openvino-gpu" in names:  # where openvino is installed
        names.remove("openvino-gpu")
    assert names == ["onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-rtx", "openvino-cpu", "tensorrt"]
    assert [r["name"] for r in data["runtimes"]] == ["tensorrt", "tensorrt-rtx"]
    assert data["engines"] == []
    assert data["missing"] is None or data["machine"]["gpus"]


def test_the_command_fails_when_no_runner_works(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "probe_in_subprocess", broken)
    assert main(["doctor", "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["works"] is False
    assert json.loads(err)["error"]["what"] == "no runner works on this machine"


def test_doctor_imports_no_runtime() -> None:
    code = (
        "import sys; from dijiang_engines.doctor import diagnose; diagnose();"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'tensorrt', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
