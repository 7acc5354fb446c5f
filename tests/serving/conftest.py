"""A server of the shipped sample, shared by a file's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.runners import Runner, open_runner


@pytest.fixture(scope="module")
def model(sample_bundle: Path) -> Bundle:
    return open_bundle(sample_bundle)


@pytest.fixture(scope="module")
def runner(model: Bundle) -> Runner:
    return open_runner(model, "cpu", threads=1, spinning="off")


@pytest.fixture(scope="module")
def port(model: Bundle, runner: Runner) -> Iterator[int]:
    from support.server import serving

    with serving(model, runner) as running:
        yield running.port
