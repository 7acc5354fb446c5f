"""A shared library under another of its names, for one process alone.

The ONNX parser of TensorRT for RTX opens libtensorrt_rtx.so when it meets a plugin. The wheel has the library
as libtensorrt_rtx.so.1 only, and the parser ends the process if it cannot open it. The loader reads its path
when a process starts, so the process that parses is started with a folder on it that holds nothing but a
link.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dijiang_engines.nvidia.tensorrt_versions import RUNTIMES, Dialect

PATH_VARIABLE = "LD_LIBRARY_PATH"


@contextmanager
def parser_environment(
    dialect: Dialect, version: str, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, str]]:
    """The environment for a process in which the ONNX parser of this runtime meets plugins.

    Args:
        dialect: of the runtime.
        version: of its library.
        environment: to begin with; default: this process's.

    Yields:
        A copy, with a temporary folder on the loader's path if the runtime needs one; the folder is gone
        after the block.
    """
    given = dict(os.environ if environment is None else environment)
    library = _library(dialect, version)
    if dialect.parser_opens is None or library is None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="dijiang-link-") as folder:
        (Path(folder) / dialect.parser_opens).symlink_to(library)
        path = (folder, given.get(PATH_VARIABLE, ""))
        yield given | {PATH_VARIABLE: os.pathsep.join(filter(None, path))}


def _library(dialect: Dialect, version: str) -> Path | None:
    """The library in the wheel of libraries; None if it came in another way, which brings all its names."""
    product = RUNTIMES[dialect.runtime]
    spec = importlib.util.find_spec(product.libraries_module) if product.libraries_module else None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in product.libraries:
            path = Path(folder) / name.format(major=version.split(".")[0])
            if path.is_file():
                return path.resolve()
    return None
