"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support.fakes.tensorrt import FakeMachine
from support.makers import plugin_builds
from support.makers.engine_folders import SMALL, Made, Open, build
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
# Elsewhere hypothesis looks for new examples each time; CI must say the same about the same commit.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, ToyModel]:
    """A fresh toy bundle that a test may damage, and the model in it."""
    folder = tmp_path / "toy.bundle"
    return folder, make_bundle(folder)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, NumpyRunner]]:
    """export(**options of write_checkpoint) -> (bundle, oracle): really exported, once per set of options."""
    made: dict[str, tuple[Path, NumpyRunner]] = {}

    def export(**options: object) -> tuple[Path, NumpyRunner]:
        key = repr(sorted(options.items()))
        if key not in made:
            from support.makers.checkpoints import write_checkpoint

            from dijiang_export.checkpoint.checkpoint import open_checkpoint
            from dijiang_export.export.to_onnx import export_bundle

            folder = tmp_path_factory.mktemp("exported")
            export_options = {k: options.pop(k) for k in ("dtype", "logits", "extend_decay") if k in options}
            source = write_checkpoint(folder / "checkpoint", **options)  # type: ignore[arg-type]
            export_bundle(source, folder / "bundle", **export_options)  # type: ignore[arg-type]
            with open_checkpoint(source, extend_decay=bool(export_options.get("extend_decay"))) as checkpoint:
                weights = {k: v.numpy() for k, v in checkpoint.load_state_dict().items()}
                made[key] = folder / "bundle", NumpyRunner(checkpoint.spec, weights)
        return made[key]

    return export


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped sample checkpoint, exported. Read-only by convention.

    Where nothing can be exported: the copy that DIJIANG_SAMPLE_BUNDLE names.
    """
    if ABSENT and "DIJIANG_SAMPLE_BUNDLE" in os.environ:
        return Path(os.environ["DIJIANG_SAMPLE_BUNDLE"])
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.export.to_onnx import export_bundle

    return export_bundle(sample_checkpoint(), tmp_path_factory.mktemp("sample") / "tiny-stdlib.bundle").path


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped sample with the graphs for ONNX Runtime on CUDA too. Read-only by convention."""
    from dijiang_engines.shipped_sample import sample_checkpoint
    from dijiang_export.export.to_onnx import export_bundle

    folder = tmp_path_factory.mktemp("variants") / "b"
    return export_bundle(sample_checkpoint(), folder, variants=("ort", "capture")).path


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, exported: Callable[..., tuple[Path, NumpyRunner]]) -> Made:
    """made(version, recipe changes..., export=options) -> (engine, oracle, machine): built once each."""
    engines: dict[str, tuple[Path, NumpyRunner, FakeMachine]] = {}

    def make(version: str, export: dict[str, Any], **recipe: Any) -> tuple[Path, NumpyRunner, FakeMachine]:
        key = repr((version, sorted(export.items()), sorted(recipe.items())))
        if key not in engines:
            bundle, oracle = exported(**export)
            folder = tmp_path_factory.mktemp("engine")
            machine = FakeMachine(folder, tensorrt=version)
            build(machine, bundle, folder / "e", recipe=recipe, validate=False)
            engines[key] = folder / "e", oracle, machine
        return engines[key]

    return make


@pytest.fixture
def opened(made: Made, monkeypatch: pytest.MonkeyPatch) -> Open:
    """opened(version, **options): a runner in this process, and the oracle."""

    def load(
        version: str = "8.6.0", cuda_graph: bool = True, export: dict[str, Any] | None = None, **recipe: Any
    ) -> tuple[TensorRTRunner, NumpyRunner]:
        folder, oracle, machine = made(version, export or {}, **(SMALL | recipe))
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
