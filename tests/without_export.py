"""Tests where what only an export needs is not installed: on a device, and in `make test-pythons`.

A test, fixture or file that imports an absent one of these packages is skipped, and says which. Where all are
installed nothing of this has an effect. Hooks for conftest.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("torch", "transformers", "onnxscript", "scipy")
ABSENT = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def absent(error: BaseException | None) -> str | None:
    """The package of ABSENT that an import failed for, or None."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in ABSENT:
            return (error.name or "").split(".")[0]
        error = error.__cause__ or error.__context__
    return None


class Module(pytest.Module):
    """A test file that is skipped as a whole if it imports what is absent."""

    def collect(self) -> Any:
        try:
            return super().collect()
        except self.CollectError as error:
            if (name := absent(error)) is not None:
                pytest.skip(f"{name} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Test files as `Module`."""
    return Module.from_parent(parent, path=module_path) if ABSENT else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What failed for want of a package was not tested."""
    report = yield
    error = None if call.excinfo is None else call.excinfo.value
    if report.failed and (name := absent(error)) is not None:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {name} is not installed")
    return report
