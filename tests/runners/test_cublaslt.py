"""Where cuBLASLt comes from: the process, the linker, or a wheel; asked of the kernels' library itself.

In processes of their own, since what is loaded stays, and the library looks once. The wheel is made here;
in it is the stand-in of plugins/tests/emulator/cublaslt.cpp, which has the functions that are looked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.linear_emulator import compiled
from support.paths import ROOT

from dijiang_engines.runners.tensorrt import cublaslt
from dijiang_engines.runners.tensorrt.cublaslt import NAMES

SCRIPT = """
import ctypes, json, os, sys
from pathlib import Path
from dijiang_engines.runners.tensorrt import cublaslt
kept = [ctypes.CDLL(path) for path in os.environ.get("LOADED_BEFORE", "").split(":") if path]
loaded = cublaslt.load_from_wheels()
again = cublaslt.load_from_wheels()
print(json.dumps([str(loaded), str(again), cublaslt.missing(Path(sys.argv[1]))]))
"""


def ask(library: Path, site: Path, script: str = SCRIPT, **variables: str) -> Any:
    """What was loaded, what a second time, and what is missing."""
    variables["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT / "engines")])
    command = [sys.executable, "-c", script, str(library)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the wheel nvidia-cublas is installed."""
    if any(map(cublaslt._loads, NAMES)):
        pytest.skip("this machine has cuBLASLt where the linker finds it")
    site = tmp_path_factory.mktemp("site")
    (site / "nvidia/cu13/lib").mkdir(parents=True)
    about = site / "nvidia_cublas-13.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cublas\nVersion: 13.0.0\n")
    names = ("libcublas.so.13", "libcublasLt.so.13")
    (about / "RECORD").write_text("".join(f"nvidia/cu13/lib/{name},,\n" for name in names))
    target = site / "nvidia/cu13/lib/libcublasLt.so.13"
    compiled(target, ("tests/emulator/cublaslt.cpp",), f"-Xlinker=-soname={target.name}")
    return site


def test_a_wheel_s_library_is_found_by_the_kernels(wheel: Path, kernels_library: Path) -> None:
    path = str(wheel / "nvidia/cu13/lib/libcublasLt.so.13")
    assert ask(kernels_library, wheel) == [path, "None", None]


def test_without_one_it_is_said(wheel: Path, kernels_library: Path, tmp_path: Path) -> None:
    loaded, _, said = ask(kernels_library, tmp_path)
    assert loaded == "None"
    assert said.startswith("prompts are read several times slower than they could be: ")
    assert "libcublasLt.so.13: " in said and "pip install nvidia-cublas" in said


def test_what_the_environment_says_counts(wheel: Path, kernels_library: Path) -> None:
    loaded, _, said = ask(kernels_library, wheel, DIJIANG_CUBLASLT="none")
    assert loaded == "None" and "DIJIANG_CUBLASLT is none" in said
    path = str(wheel / "nvidia/cu13/lib/libcublasLt.so.13")
    assert ask(kernels_library, wheel, DIJIANG_CUBLASLT=path) == ["None", "None", None]


def test_what_the_process_has_comes_first(wheel: Path, kernels_library: Path, tmp_path: Path) -> None:
    """An older one that TensorRT brought, though the linker knows a newer one: as the plugin chooses."""
    older = tmp_path / "libcublasLt.so.12"
    compiled(older, ("tests/emulator/cublaslt.cpp",), f"-Xlinker=-soname={older.name}")
    linker = {"LD_LIBRARY_PATH": str(wheel / "nvidia/cu13/lib"), "LOADED_BEFORE": str(older)}
    script = SCRIPT.replace("print(", "mapped = Path('/proc/self/maps').read_text()\nprint(").replace(
        "cublaslt.missing(Path(sys.argv[1]))", "'.so.12' in mapped, '.so.13' in mapped"
    )
    assert ask(kernels_library, wheel, script, **linker) == ["None", "None", True, False]


def test_a_wheel_whose_library_does_not_load(wheel: Path, kernels_library: Path, tmp_path: Path) -> None:
    """Or is not there at all, as its list of files says."""
    broken = tmp_path / "nvidia_cublas_cu12-12.0.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cublas-cu12\nVersion: 12.0.0\n")
    (broken / "RECORD").write_text("nvidia/cublas/lib/libcublasLt.so.12,,\n")
    loaded, _, said = ask(kernels_library, tmp_path)
    assert loaded == "None" and said is not None


@pytest.mark.parametrize(
    ("products", "wanted"),
    [(None, False), ({"launches": 0, "products": 0, "left": 6}, False), ({"launches": 4}, True)],
)
def test_engines_that_want_it(products: Any, wanted: bool) -> None:
    plans = [
        {"file": "prefill.plan", "plugin_products": products},
        {"file": "step.plan", "plugin_products": {"launches": 2}},
    ]
    engine: Any = SimpleNamespace(
        manifest={"made_with": {"plans": plans}}, prefill=SimpleNamespace(file="prefill.plan")
    )
    assert cublaslt.is_wanted(engine) is wanted
    engine.manifest = {"made_with": {}}
    assert not cublaslt.is_wanted(engine)
