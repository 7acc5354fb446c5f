"""Every runner there is, for what all of them must do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes.runner import ToyRunner
from support.makers.toy_bundle import SPEC, ToyModel
from support.openvino_runner import openvino_runner
from support.oracles.numpy_runner import NumpyRunner, random_parameters

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.runners import Runner, open_runner


@pytest.fixture(params=["onnxruntime", "openvino", "tensorrt", "numpy", "toy"])
def runner(request: pytest.FixtureRequest, toy: tuple[Path, ToyModel]) -> Iterator[Runner]:
    made: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: open_runner(open_bundle(toy[0]), "cpu", threads=1),
        "openvino": lambda: openvino_runner(toy[0]),
        "tensorrt": lambda: request.getfixturevalue("opened")()[0],  # on a fake machine
        "numpy": lambda: NumpyRunner(SPEC, random_parameters(SPEC)),
        "toy": lambda: ToyRunner(toy[1]),
    }
    yield made[request.param]()
    if request.param == "tensorrt":
        # Errors that a test kept hold their runner, which must not free what the next one allocates.
        gc.collect()
