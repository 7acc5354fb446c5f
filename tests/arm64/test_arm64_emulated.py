"""The package and the kernels' host side on arm64, under qemu: no GPU, no times, but Arm's instructions."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.arm64 import FOLDER, FORM, SYSTEM, Arm, need, one_at_a_time, python, whole
from support.paths import ROOT

from dijiang_engines.plugin.cache import KERNELS, BuiltPlugin
from dijiang_engines.version import __version__

PACKAGE = "/opt/dijiang"
COMMAND = ("python3", f"{PACKAGE}/bin/dijiang-export")
OURS = {"PYTHONPATH": PACKAGE}
PROMPT = ("--prompt", "def read_file(path):", "--seed", "3", "--temperature", "0.7", "--top-p", "0.9")
LEAN = "11.4.0.106"


@pytest.fixture(scope="module")
def bundle(arm: Arm) -> str:
    """The sample that `make demo` exported, copied into the arm64 system; its path there."""
    exported = ROOT / "build/demo/tiny-stdlib.bundle"
    need(None if exported.is_dir() else f"there is no {exported}: make demo exports it")
    with one_at_a_time("bundle"):
        if not (SYSTEM / "tiny-stdlib.bundle/manifest.json").is_file():
            shutil.copytree(exported, SYSTEM / "tiny-stdlib.bundle", symlinks=False)
    return "/tiny-stdlib.bundle"


def test_generate_writes_the_same_text(arm: Arm, bundle: str) -> None:
    count = "40" if FORM == "whole" else "12"
    got = arm.run(*COMMAND, "generate", bundle, *PROMPT, "--max-tokens", count, **OURS)
    here = python("-m", "dijiang_export", "generate", str(SYSTEM) + bundle, *PROMPT, "--max-tokens", count)
    assert len(got.split()) > 2
    assert got == here


def test_nvidias_registry_takes_no_other_library_for_the_plugin(arm: Arm) -> None:
    """TensorRT's real registry, as the engines ask for it; test_arm64_registry.py has the plugin in it.

    No `Runtime`: without a driver, this runtime for arm64 crashes when one is destroyed.
    """
    need(None if (FOLDER / "lean" / LEAN).is_dir() else "no lean runtime: .ci/fetch_arm64.py says why")
    other = next((SYSTEM / "opt/dijiang/numpy/random").glob("_bounded_integers*.so"))
    script = (
        "import sys; from pathlib import Path; import tensorrt_lean_bindings as trt\n"
        "from dijiang_engines.errors import PluginError\n"
        "from dijiang_engines.nvidia.tensorrt_library import load_plugin, tensorrt_version\n"
        "print(tensorrt_version(trt))\n"
        "try: load_plugin(trt, Path(sys.argv[1]))\n"
        "except PluginError as error: print(error.what)"
    )
    path = f"{PACKAGE}:/checkout/build/arm64/lean/{LEAN}"
    out = arm.run("python3", "-c", script, f"/{other.relative_to(SYSTEM)}", PYTHONPATH=path)
    version, refusal = out.splitlines()
    assert version == LEAN.rpartition(".")[0]
    assert refusal == "the plugin was opened, but did not register itself with this TensorRT"


def test_a_library_of_this_machine_is_named_there(arm: Arm) -> None:
    library = Path(sys.modules["_ctypes"].__file__ or "")
    need(None if library.is_file() else "this Python has _ctypes built in")
    shutil.copy(library, SYSTEM / "foreign.so")
    script = (
        "from pathlib import Path; from dijiang_engines.errors import KernelError\n"
        "from dijiang_engines.kernels.library import Library\n"
        "try: Library(Path('/foreign.so'))\n"
        "except KernelError as error: print(error)"
    )
    out = arm.run("python3", "-c", script, **OURS)
    assert "is compiled for another kind of processor" in out
    assert re.search(r"got: x86_64\n +expected: aarch64", out)


def test_the_kernels_host_side(arm: Arm, kernels: BuiltPlugin) -> None:
    """The tests of argument checks, sizes, plans and errors, on the library that was compiled for arm64.

    The short form leaves out those that try hundreds of sizes.
    """
    library = f"/checkout/{kernels.library(KERNELS).relative_to(ROOT)}"
    files = ["tests/kernels/test_kernels_host.py", "tests/kernels/test_linear_host.py"]
    many = "every_output_element or sizes_suffice or sample_plans_cover"
    chosen = [] if FORM == "whole" else ["-k", f"not ({many})"]
    out = arm.run(
        "python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", "/tmp/pytest", *chosen,
        *files,
        folder="/checkout", DIJIANG_KERNELS=library, PYTHONPATH=f"{PACKAGE}:/checkout/tests", CI="1",
    )  # fmt: skip
    counted = re.search(r"(\d+) passed", out)
    assert counted is not None, out
    assert int(counted[1]) >= 60
    for reason in re.findall(r"^SKIPPED .*?: (.*)$", out, re.MULTILINE):
        assert re.search(r"no gcc|no CUDA headers|'torch'", reason), reason


# In the whole form


@whole
def test_pip_installs_the_wheel(arm: Arm) -> None:
    """By an arm64 Python's own pip, into an environment; its command runs."""
    shutil.rmtree(SYSTEM / "venv", ignore_errors=True)
    arm.run("python3", "-m", "venv", "/venv")
    pip = ("/venv/bin/pip", "install", "--quiet", "--no-compile", "--no-index", "--find-links", "/wheels")
    arm.run(*pip, "dijiang-export[cpu]")
    assert arm.run("/venv/bin/dijiang-export", "--version").split()[-1] == __version__


@whole
def test_doctor_knows_the_machine(arm: Arm, kernels: BuiltPlugin) -> None:
    cache = SYSTEM / "tmp/.cache/dijiang-export/plugin"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(kernels.folder, cache / "copied")
    found = json.loads(arm.run(*COMMAND, "doctor", "--json", **OURS))
    assert found["machine"]["architecture"] == "aarch64"
    assert {"asimd", "asimdhp"} <= set(found["machine"]["cpu_features"])
    runners = {runner["name"]: runner["works"] for runner in found["runners"]}
    assert (runners["onnxruntime-cpu"], runners["tensorrt"]) == (True, False)
    (built,) = found["plugin"]["built"]
    assert (built["state"], built["machine"]) == ("current", "aarch64")


@whole
def test_validate_passes(arm: Arm, bundle: str) -> None:
    out = arm.run(*COMMAND, "validate", bundle, "--json", limit=1800, **OURS)
    found = json.loads(out)
    assert found["passed"] is True
    assert len(found["results"]) >= 12
