"""What the engines do with a TensorRT at first, with a real lean runtime: `lean.py SITE LIBRARY`.

SITE holds the unpacked wheels of tensorrt_lean's bindings and libraries, LIBRARY is a shared library that
registers no plugin. Without a GPU the runtime has a version, a log and a plugin registry; it reads no plan.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from dijiang_engines.errors import PluginError
from dijiang_engines.nvidia import tensorrt_library as library
from dijiang_engines.nvidia.tensorrt_versions import dialect_of

sys.path.insert(0, sys.argv[1])
trt: Any = importlib.import_module("tensorrt_lean_bindings")
version = library.tensorrt_version(trt)
messages: list[str] = []
runtime = trt.Runtime(library.make_logger(trt, messages))
found: dict[str, Any] = {"version": version, "dialect": dialect_of(version).name, "messages": messages}
try:
    library.load_plugin(trt, Path(sys.argv[2]))
except PluginError as error:
    found["plugin"] = [error.what, str(error.got)]
print(json.dumps(found))
