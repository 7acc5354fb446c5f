"""From a DiJiang checkpoint to a validated bundle of ONNX graphs."""

from dijiang_engines.version import __version__

__all__ = ["__version__"]
