"""The CUDA kernels from Python, over their C ABI."""

from dijiang_engines.former_paths import attributes

__getattr__ = attributes(__name__)  # what was in the module of this name
