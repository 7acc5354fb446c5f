"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support.fakes.tensorrt import FakeMachine
from support.makers import plugin_builds
from support.makers.checkpoints import RandomCheckpoint, neox
from support.makers.engine_folders import SMALL, Exported, Made, Open, build
from support.makers.toy_bundle import ToyModel, make_bundle
from support.oracles.numpy_runner import NumpyRunner
from support.without_export import (  # noqa: F401 - hooks
    ABSENT,
    pytest_pycollect_makemodule,
    pytest_runtest_makereport,
)

from dijiang_engines.formats.engine import open_engine
from dijiang_engines.runners import open_runner
from dijiang_engines.runners.tensorrt.runner import TensorRTRunner

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; tables are to be as wide as in a file
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so of a shell's background jobs and all that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt processes
# A machine that does other things is slow, and no test is wrong for that.
hypothesis.settings.register_profile(
    "any", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any")
# Elsewhere hypothesis looks for new examples each time; CI must say the same about the same commit.
if os.environ.get("CI"):
    hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("any"), derandomize=True)
    hypothesis.settings.load_profile("ci")


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, ToyModel]:
    """A fresh toy bundle that a test may damage, and the model in it."""
    folder = tmp_path / "toy.bundle"
    return folder, make_bundle(folder)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make) -> a folder that make(folder) filled, in one process for all workers of this run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / hashlib.sha256(name.encode()).hexdigest()[:20]
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                part = folder.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)  # of a maker that failed
                part.mkdir()
                make(part)
                part.rename(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def exported(once: Once) -> Exported:
    """export(checkpoint, **options of export_bundle) -> (bundle, oracle): really exported, once each."""
    made: dict[str, tuple[Path, NumpyRunner]] = {}

    def export(model: RandomCheckpoint | None = None, **options: Any) -> tuple[Path, NumpyRunner]:
        model, options = model or neox(), {"dtype": "float32"} | options
        key = repr((model, sorted(options.items())))
        if key not in made:
            from dijiang_export.checkpoint.checkpoint import open_checkpoint
            from dijiang_export.export.to_onnx import export_bundle

            def make(folder: Path) -> None:
                export_bundle(model.save(folder / "checkpoint"), folder / "bundle", **options)

            folder, extend = once(key, make), options.get("extend_decay", False)
            with open_checkpoint(folder / "checkpoint", extend_decay=extend) as checkpoint:
                weights = {k: v.numpy() for k, v in checkpoint.load_state_dict().items()}
                made[key] = folder / "bundle", NumpyRunner(checkpoint.spec, weights)
        return made[key]

    return export


@pytest.fixture(scope="session")
def sample_bundle(once: Once) -> Path:
    """The shipped sample checkpoint, exported. Read-only by convention.

    Where nothing can be exported: the copy that DIJIANG_SAMPLE_BUNDLE names.
    """
    if ABSENT and "DIJIANG_SAMPLE_BUNDLE" in os.environ:
        return Path(os.environ["DIJIANG_SAMPLE_BUNDLE"])
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.export.to_onnx import export_bundle

    name = "tiny-stdlib.bundle"
    return once(name, lambda folder: export_bundle(sample_checkpoint(), folder / name)) / name


@pytest.fixture(scope="session")
def variants(once: Once) -> Path:
    """The shipped sample with the graphs for ONNX Runtime on CUDA too. Read-only by convention."""
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.export.to_onnx import export_bundle

    def make(folder: Path) -> None:
        export_bundle(sample_checkpoint(), folder / "b", variants=("ort", "capture"))

    return once("variants", make) / "b"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, exported: Exported) -> Made:
    """made(version, recipe changes..., model=, export=) -> (engine, oracle, machine): built once each."""
    engines: dict[str, tuple[Path, NumpyRunner, FakeMachine]] = {}

    def make(
        version: str,
        model: RandomCheckpoint | None = None,
        export: dict[str, Any] | None = None,
        **recipe: Any,
    ) -> tuple[Path, NumpyRunner, FakeMachine]:
        key = repr((version, model, export, sorted(recipe.items())))
        if key not in engines:
            bundle, oracle = exported(model, **(export or {}))
            folder = tmp_path_factory.mktemp("engine")
            machine = FakeMachine(folder, tensorrt=version)
            build(machine, bundle, folder / "e", recipe=recipe, validate=False)
            engines[key] = folder / "e", oracle, machine
        return engines[key]

    return make


@pytest.fixture
def opened(made: Made, monkeypatch: pytest.MonkeyPatch) -> Open:
    """opened(version, options of `made`...): a runner in this process, and the oracle."""

    def load(
        version: str = "8.6.0", cuda_graph: bool = True, **options: Any
    ) -> tuple[TensorRTRunner, NumpyRunner]:
        folder, oracle, machine = made(version, **(SMALL | options))
        machine.enter(monkeypatch)
        runner = open_runner(open_engine(folder), cuda_graph=cuda_graph)
        assert isinstance(runner, TensorRTRunner)
        return runner, oracle

    return load


@pytest.fixture(scope="session")
def kernels_library() -> Path:
    """libdijiang_kernels.so of this checkout, compiled if need be (plugin_builds.py says how to choose)."""
    return plugin_builds.kernels()


@pytest.fixture(scope="session")
def engine() -> Any:
    """The CUDA kernels (kernel_engine.CudaEngine); tests that use it skip where there are none."""
    from support.makers.kernel_engine import CudaEngine, find_library

    library, missing = find_library()
    assert library is not None, missing
    return CudaEngine(library)


@pytest.fixture
def the_gpu_is_kept() -> Iterator[None]:
    """After an illegal access every later call fails: end this process, rather than blame the other tests."""
    import torch

    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the CUDA context is lost: {error}", flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)  # xdist reports the test as crashed and starts another worker
        pytest.exit(f"the CUDA context is lost: {error}", 3)
