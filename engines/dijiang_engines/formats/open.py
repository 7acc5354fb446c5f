"""What generate, validate and bench run: a bundle or an engine, opened by what its folder holds."""

from __future__ import annotations

from pathlib import Path

from dijiang_engines.formats.bundle import Bundle, open_bundle
from dijiang_engines.formats.engine import ENGINE_MANIFEST, EngineFolder, open_engine

Model = Bundle | EngineFolder
"""Both have path, name, spec, dtype, logits, all_logits, identity, tokenizer_path, reference_path, cases,
opened and reference()."""


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
