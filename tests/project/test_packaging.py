"""The wheel: what is in it, what it asks for, and that it works where no checkout is."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from support.makers.plugin_builds import needs_nvcc
from support.paths import ROOT

from dijiang_engines.plugin.cache import plugin_sources, source_files, source_hash
from dijiang_engines.version import __version__

SAMPLE = "dijiang_engines/samples/tiny-stdlib"


def build(target: str, folder: Path) -> Path:
    """Build the wheel or sdist of this checkout into `folder`, with the backend that is installed here."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"dijiang_export-{__version__}.dist-info/METADATA").decode()
    return Parser().parsestr(text)


def test_it_is_pure_python(wheel: Path) -> None:
    assert wheel.name == f"dijiang_export-{__version__}-py3-none-any.whl"


def test_it_holds_every_module_and_nothing_else(names: set[str]) -> None:
    for package in (ROOT / "exporter/dijiang_export", ROOT / "engines/dijiang_engines"):
        sources = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
        assert sources <= names
        assert f"{package.name}/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dijiang_export", "dijiang_engines", f"dijiang_export-{__version__}.dist-info"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert f"dijiang_export-{__version__}.dist-info/licenses/LICENSE" in names


def test_it_brings_the_sample_model(wheel: Path, names: set[str], tmp_path: Path) -> None:
    sample = ROOT / "samples/tiny-stdlib"
    expected = {f"{SAMPLE}/{path.name}" for path in sample.iterdir()}
    assert {f"{SAMPLE}/config.json", f"{SAMPLE}/model.safetensors", f"{SAMPLE}/tokenizer.json"} <= expected
    assert {name for name in names if name.startswith(SAMPLE)} == expected
    assert wheel.stat().st_size < 12e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from dijiang_engines.shipped_sample import sample_checkpoint as s; print(s())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / SAMPLE


def test_it_brings_recipes_and_the_report_s_style(wheel: Path, names: set[str], tmp_path: Path) -> None:
    """Data beside the code: an installed package builds engines and writes reports without a checkout."""
    package = ROOT / "engines/dijiang_engines"
    wanted = {path.relative_to(package.parent).as_posix() for path in package.glob("building/recipes/*.toml")}
    assert len(wanted) >= 4
    assert wanted | {"dijiang_engines/validation/report/report.css"} <= names
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "from dijiang_engines.building import recipes\n"
        "print(recipes.__file__, *(recipes.load_recipe(name).name for name in recipes.recipe_names()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    module, *found = done.stdout.split()
    assert Path(module).is_relative_to(tmp_path)
    assert found == sorted(Path(name).stem for name in wanted)


SOURCES = "dijiang_engines/plugin_sources/"


def test_it_brings_the_sources_of_the_plugin_and_no_product_of_it(names: set[str]) -> None:
    shipped = {name.removeprefix(SOURCES) for name in names if name.startswith(SOURCES)}
    wanted = {path.relative_to(plugin_sources()).as_posix() for path in source_files()}
    assert {"CMakeLists.txt", "kernels/attention/api.cpp", "tensorrt/v3/plugin.h"} <= wanted
    assert shipped == wanted


@needs_nvcc
def test_an_installed_package_can_compile_the_plugin(wheel: Path, tmp_path: Path) -> None:
    """Up to the compiler's first call: that the rest compiles, test_plugin_compile.py shows."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from dijiang_engines.plugin import cache as p; print(p.plugin_sources(), p.source_hash())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    folder, digest = done.stdout.split()
    assert Path(folder) == tmp_path / "site" / SOURCES
    assert digest == source_hash()
    done = subprocess.run(
        ["cmake", "-S", folder, "-B", tmp_path / "b", "-DCMAKE_CUDA_ARCHITECTURES=90"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"CMAKE_PROJECT_VERSION:STATIC={__version__}" in (tmp_path / "b/CMakeCache.txt").read_text()


def test_it_declares_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"dijiang_export-{__version__}.dist-info/entry_points.txt").decode()
    assert "dijiang-export = dijiang_export.cli:main" in text


def test_the_core_asks_only_for_what_an_edge_device_needs(metadata: Message) -> None:
    wanted: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist") or []:
        requirement, _, condition = line.partition(";")
        extra = condition.partition("extra == ")[2].strip("'\" ")
        name = requirement.strip().split(">")[0].split("<")[0].strip()
        wanted.setdefault(extra, set()).add(name)
    assert wanted.pop("") == {"numpy", "click", "rich", "safetensors", "tokenizers", "tomli"}
    assert {"torch", "transformers", "onnx", "onnxscript"} <= wanted["export"]
    assert wanted["cpu"] == {"onnxruntime"}
    assert wanted["gpu"] == {"onnxruntime-gpu"}
    assert wanted["tensorrt"] == {"tensorrt", "polygraphy", "cuda-bindings"}
    assert wanted["rtx"] == {"tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "cuda-bindings"}
    assert wanted["guided"] == {"llguidance"}
    assert {"pytest", "ruff", "mypy"} <= wanted["dev"]
    extras = "export cpu gpu tensorrt rtx openvino serve guided bench dev"
    assert set(wanted) == set(extras.split())


def test_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "DiJiang" in metadata["Summary"]


def test_the_source_archive_can_be_built_and_tested(tmp_path: Path) -> None:
    made = build("sdist", tmp_path)
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"Makefile", "constraints.txt", ".ci/setup_venv.py", ".ci/run", "pyproject.toml", "LICENSE"}
    assert wanted <= names
    assert {
        "tests/project/test_packaging.py",
        "samples/tiny-stdlib/config.json",
        "docs/architecture.md",
    } <= names
    assert {"plugins/CMakeLists.txt", "plugins/kernels/attention/api.cpp", ".ci/plugin_headers.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".a", ".ptxas"))]


def test_every_installed_version_is_pinned() -> None:
    """What is installed to run these tests is what constraints.txt says, if `make` installed it."""
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert len({pin.name for pin in here}) == len(here)
    seen, waiting = set(), [("dijiang-export", {"export", "cpu", "dev"})]
    while waiting:
        name, extras = waiting.pop()
        seen.add(name.lower().replace("_", "-"))
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            contexts = [{"extra": extra} for extra in (extras or {""})]
            wanted = needed.marker is None or any(needed.marker.evaluate(c) for c in contexts)
            if wanted and needed.name.lower().replace("_", "-") not in seen:
                waiting.append((needed.name, needed.extras))
    gpu = ("nvidia-", "cuda-", "triton")  # torch pins what its CUDA build brings
    pinned = {pin.name.lower().replace("_", "-") for pin in here}
    missing = {name for name in seen - pinned - {"dijiang-export"} if not name.startswith(gpu)}
    assert missing == set()
