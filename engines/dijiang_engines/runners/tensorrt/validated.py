"""Whether an engine that was built without a GPU has been validated on the one that is here.

`engine.json` says what was validated when the engine was built. What a device found later is kept in its
user's cache folder, by the engine's hash and the GPU: an engine may lie on a disk that cannot be written to.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.nvidia.cuda import DeviceFacts
from dijiang_engines.plugin.cache import cache_folder


def is_validated(engine: EngineFolder, gpu: DeviceFacts) -> bool:
    """When it was built, or by `validate` on this GPU with this driver."""
    return engine.manifest.get("validated") is not None or _mark(engine, gpu).exists()


def not_validated(engine: EngineFolder) -> str:
    """What to tell whoever runs it."""
    return (
        f"{engine.path} was built, not validated: run `dijiang-export validate {engine.path}` on this device"
    )


def remember_validation(engine: EngineFolder, gpu: DeviceFacts) -> None:
    """Note that the recorded cases passed; where nothing can be written, that is forgotten."""
    path = _mark(engine, gpu)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{engine.path} on {gpu.name}\n", encoding="utf-8")


def _mark(engine: EngineFolder, gpu: DeviceFacts) -> Path:
    about = [engine.manifest, gpu.name, gpu.compute_capability, gpu.driver]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return cache_folder().parent / "validated" / digest[:32]
