"""The kernels that TensorRT for RTX compiled for this GPU, kept beside the plans for the next start.

A file in the engine's folder for each runtime, driver and GPU. It begins with what it was made for and a hash
of what follows; a file that says something else, or is not what was written, is made anew. Where the folder
cannot be written to, kernels are compiled at every start. What is in it is code, as plans are: whoever may
write to an engine's folder decides what runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dijiang_engines.errors import BundleError, DijiangError, OutputError
from dijiang_engines.formats.atomic_file import output_file
from dijiang_engines.formats.engine import EngineFolder
from dijiang_engines.formats.safe_files import LIMITS, open_regular, parse_json
from dijiang_engines.nvidia.cuda import DeviceFacts

_FORMAT = "dijiang-kernel-cache 1"
_HEADER_BYTES = 1 << 16


class KernelCache:
    """One cache in memory, and its file.

    Args:
        engine: whose plans' kernels they are.
        version: of the runtime's library.
        gpu: that they are for.

    Attributes:
        path: the file.
        note: why the file was not used, or cannot be written; None if all is well.
        loaded: whether kernels of an earlier start are in use.
    """

    def __init__(self, engine: EngineFolder, version: str, gpu: DeviceFacts) -> None:
        hashes = {name: engine.files[name].sha256 for name in engine.plans}
        self._facts = {
            "runtime": version, "gpu": gpu.name, "compute_capability": gpu.compute_capability,
            "driver": gpu.driver, "plans": hashes,
        }  # fmt: skip
        text = json.dumps(self._facts, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = engine.path / f"kernels-sm{gpu.compute_capability}-{key}.cache"
        self.note: str | None = None
        self.loaded = False
        self._cache: Any = None
        self._saved = ""

    def attach(self, config: Any) -> None:
        """Give a plan's IRuntimeConfig this cache; the first one makes it, from the file if that is right."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            blob = self._read()
            if blob is not None:
                self.loaded = bool(self._cache.deserialize(blob))
                if self.loaded:
                    self._saved = hashlib.sha256(blob).hexdigest()
                else:
                    self.note = f"{self.path.name} is of another driver or GPU: its kernels are compiled anew"
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file if there are kernels that it does not have; what keeps it from that is `note`."""
        if self._cache is None:
            return
        memory = self._cache.serialize()
        blob = b"" if memory is None else bytes(memoryview(memory))
        digest = hashlib.sha256(blob).hexdigest()
        if not blob or digest == self._saved:
            return
        header = {"format": _FORMAT, "made_for": self._facts, "bytes": len(blob), "sha256": digest}
        try:
            with output_file(self.path) as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(blob)
        except (OutputError, OSError) as error:
            reason = getattr(error, "got", None) or error
            self.note = f"kernels are compiled at every start: {self.path} cannot be written ({reason})"
            return
        self._saved = digest

    def _read(self) -> bytes | None:
        """What an earlier start left; None if there is nothing, or something else."""
        if not self.path.exists():
            return None
        try:
            with open_regular(self.path, most=LIMITS["kernel cache"], error=BundleError) as file:
                header = parse_json(file.readline(_HEADER_BYTES), self.path.name)
                blob = file.read(LIMITS["kernel cache"])
        except (DijiangError, OSError) as error:
            self.note = f"{self.path.name} is not read: {getattr(error, 'what', error)}"
            return None
        found = header if isinstance(header, dict) else {}
        expected = {
            "format": _FORMAT, "made_for": self._facts, "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
        }  # fmt: skip
        if found != expected:
            self.note = f"{self.path.name} is damaged or foreign: its kernels are compiled anew"
            return None
        return blob


def cache_files(folder: Path) -> list[Path]:
    """Every cache of this kind in an engine's folder."""
    return sorted(folder.glob("kernels-sm*.cache"))
