"""The wheels of TensorRT that `make bindings` fetched: which there are for this Python, and unpacked."""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

from support.paths import ROOT

VARIABLE = "DIJIANG_TENSORRT_BINDINGS"
"""A folder of wheels. Naming one says that the tests must run: what is missing then is a failure."""
REQUIRED = bool(os.environ.get(VARIABLE))
FOLDER = Path(os.environ[VARIABLE]) if REQUIRED else ROOT / "build/tensorrt-wheels"
PYTHON_TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


def wheels(pattern: str) -> list[Path]:
    """Those of a name with wildcards that fit this Python, oldest version first."""
    found = [p for p in FOLDER.glob(f"{pattern}-*.whl") if f"-{PYTHON_TAG}-" in p.name or "-py3-" in p.name]
    return sorted(found, key=lambda path: [int(n) for n in version_of(path).split(".") if n.isdigit()])


def version_of(path: Path) -> str:
    """Such as "10.13.3.9"."""
    found = re.search(r"-(\d[\d.]*\d)", path.name)
    return found[1] if found else path.name


def without(*needed: str) -> str | None:
    """Why tests that need these wheels cannot run here, or None."""
    missing = [name for name in needed if not wheels(name)]
    return (
        f"no wheel of {missing[0]} for {PYTHON_TAG} in {FOLDER}: `make bindings` fetches it"
        if missing
        else None
    )


def unpack(folder: Path, *paths: Path) -> Path:
    """Unpack wheels into a folder, whose path is given back; kept from run to run if it is there."""
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        for path in paths:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(part)
        try:
            part.rename(folder)
        except OSError:  # another process was quicker
            shutil.rmtree(part)
    return folder
