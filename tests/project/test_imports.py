"""What runs without PyTorch: an edge device installs this package and never has it.

Each test starts a fresh Python in which the export side's packages cannot be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.makers.toy_bundle import ToyModel

from dijiang_export.cli import COMMANDS

EXPORT_ONLY = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "scipy",
    "dijiang_export.export.to_onnx",
)
RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "polygraphy", "cuda")

ALL_ENGINE_MODULES = """
import importlib, pkgutil, dijiang_engines
names = [m.name for m in pkgutil.walk_packages(dijiang_engines.__path__, "dijiang_engines.")]
assert len(names) > 10, names
for name in names:
    importlib.import_module(name)
"""


def run_without(
    blocked: tuple[str, ...], code: str, *arguments: str, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python in which importing any of `blocked` fails as if it were not installed."""
    block = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", block + code, *arguments],
        capture_output=True, text=True, cwd=cwd, input=stdin, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


MAIN = "from dijiang_export.cli import main\nsys.exit(main())"


def test_the_block_blocks() -> None:
    done = run_without(EXPORT_ONLY, "import torch")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_every_engine_module_imports_without_any_runtime() -> None:
    done = run_without(EXPORT_ONLY + RUNTIMES, ALL_ENGINE_MODULES)
    assert done.returncode == 0, done.stderr


def test_the_engines_never_ask_for_the_export_side() -> None:
    """Not even where it is installed: nothing of it may be in memory after importing everything."""
    check = "print([n for n in sys.modules if n.split('.')[0] in {'torch', 'transformers', 'onnx', 'scipy',"
    check += " 'onnxscript', 'onnx_ir', 'dijiang_export'}])"
    done = run_without((), ALL_ENGINE_MODULES + check)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str) -> None:
    done = run_without(EXPORT_ONLY + RUNTIMES, MAIN, name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: dijiang-export" in done.stdout


def test_generate(toy: tuple[Path, ToyModel]) -> None:
    done = run_without(EXPORT_ONLY, MAIN, "generate", str(toy[0]), "--prompt", "ab", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr


def test_build_engine_says_what_is_missing_and_leaves_nothing(
    toy: tuple[Path, ToyModel], tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run_without(EXPORT_ONLY + RUNTIMES, MAIN, "build-engine", str(toy[0]), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the Python package cuda-bindings is not installed")
    assert "pip install 'dijiang-export[tensorrt]'" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_engines_are_opened_without_tensorrt_and_say_what_is_missing(tmp_path: Path) -> None:
    """What is wrong with a folder is said on any machine; what a machine lacks, once the folder is right."""
    from support.makers.engine_folders import write_engine

    engine = write_engine(tmp_path / "toy.engine")
    code = (
        "from dijiang_engines.formats.open import open_model\n"
        "print(open_model(sys.argv[1]).profiles.max_batch)"
    )
    done = run_without(EXPORT_ONLY + RUNTIMES, code, str(engine))
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr
    done = run_without(EXPORT_ONLY + RUNTIMES, MAIN, "bench", str(engine))
    assert done.returncode == 1
    assert "cuda-bindings is not installed" in done.stderr and "Traceback" not in done.stderr


def test_validate(sample_bundle: Path) -> None:
    done = run_without(EXPORT_ONLY, MAIN, "--json", "validate", str(sample_bundle))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_inspect(toy: tuple[Path, ToyModel]) -> None:
    done = run_without(EXPORT_ONLY, MAIN, "inspect", str(toy[0]))
    assert done.returncode == 0, done.stderr


def test_doctor_runs_and_says_that_torch_is_missing() -> None:
    done = run_without(EXPORT_ONLY + RUNTIMES, MAIN, "doctor")
    assert "internal error" not in done.stderr
    assert "torch" in done.stdout


def test_to_onnx_says_what_is_missing_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    done = run_without(EXPORT_ONLY[:-1], MAIN, "to-onnx", "checkpoint", "new.bundle", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this needs the Python package ")
    assert "pip install 'dijiang-export[export]'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_generate_says_how_to_get_a_runtime(toy: tuple[Path, ToyModel]) -> None:
    done = run_without(EXPORT_ONLY + RUNTIMES, MAIN, "generate", str(toy[0]), "--prompt", "ab")
    assert done.returncode == 1
    assert "onnxruntime" in done.stderr
    assert "dijiang-export[cpu]" in done.stderr
