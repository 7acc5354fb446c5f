"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_bundle import ToyModel, make_bundle


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, ToyModel]:
    """A fresh toy bundle that a test may damage, and the model in it."""
    folder = tmp_path / "toy.bundle"
    return folder, make_bundle(folder)
