"""Builds of the plugin in a cache, as `build-plugin` leaves them, of files that are no libraries."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from dijiang_engines.plugin import cache as plugin_cache
from dijiang_engines.plugin.cache import KERNELS
from dijiang_engines.version import __version__


def make_build(cache: Path, name: str, **changes: Any) -> Path:
    """A build as `build-plugin` leaves it; `changes` to its facts."""
    folder = cache / name
    folder.mkdir(parents=True)
    tensorrt = changes.get("tensorrt", "10.13.3")
    libraries = [KERNELS] + ([plugin_cache.tensorrt_name(int(tensorrt.split(".")[0]))] if tensorrt else [])
    for library in libraries:
        (folder / library).write_text(f"{name} {library}")
    facts = {
        "version": __version__, "sources": plugin_cache.source_hash(), "cuda": "13.0",
        "machine": platform.machine(), "architectures": ["sm_90", "compute_90"], "tensorrt": tensorrt,
        "made": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    plugin_cache.write_manifest(folder, facts | changes, libraries)
    return folder
