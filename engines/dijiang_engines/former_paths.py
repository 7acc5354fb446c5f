"""Module paths of version 0.1.0, which still work, with a DeprecationWarning that says where things are now.

They go in the release after the next. `FORMER` has the modules that README, docs and samples showed. A module
whose name is a package's today (`kernels`) is reached through the package's `__getattr__`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec

TYPE_CHECKING = False  # typing's, which takes longer to import than everything here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any

FORMER = {
    "dijiang_engines.atomic": "dijiang_engines.formats.atomic",
    "dijiang_engines.build": "dijiang_engines.building.build",
    "dijiang_engines.bundle": "dijiang_engines.formats.bundle",
    "dijiang_engines.generate": "dijiang_engines.generation.generator",
    "dijiang_engines.kernels": "dijiang_engines.kernels.attention",
    "dijiang_engines.model": "dijiang_engines.formats.open",
    "dijiang_engines.session": "dijiang_engines.generation.session",
    "dijiang_engines.tokenizer": "dijiang_engines.tokenizer.tokenizer",
    "dijiang_engines.validate": "dijiang_engines.validation.validate",
    "dijiang_export.checkpoint": "dijiang_export.checkpoint.checkpoint",
    "dijiang_export.to_onnx": "dijiang_export.export.to_onnx",
}
"""Former module -> the module that has its names now."""


def attributes(former: str) -> Callable[[str], Any]:
    """`__getattr__` for a package, or a stand-in, that was the module `former`.

    Raises (when called):
        AttributeError: the module has no such name now.
    """

    def get(name: str) -> Any:
        now = FORMER[former]
        other = name.startswith("__") or _is_module(f"{former}.{name}")
        module = None if other else importlib.import_module(now)
        if module is None or not hasattr(module, name):
            raise AttributeError(f"module {former!r} has no attribute {name!r}")
        import warnings

        what = f"{former}.{name} is now {now}.{name}"
        warnings.warn(f"{what}; the former path goes in a later release", DeprecationWarning, stacklevel=2)
        return getattr(module, name)

    return get


def _is_module(path: str) -> bool:
    """Whether this is a module of today's package, which importing it will find."""
    from importlib.util import find_spec

    package = sys.modules[path.rpartition(".")[0]]
    return hasattr(package, "__path__") and find_spec(path) is not None


class _Finder:
    """Finder and loader (importlib.abc has the protocols) of stand-ins for former modules. Asked last, so a
    module that is there is never hidden.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in FORMER else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = attributes(module.__name__)


def install() -> None:
    """Let former paths be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
