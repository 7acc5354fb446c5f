"""What works on this machine, what is missing, and how to get it.

Nothing heavy is imported: packages are looked up in their metadata, and a runtime is tried in a process of
its own on a model of one node, so that one which hangs or crashes is a finding and not the end.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.fresh_interpreter import command_for
from dijiang_engines.machine import (
    SPINNING_ENVIRONMENT,
    Machine,
    describe_machine,
    package_version,
    spinning_choice,
)
from dijiang_engines.nvidia.status import (
    EngineStatus,
    RuntimeStatus,
    engine_status,
    missing_command,
    runtime_status,
)
from dijiang_engines.plugin.status import PackageStatus, PluginStatus, plugin_needs, plugin_status
from dijiang_engines.runners.onnxruntime.rtx import PACKAGE as ORT_RTX
from dijiang_engines.runners.openvino.config import CPU as OPENVINO_CPU
from dijiang_engines.runners.openvino.config import DEVICES as OPENVINO
from dijiang_engines.runners.openvino.config import GPU as OPENVINO_GPU

PROBE_SECONDS = 120
TORCH_CPU = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
"""PyPI's own Linux wheels of torch bring gigabytes of CUDA."""

ORT_CPU, ORT_GPU = "onnxruntime", "onnxruntime-gpu"


@dataclass(frozen=True)
class RunnerStatus:
    """One runtime."""

    name: str
    """As for `--runner`."""
    works: bool
    version: str | None
    detail: str
    """What was tried and came out."""
    hint: str | None = None
    """What to do if it is wanted; None if it works, or cannot work here."""


@dataclass(frozen=True)
class Ability:
    """Something that the program does, with what it needs."""

    name: str
    works: bool
    needs: tuple[PackageStatus, ...]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong rather than absent."""

    what: str
    hint: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `doctor` prints."""

    version: str
    machine: Machine
    runners: tuple[RunnerStatus, ...]
    abilities: tuple[Ability, ...]
    plugin: PluginStatus
    problems: tuple[Problem, ...]
    runtimes: tuple[RuntimeStatus, ...]
    engines: tuple[EngineStatus, ...]
    """In the folder that was looked at."""
    missing: str | None
    """The one command that is missing before an engine runs on this machine's GPU."""

    @property
    def works(self) -> bool:
        """True if at least one runner works."""
        return any(runner.works for runner in self.runners)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"works": self.works, **asdict(self)}


Probe = Callable[[str], tuple[bool, str]]
"""Runtime name -> (it computed the right numbers, what it said)."""


def diagnose(probe: Probe | None = None, machine: Machine | None = None, folder: Path = Path()) -> Diagnosis:
    """Look at everything.

    Args:
        probe: tries a runtime; default: in a process of its own.
        machine: default: this one.
        folder: where to look for engines; default: the current one.
    """
    from dijiang_engines.version import __version__

    probe = probe or probe_in_subprocess
    machine = machine or describe_machine()
    runtimes = runtime_status(machine)
    runners = (
        _ort_cpu(probe), _ort_cuda(probe, machine), _ort_rtx(probe, machine), *_openvino(probe),
        _tensorrt(runtimes),
    )  # fmt: skip
    plugin = plugin_status(machine)
    engines = engine_status(machine, runtimes, folder)
    return Diagnosis(
        version=__version__,
        machine=machine,
        runners=runners,
        abilities=_abilities(),
        plugin=plugin,
        problems=_problems(machine, runners, plugin, runtimes),
        runtimes=runtimes,
        engines=engines,
        missing=missing_command(machine, runtimes, engines, plugin.hint),
    )


# -- runtimes ------------------------------------------------------------------------------------------


def _ort_cpu(probe: Probe) -> RunnerStatus:
    name = "onnxruntime-cpu"
    version = package_version(ORT_CPU) or package_version(ORT_GPU)
    if version is None:
        return RunnerStatus(name, False, None, "not installed", "pip install 'dijiang-export[cpu]'")
    works, detail = probe(name)
    if os.environ.get(SPINNING_ENVIRONMENT):
        detail += f"; {SPINNING_ENVIRONMENT}={os.environ[SPINNING_ENVIRONMENT][:40]}"
    package = ORT_CPU if package_version(ORT_CPU) else ORT_GPU
    hint = None if works else f"pip install --force-reinstall {package}"
    return RunnerStatus(name, works, version, detail, hint)


def _ort_cuda(probe: Probe, machine: Machine) -> RunnerStatus:
    name = "onnxruntime-cuda"
    version = package_version(ORT_GPU)
    if not machine.gpus and version is None:
        return RunnerStatus(name, False, None, "no NVIDIA GPU was found (nvidia-smi)")
    if version is None:
        first = "pip uninstall -y onnxruntime && " if package_version(ORT_CPU) else ""
        return RunnerStatus(name, False, None, "not installed", f"{first}pip install 'dijiang-export[gpu]'")
    works, detail = probe(name)
    if works:
        return RunnerStatus(name, True, version, detail)
    if not machine.gpus:
        hint = "install NVIDIA's driver; `nvidia-smi` must list the GPU"
    else:
        hint = "pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA's and cuDNN's libraries"
    return RunnerStatus(name, False, version, detail, hint)


def _ort_rtx(probe: Probe, machine: Machine) -> RunnerStatus:
    name = "onnxruntime-rtx"
    version = package_version(ORT_RTX)
    if version is None:
        return RunnerStatus(name, False, None, "not installed", None)
    works, detail = probe(name)
    if works or not machine.gpus:
        return RunnerStatus(name, works, version, detail)
    hint = f"pip install --upgrade 'onnxruntime>=1.24' {ORT_RTX}; it needs NVIDIA's driver 580 or newer"
    return RunnerStatus(name, False, version, detail, hint)


def _openvino(probe: Probe) -> list[RunnerStatus]:
    version = package_version("openvino")
    if version is None:
        missing = "pip install 'dijiang-export[openvino]'"
        return [RunnerStatus(OPENVINO_CPU, False, None, "not installed", missing)]
    works, detail = probe(OPENVINO_CPU)
    hint = None if works else "pip install --force-reinstall openvino"
    graphics = probe(OPENVINO_GPU)
    return [
        RunnerStatus(OPENVINO_CPU, works, version, detail, hint),
        RunnerStatus(OPENVINO_GPU, graphics[0], version, graphics[1]),
    ]


def _tensorrt(runtimes: Sequence[RuntimeStatus]) -> RunnerStatus:
    """The runner of engines, whichever runtime made them."""
    installed = [runtime for runtime in runtimes if runtime.version is not None]
    if not installed:
        hint = next((runtime.hint for runtime in runtimes if runtime.hint), None)
        return RunnerStatus("tensorrt", False, None, "not installed", hint)
    running = [runtime for runtime in installed if runtime.runs]
    shown = running or installed
    versions = ", ".join(f"{runtime.title} {runtime.version}" for runtime in shown)
    hint = None if running else next((runtime.hint for runtime in shown if runtime.hint), None)
    return RunnerStatus("tensorrt", bool(running), versions, "; ".join(r.detail for r in shown), hint)


def probe_in_subprocess(name: str) -> tuple[bool, str]:
    """Try a runtime in a fresh interpreter; whether it works, and a line about it."""
    if name in OPENVINO:
        command = command_for("dijiang_engines.runners.openvino.trial", name)
    else:
        command = command_for("dijiang_engines.runners.onnxruntime.trial", name)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"did not answer within {PROBE_SECONDS} s"
    except OSError as error:
        return False, f"could not be started: {error}"
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
        return bool(said["works"]), str(said["detail"])
    except (ValueError, LookupError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        return False, f"the trial ended with {ended}: {last[:300]}"


# -- what the other commands need ----------------------------------------------------------------------


def _abilities() -> tuple[Ability, ...]:
    least = least_versions("export")
    needs = tuple(_package(name, least.get(name)) for name in least)
    export = Ability("convert and to-onnx", bool(needs) and all(n.enough for n in needs), needs)
    return export, _plugin_ability()


def _plugin_ability() -> Ability:
    needs = plugin_needs()
    return Ability("compile the kernels and the TensorRT plugin", all(n.enough for n in needs), needs)


def least_versions(extra: str) -> dict[str, str]:
    """Package -> least version that an extra of this project asks for, from its installed metadata."""
    try:
        requirements = importlib.metadata.requires("dijiang-export") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+).*extra\s*==\s*['\"]([a-z]+)['\"]", line)
        if match and match[3] == extra:
            found[match[1]] = match[2]
    return found


def _package(name: str, least: str | None) -> PackageStatus:
    version = package_version(name)
    enough = version is not None and (least is None or _numbers(version) >= _numbers(least))
    hint = None
    if not enough:
        hint = "pip install 'dijiang-export[export]'"
        if name == "torch":
            hint = f"{TORCH_CPU}  (before the rest; this is the CPU build)"
    return PackageStatus(name, version, enough, least, hint)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _problems(
    machine: Machine,
    runners: tuple[RunnerStatus, ...],
    plugin: PluginStatus,
    runtimes: tuple[RuntimeStatus, ...],
) -> tuple[Problem, ...]:
    problems = [
        Problem(f"{runtime.title} {runtime.version}: {runtime.detail}", runtime.hint or "")
        for runtime in runtimes
        if runtime.broken
    ]
    if package_version(ORT_CPU) and package_version(ORT_GPU):
        wanted = "gpu" if machine.gpus else "cpu"
        problems.append(
            Problem(
                "onnxruntime and onnxruntime-gpu are both installed: they own the same module, and whichever "
                "came last wins",
                f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'dijiang-export[{wanted}]'",
            )
        )
    for runner in runners:
        if runner.version is None or runner.works or runner.hint is None:
            continue
        if not any(problem.hint == runner.hint for problem in problems):
            problems.append(Problem(f"{runner.name} {runner.version}: {runner.detail}", runner.hint))
    try:
        spinning_choice(None)
    except UsageError as error:
        problems.append(Problem(error.what, f"set it to one of {error.expected}, or unset it"))
    for built in plugin.built:
        if built.state == "damaged":
            what = f"the build in {built.folder} is damaged: {built.detail}"
            problems.append(Problem(what, "dijiang-export build-plugin --force"))
    return tuple(problems)
