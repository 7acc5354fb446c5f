"""What generate, validate and bench run: a bundle or an engine, opened by what its folder holds."""

from __future__ import annotations

from pathlib import Path

from dijiang_engines.formats.bundle import open_bundle
from dijiang_engines.formats.engine import open_engine
from dijiang_engines.formats.file_table import ENGINE_MANIFEST
from dijiang_engines.formats.folder import Model

__all__ = ["Model", "open_model"]


def open_model(path: str | Path, *, verify: bool = True) -> Model:
    """Open an engine folder (engine.json) or a bundle (manifest.json) and check it.

    Args:
        path: the folder.
        verify: also hash the large files: weights.data, or the plans.

    Raises:
        BundleError: there is neither, or it is incomplete, corrupt, of another version or unsafe.
    """
    if (Path(path) / ENGINE_MANIFEST).exists():
        return open_engine(path, verify=verify)
    return open_bundle(path, verify=verify)
