"""Tests where what only an export needs is not installed: on a device, and in `make test-pythons`.

A test, fixture or file that imports an absent one of these packages, or starts a process that does, is
skipped, and says which. An import on the engines' side is a failure all the same. Where all are installed
nothing of this has an effect. Hooks for conftest.py.
"""

from __future__ import annotations

import importlib.util
import re
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("torch", "transformers", "onnxscript", "scipy")
ENGINES = "/dijiang_engines/"
ABSENT = tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def absent(error: BaseException | None) -> str | None:
    """The package of ABSENT that an import failed for, or None.

    None too if it is the engines' side that imports it: that must run without.
    """
    while error is not None:
        name = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in ABSENT:
            frames = traceback.extract_tb(error.__traceback__)
            return None if any(ENGINES in frame.filename for frame in frames[-1:]) else name
        error = error.__cause__ or error.__context__
    return None


def absent_in(text: str) -> str | None:
    """The same of a process that the test started, from what it printed."""
    for name in ABSENT:
        said = rf"No module named '{name}[.']|needs the Python package {name}, which is not here"
        if (found := re.search(said, text)) is not None:
            files = re.findall(r'File "([^"]+)"', text[: found.start()])
            return None if any(ENGINES in file for file in files[-1:]) else name
    return None


def _imports(error: BaseException | None) -> bool:
    """Is an import among what led to this?"""
    while error is not None and not isinstance(error, ImportError):
        error = error.__cause__ or error.__context__
    return error is not None


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
    if not report.failed or not ABSENT:
        return report
    error = None if call.excinfo is None else call.excinfo.value
    printed = "\n".join([report.longreprtext, *(text for _, text in report.sections)])
    name = absent(error) if _imports(error) else absent_in(printed)
    if name is not None:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {name} is not installed")
    return report
